"""The indices of an axis that stay when atoms inside it lose units, or gain copies.

Examples
--------
>>> from graphprune.analysis.axes import Axes
>>> axes = Axes()
>>> heads, pair = axes.atom(2), axes.atom(2)
>>> out = axes.product(heads, axes.sum(pair, pair))
>>> kept_indices(axes, out, {pair: AxisCut(removed=(1,))})
[0, 2, 4, 6]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graphprune.analysis.axes import Atom, Axes, Axis, Product, Sum


@dataclass(frozen=True)
class AxisCut:
    """The units of one atom that go.

    Parameters
    ----------
    removed
        Sorted indices, the same under every parent; used when `parents` is empty.
    parents
        The atoms that this atom depends on, outermost first.
    per_parent
        For a dependent atom: the sorted removed indices for each tuple of parent indices, all
        equally many, so that the shape stays rectangular.
    """

    removed: tuple[int, ...] = ()
    parents: tuple[Atom, ...] = ()
    per_parent: Mapping[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of units that go (under each parent)."""
        if self.parents:
            return len(next(iter(self.per_parent.values()), ()))
        return len(self.removed)

    def under(self, at: Mapping[Atom, int]) -> frozenset[int]:
        """Return the removed indices where the parents stand at the units `at`."""
        if not self.parents:
            return frozenset(self.removed)
        return frozenset(self.per_parent[tuple(at[parent] for parent in self.parents)])


@dataclass(frozen=True)
class Growth:
    """Copies that an atom gains; only for atoms that no weight holds."""

    by: int

    @property
    def count(self) -> int:
        """The number of units that go: a negative one."""
        return -self.by


AxisCuts = Mapping[Axis, AxisCut | Growth]


def kept_size(axes: Axes, axis: Axis, cuts: AxisCuts) -> int:
    """Return the size of `axis` after `cuts` (keyed by resolved atoms)."""
    axis = axes.head(axis)
    if isinstance(axis, Product):
        return math.prod(kept_size(axes, factor, cuts) for factor in axis.factors)
    if isinstance(axis, Sum):
        return sum(kept_size(axes, term, cuts) for term in axis.terms)
    cut = cuts.get(axis)
    return axis.size - cut.count if cut else axis.size


def is_cut(axes: Axes, axis: Axis, cuts: AxisCuts) -> bool:
    """Return whether any atom inside `axis` is in `cuts`."""
    return any(atom in cuts for atom in axes.atoms(axis))


def kept_indices(axes: Axes, axis: Axis, cuts: AxisCuts) -> list[int]:
    """Return the indices of `axis` that stay after `cuts`, in order."""
    return list(_kept(axes, axes.head(axis), cuts, {}))


def _kept(axes: Axes, axis: Axis, cuts: AxisCuts, at: dict[Atom, int]) -> Iterable[int]:
    if not is_cut(axes, axis, cuts):
        return range(axis.size)
    if isinstance(axis, Atom):
        cut = cuts[axis]
        assert isinstance(cut, AxisCut), "an axis of a weight cannot grow"
        gone = cut.under(at)
        return [index for index in range(axis.size) if index not in gone]
    if isinstance(axis, Sum):
        kept: list[int] = []
        start = 0
        for term in axis.terms:
            kept.extend(start + index for index in _kept(axes, axes.head(term), cuts, at))
            start += term.size
        return kept
    assert isinstance(axis, Product)
    lead, *rest = axis.factors
    lead, inner = axes.head(lead), axes.product(*rest)
    kept = []
    for index in _kept(axes, lead, cuts, at):
        if isinstance(lead, Atom):
            at = {**at, lead: index}
        kept.extend(index * inner.size + below for below in _kept(axes, inner, cuts, at))
    return kept
