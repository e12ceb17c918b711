"""Sizes that a config class refuses by a rule of its own, such as heads that divide the width.

A model of such sizes can be built, and code beside a checkpoint can build it; but the config of a
plain checkpoint does not load. The rules are not known by name: the config class is asked.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from graphprune.analysis.groups import Group
from graphprune.backends.huggingface.config_search import (
    Builder,
    Changes,
    Search,
    Sizes,
    needed_sizes,
)
from graphprune.errors import last_line
from graphprune.ir.program import Program

_WAYS = 3
"""Ways to give a model its sizes that are looked at."""

_MOST = 1024
"""Units of a group whose sizes are asked for one by one."""


def broken_rule(builder: Builder, target: Sizes) -> str:
    """Say by which rule the config of a model of the sizes `target` is refused; "" for no rule.

    The fields and what would do in their place are named.
    """
    changes = next(iter(_solutions(builder, target)), None)
    why = _refusal(builder, changes) if changes else ""
    if not changes or not why:
        return ""
    before = builder.integers()
    scaled = {path: value for path, value in changes.items() if before.get(path, value) != value}
    if not scaled:
        return why
    names = " and ".join(f"{path} {value}" for path, value in scaled.items())
    first = next(iter(scaled))
    others = [
        each[first]
        for each in _multiples(before, changes, min(before[path] for path in scaled))
        if not _refusal(builder, each)
    ]
    would_do = f"; {first} of {', '.join(map(str, others))} would do" if others else ""
    return f"the config refuses {names}: {why}{would_do}"


def accepted_sizes(program: Program, groups: Iterable[Group]) -> dict[str, Sequence[int]]:
    """Return the numbers of units that groups may be left with by the rules of their config.

    Groups that are alike in all layers are taken to keep the same number of units, as a plain
    checkpoint has it.

    Returns
    -------
    dict
        Group name -> numbers of units, ascending; groups that no rule is known for are not in it.
    """
    source = program.source
    if source is None:
        return {}
    base = getattr(source.model_class, "graphprune_base", source.model_class)
    builder = Builder(source.config, base)
    alike: dict[Any, list[Group]] = {}
    for group in groups:
        places = {(re.sub(r"\d+", "*", m.weight), m.dim, m.width) for m in group.members}
        owned = any(member.owner is not None for member in group.members)
        if not owned and 1 < group.size <= _MOST:
            alike.setdefault((group.role, group.size, frozenset(places)), []).append(group)
    found: dict[str, Sequence[int]] = {}
    for (_, size, _), same in alike.items():
        counts = _accepted(builder, program, same, size)
        if counts is not None:
            found.update({group.name: counts for group in same})
    return found


def _accepted(
    builder: Builder, program: Program, groups: Sequence[Group], size: int
) -> list[int] | None:
    """Return what groups of `size` units may be left with; None for anything, or nobody knows."""
    before = builder.integers()
    # Sizes alone do not tell half the heads from heads of half the size: what counts must suit all.
    ways = [
        changes
        for changes in _solutions(builder, _left_with(program, groups, size // 2))
        if changes and all(path in before for path in changes)
    ]

    def suits(count: int) -> bool:
        scaled = (_scaled(before, changes, size // 2, size, count) for changes in ways)
        return all(each is not None and not _refusal(builder, each) for each in scaled)

    least = max(group.min_units for group in groups)
    counts = [count for count in range(least, size + 1) if suits(count)] if ways else []
    return counts if 0 < len(counts) <= size - least else None


def _left_with(program: Program, groups: Sequence[Group], count: int) -> Sizes:
    """Return the sizes of all weights where `count` units of each of `groups` are left."""
    sizes = {name: list(shape) for name, shape in needed_sizes(program, derived=False).items()}
    for group in groups:
        for member in group.members:
            if member.weight in sizes:
                gone = (group.size - count) * len(member.indices(0))
                sizes[member.weight][member.dim] -= gone
    return {name: tuple(shape) for name, shape in sizes.items()}


def _solutions(builder: Builder, target: Sizes) -> list[Changes]:
    """Return changes that give a model the sizes `target`, whatever its config says to them."""
    search = Search(builder.unchecked(), target, {}, lambda place: ())
    return list(itertools.islice(search.solutions(), _WAYS))


def _multiples(
    before: Mapping[str, int], changes: Mapping[str, Any], size: int
) -> Iterator[Changes]:
    """Yield `changes` with all fields that change at every other part of what they were."""
    for count in range(1, size + 1):
        fields = {path: before[path] for path in changes if path in before}
        if all(value * count % size == 0 for value in fields.values()):
            yield {**changes, **{path: value * count // size for path, value in fields.items()}}


def _scaled(
    before: Mapping[str, int], changes: Mapping[str, Any], at: int, size: int, count: int
) -> Changes | None:
    """Return `changes`, which were found `at` some units of `size`, for `count` of them."""
    found = {}
    for path, value in changes.items():
        step, odd = divmod(before[path] - value, size - at)
        if odd:
            return None
        found[path] = before[path] - step * (size - count)
    return found


def _refusal(builder: Builder, changes: Mapping[str, Any]) -> str:
    try:
        builder.config(changes)
    except Exception as error:  # noqa: BLE001 - configs validate themselves in many ways
        return last_line(error).removeprefix("ValueError: ")
    return ""
