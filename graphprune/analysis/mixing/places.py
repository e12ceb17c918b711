"""Where an axis stands in the values of a graph, and the bases that its units have there.

A value whose units are mixed by a matrix T is held in another basis: x becomes x T along the axis.
What multiplies it and sums over the axis must then be held in the inverse one, T^-T. So each place
has one of two sides, and operators say which places are on the same side and which on the other.

A gain, a parameter that multiplies unit by unit as that of a norm does, may be taken into what
reads its product, in powers of which the bases there differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from graphprune.analysis.axes import Atom, Occurrence
from graphprune.analysis.types import Types
from graphprune.ir.provenance import whereabouts

Place = tuple[fx.Node, int, int]
"""A value, which of its results, and which of the times that the axis occurs in its dimension."""


class Unmixable(Exception):
    """The reason why the units of an axis stay as they are, and the node that is the cause."""

    def __init__(self, why: str, node: fx.Node) -> None:
        super().__init__(f"{why}, at {whereabouts(node)}")


@dataclass(frozen=True)
class Holder:
    """A value that holds an axis: in which dimension, where in it, and its places in order."""

    dim: int
    occurrences: tuple[Occurrence, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Basis:
    """The basis of a place: ``D A`` on side 1, ``D A^-T`` on side -1, for one A of all places.

    Parameters
    ----------
    side
        1 or -1.
    powers
        Names of gains -> the power in which they are in the diagonal D; none of power 0.
    """

    side: int = 1
    powers: Mapping[str, int] = field(default_factory=dict)

    def times(self, side: int, powers: Mapping[str, int]) -> Basis:
        """Return the basis on the same or the other side, with other powers of gains on top."""
        names = {**self.powers, **powers}
        added = {n: side * self.powers.get(n, 0) + powers.get(n, 0) for n in names}
        return Basis(self.side * side, {name: power for name, power in added.items() if power})


@dataclass
class Bases:
    """The bases of all places of one axis, as operators say them.

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
    _links: dict[Place, list[tuple[Place, int, Mapping[str, int]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _normed: list[Place] = field(default_factory=list)

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

    def gained(self, source: fx.Node, gain: str, result: fx.Node) -> None:
        """Say that `result` is `source` with each unit multiplied by a gain, until it is folded."""
        self.link(self.holder(source).places, self.holder(result).places, powers={gain: -1})

    def keep_lengths(self, node: fx.Node) -> None:
        """Say that a norm is taken of a value over the axis."""
        self.orthogonal = True
        self._normed += self.holder(node).places

    def link(
        self,
        left: Sequence[Place],
        right: Sequence[Place],
        side: int = 1,
        powers: Mapping[str, int] | None = None,
    ) -> None:
        """Say how the bases of the second of two lists of places differ from those of the first.

        Where they are not equally many, that holds of all of one and all of the other.
        """
        if len(left) == len(right):
            pairs = list(zip(left, right, strict=True))
        else:
            pairs = [(a, b) for a in left for b in right]
        there = powers or {}
        back = {name: -side * power for name, power in there.items()}
        for a, b in pairs:
            self._links[a].append((b, side, there))
            self._links[b].append((a, side, back))

    def solved(self) -> dict[Place, Basis]:
        """Return the basis of every place; `orthogonal` where a place would be on both sides.

        Raises
        ------
        Unmixable
            When gains are in a basis in one way and not in another, so that they cannot be folded.
        """
        found: dict[Place, Basis] = {}
        for start in (*self._normed, *self._links):  # a norm is taken where gains have no power
            if start in found:
                continue
            found[start], pending = Basis(), [start]
            while pending:
                place = pending.pop()
                for other, side, powers in self._links[place]:
                    wanted = found[place].times(side, powers)
                    if other not in found:
                        found[other] = wanted
                        pending.append(other)
                    elif found[other].powers != wanted.powers:
                        raise Unmixable(_unfoldable(found[other], wanted), other[0])
                    elif found[other].side != wanted.side:
                        self.orthogonal = True
        for place in self._normed:
            if found[place].powers:
                raise Unmixable(_unfoldable(found[place], Basis()), place[0])
        return found


def _unfoldable(one: Basis, other: Basis) -> str:
    names = {**one.powers, **other.powers}
    name = next(n for n in names if one.powers.get(n) != other.powers.get(n))
    return f"{name} multiplies its units on one way to a value and not on another"
