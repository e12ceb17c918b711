"""The parts of a plan: steps of cuts and merges, with the index maps that say where they act."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from graphprune.plan.index_map import IndexMap

WeightDim = tuple[str, int]
"""(weight, dimension)"""


@dataclass(frozen=True)
class Cut:
    """The units of one group that go.

    Parameters
    ----------
    group, size, role
        The group, how many units it had, and what it is.
    units
        Indices of the parents' units (an empty tuple without parents) -> sorted units that go.
    parents
        Names of the groups that the keys of `units` index.
    members
        The index maps of the group.
    """

    group: str
    size: int
    role: str
    units: Mapping[tuple[int, ...], tuple[int, ...]]
    parents: tuple[str, ...] = ()
    members: tuple[IndexMap, ...] = ()

    @property
    def count(self) -> int:
        """The number of units that go (under each parent)."""
        return len(next(iter(self.units.values()), ()))

    @property
    def whole(self) -> list[str]:
        """The weights that go as a whole, with the units that own them."""
        gone = {unit for units in self.units.values() for unit in units}
        return [member.weight for member in self.members if member.owner in gone]

    def indices(self) -> Iterator[tuple[str, int, list[int]]]:
        """(weight, dim, indices that go) of every member."""
        for member in self.members:
            found: set[int] = set()
            for parent_units, units in self.units.items():
                parents = dict(zip(self.parents, parent_units, strict=True))
                for unit in units:
                    found.update(member.indices(unit, parents))
            yield member.weight, member.dim, sorted(found)


@dataclass(frozen=True)
class Permutation:
    """Another order of the indices along one dimension of a weight.

    Parameters
    ----------
    weight, dim
        The weight and the dimension.
    sources
        For every index, which index held before what it holds now.
    """

    weight: str
    dim: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Merge:
    """The KV heads of one attention, averaged in runs of neighbors.

    Parameters
    ----------
    group, size
        The group of KV heads and how many there were.
    groups
        How many are left; every run of ``size // groups`` neighbors becomes one.
    members
        The index maps of the group in key and value weights (query weights keep their heads).
    deinterleaving
        How weights in which queries, keys and values were interleaved are permuted before that;
        the index maps count the permuted weights.
    reordering
        How heads are permuted before all that, in every weight that they reach into, so that
        those that become one are neighbors.
    """

    group: str
    size: int
    groups: int
    members: tuple[IndexMap, ...] = ()
    deinterleaving: tuple[Permutation, ...] = ()
    reordering: tuple[Permutation, ...] = ()

    @property
    def width(self) -> int:
        """The number of heads that become one."""
        return self.size // self.groups

    def runs(self) -> Iterator[tuple[str, int, list[list[int]]]]:
        """(weight, dim, lists of indices that become one), sorted; each dimension once."""
        found: dict[WeightDim, list[list[int]]] = defaultdict(list)
        for member in self.members:
            for first in range(0, self.size, self.width):
                heads = [member.indices(first + i) for i in range(self.width)]
                same = (list(indices) for indices in zip(*heads, strict=True))
                found[member.weight, member.dim].extend(same)
        for (weight, dim), runs in found.items():
            yield weight, dim, sorted(runs)


@dataclass(frozen=True)
class Branch:
    """A residual branch that goes: what it adds to the residual stream is zero from then on.

    Parameters
    ----------
    name
        Where its matrices lie.
    weights
        Name -> shape of every weight that nothing else uses, once the branches before it in the
        step are gone.
    caches
        The parts of the KV cache that nothing else reads, such as ``3.key``.
    """

    name: str
    weights: Mapping[str, tuple[int, ...]]
    caches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """What one pass decided, in the coordinates of the program that it was given.

    Merges come after the cuts, and count what those leave. Branches go by themselves: no cut or
    merge stands beside them in a step.
    """

    fingerprint: str
    cuts: tuple[Cut, ...] = ()
    merges: tuple[Merge, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def permutations(self) -> tuple[Permutation, ...]:
        """The permutations of weights between cuts and merges, one after the other."""
        return (*(p for merge in self.merges for p in merge.reordering), *self.deinterleaving)

    @property
    def deinterleaving(self) -> tuple[Permutation, ...]:
        """The permutations of interleaved weights between cuts and merges, each once."""
        return tuple(dict.fromkeys(p for merge in self.merges for p in merge.deinterleaving))

    @property
    def whole(self) -> list[str]:
        """The weights that go as a whole, with units or branches that own them."""
        owned = [name for cut in self.cuts for name in cut.whole]
        return [*owned, *(name for branch in self.branches for name in branch.weights)]

    def removed(self) -> dict[WeightDim, set[int]]:
        """Return the indices that go, as the program before the step counts them.

        Of a weight that goes with a branch these are all along its first dimension.
        """
        found: dict[WeightDim, set[int]] = defaultdict(set)
        for cut in self.cuts:
            for weight, dim, indices in cut.indices():
                found[weight, dim].update(indices)
        for name, size in self._branch_extents().items():
            found[name].update(range(size))
        return found

    def _branch_extents(self) -> dict[WeightDim, int]:
        weights = (pair for branch in self.branches for pair in branch.weights.items())
        return {(name, 0): shape[0] for name, shape in weights if shape}

    def extents(self) -> dict[WeightDim, int]:
        """Return the size of every dimension that the step changes, before it."""
        # A merge beside cuts counts what they leave, so that theirs come last.
        changes: tuple[Cut | Merge, ...] = (*self.merges, *self.cuts)
        sizes = {(p.weight, p.dim): len(p.sources) for p in self.permutations}
        sizes |= {(m.weight, m.dim): m.extent for change in changes for m in change.members}
        return sizes | self._branch_extents()
