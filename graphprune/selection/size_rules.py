"""Rules for how many units a group may keep, and the number nearest to what a budget asks for."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

SizeRule = Callable[[int], str]
"""Says why a group may not be left with so many units; "" where it may."""

_TOLD = 8
"""Numbers that would do which a message names."""


def nearest_size(
    size: int,
    wanted: int,
    rule: SizeRule,
    *,
    least: int = 1,
    preferred: Container[int] | None = None,
) -> int:
    """Return the accepted number of units that is nearest to `wanted`.

    At most twice as many units go as `wanted` says, and at least one if any is to; of two numbers
    that are as near the larger is taken. Where no number is in that reach, all units stay.

    Parameters
    ----------
    size
        Units that there are.
    wanted
        How many should stay.
    rule
        What is accepted. All units always are.
    least
        How many have to stay.
    preferred
        Numbers that are taken only, where any of them is accepted and in reach.

    Examples
    --------
    >>> divides_96 = lambda count: "" if 96 % count == 0 else "96 is no multiple of it"
    >>> [nearest_size(12, wanted, divides_96) for wanted in (9, 7, 5, 11)]
    [8, 8, 6, 12]
    """
    if wanted >= size:
        return size
    near = _outwards(wanted, max(least, size - 2 * (size - wanted)), size - 1)
    if preferred is not None:
        for count in near:
            if count in preferred and not rule(count):
                return count
    return next((count for count in near if not rule(count)), size)


def sizes_that_do(size: int, rule: SizeRule, *, least: int = 1, near: int | None = None) -> str:
    """Name accepted numbers of units below `size`, or a few of them around `near`; "" for none."""
    found: list[int] = []
    for count in _outwards(size // 2 if near is None else near, least, size - 1):
        if len(found) == _TOLD:
            break
        if not rule(count):
            found.append(count)
    return ", ".join(map(str, sorted(found)))


def _outwards(start: int, low: int, high: int) -> Sequence[int]:
    """Return the numbers from `low` to `high`, the nearest to `start` first, larger before less."""
    return sorted(range(low, high + 1), key=lambda count: (abs(count - start), -count))
