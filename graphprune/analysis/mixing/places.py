"""Where an axis stands in the values of a graph, and the bases that its units have there.

A value whose units are mixed by a matrix T is held in another basis: x becomes x T along the axis.
What multiplies it and sums over the axis must then be held in the inverse one, T^-T. So each place
has one of two sides, and operators say which places are on the same side and which on the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from graphprune.analysis.axes import Atom, Occurrence
from graphprune.analysis.types import Types

Place = tuple[fx.Node, int, int]
"""A value, which of its results, and which of the times that the axis occurs in its dimension."""


class Unmixable(Exception):
    """The reason why the units of an axis stay as they are, and the node that is the cause."""

    def __init__(self, why: str, node: fx.Node) -> None:
        super().__init__(why)
        self.why, self.node = why, node


@dataclass(frozen=True)
class Holder:
    """A value that holds an axis: in which dimension, where in it, and its places in order."""

    dim: int
    occurrences: tuple[Occurrence, ...]
    places: tuple[Place, ...]


@dataclass
class Bases:
    """The sides of all places of one axis, as operators say them.

    Parameters
    ----------
    types
        The types of the graph.
    atom
        The axis.
    orthogonal
        Whether only a mixing that keeps lengths will do: something takes a norm over the axis, or a
        place is on both sides.
    """

    types: Types
    atom: Atom
    orthogonal: bool = False
    _links: dict[Place, list[tuple[Place, int]]] = field(default_factory=lambda: defaultdict(list))

    def holds(self, node: object) -> bool:
        """Return whether a value has the axis."""
        return isinstance(node, fx.Node) and self.atom in self.types.atoms_of.get(node, ())

    def holder(self, node: fx.Node, result: int = 0) -> Holder:
        """Return where the axis stands in one of the results of `node`.

        Raises
        ------
        Unmixable
            When it stands in several dimensions, or within itself.
        """
        type_ = self.types.axes_of[node]
        if isinstance(type_, list):
            type_ = type_[result]
        dims = [dim for dim, axis in enumerate(type_) if self.atom in self.types.atoms_in(axis)]
        if len(dims) != 1:
            raise Unmixable("it stands in several dimensions of one tensor", node)
        every = self.types.axes.occurrences(type_[dims[0]])
        found = tuple(each for each in every if each.atom is self.atom)
        if any(axis is self.atom for each in found for axis, _ in each.outer):
            raise Unmixable("it stands within itself", node)
        return Holder(dims[0], found, tuple((node, result, at) for at in range(len(found))))

    def same(self, *nodes: fx.Node) -> None:
        """Say that values are held in one basis, place by place."""
        holders = [self.holder(node) for node in nodes]
        for left, right in zip(holders, holders[1:], strict=False):
            self.link(left.places, right.places)

    def opposite(self, left: fx.Node, right: fx.Node) -> None:
        """Say that products of two values are summed over the axis."""
        self.link(self.holder(left).places, self.holder(right).places, -1)

    def link(self, left: Sequence[Place], right: Sequence[Place], side: int = 1) -> None:
        """Say which of two lists of places is on which side of the other.

        Where they are not equally many, all of one are taken to be on one side of all of the other.
        """
        if len(left) == len(right):
            pairs = list(zip(left, right, strict=True))
        else:
            pairs = [(a, b) for a in left for b in right]
        for a, b in pairs:
            self._links[a].append((b, side))
            self._links[b].append((a, side))

    def sides(self) -> dict[Place, int]:
        """Return 1 or -1 for every place; `orthogonal` where a place would be on both sides."""
        found: dict[Place, int] = {}
        for start in self._links:
            if start in found:
                continue
            found[start], pending = 1, [start]
            while pending:
                place = pending.pop()
                for other, side in self._links[place]:
                    wanted = found[place] * side
                    if other not in found:
                        found[other] = wanted
                        pending.append(other)
                    elif found[other] != wanted:
                        self.orthogonal = True
        return found
