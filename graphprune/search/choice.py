"""The choice among candidates that were measured, and what is said of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from graphprune.search.bench import Figures, Tried, ranked

MARGIN = 0.1
"""A recipe whose layers stay alike is preferred where it adds no more than so much beyond what the
best one adds, as a part of that."""


@dataclass(frozen=True)
class Choice:
    """The recipe that was chosen, and why, in a sentence."""

    tried: Tried
    why: str


def choose(whole: Figures, tried: Sequence[Tried], measure: str, *, prefer_alike: bool) -> Choice:
    """Choose the candidate that measures best.

    One whose layers stay alike, so that a config gives the checkpoint, is preferred where it costs
    little: no more than `MARGIN`, or than the standard error of the difference over the samples.

    Parameters
    ----------
    whole
        What was measured of the original, on the same samples.
    tried
        Candidates with figures, one at least.
    measure
        What was measured.
    prefer_alike
        Whether layers that stay alike are worth anything.
    """
    best, *others = ranked(tried)
    assert best.figures is not None, "a candidate that is ranked has figures"
    told = f"{best.candidate} adds {_added(best, whole):.4f} to the {measure}"
    on = f"on {len(whole.values)} samples that nothing was fitted to"
    alike = next((each for each in ranked(tried) if each.candidate.alike), best)
    if prefer_alike and alike is not best and _within(alike, best, whole):
        told = f"{alike.candidate} adds {_added(alike, whole):.4f} to the {measure}"
        why = (
            f"{told} {on}; {best.candidate} adds {_added(best, whole):.4f}, so little less that "
            "layers of equal sizes, which a config can hold, are worth more"
        )
        return Choice(alike, why)
    if not others:
        return Choice(best, f"{told} {on}; nothing else was measured")
    second = others[0]
    return Choice(
        best,
        f"{told} {on}, the least of {len(tried)} recipes; the next, {second.candidate}, adds "
        f"{_added(second, whole):.4f}",
    )


def _added(tried: Tried, whole: Figures) -> float:
    assert tried.figures is not None
    return tried.figures.mean - whole.mean


def _within(alike: Tried, best: Tried, whole: Figures) -> bool:
    """Return whether `alike` is so little worse than `best` that it does not matter."""
    assert alike.figures is not None and best.figures is not None
    pairs = zip(alike.figures.values, best.figures.values, strict=True)
    differences = [mine - other for mine, other in pairs]
    error = 0.0
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    allowed = max(MARGIN * abs(_added(best, whole)), error)
    return statistics.fmean(differences) <= allowed
