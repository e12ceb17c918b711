"""Where the heads of an attention lie, coordinate by coordinate, in its weights and operands.

All of it is read from the axis types, in which a head, its queries and the coordinates of keys and
values are atoms of their own; nothing is said of any architecture.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.attention.attentions import Attention, attentions_of
from graphprune.analysis.axes import Atom, Axis
from graphprune.analysis.index_maps import units_along
from graphprune.analysis.matrices import Contractions, Matrix, bias_of
from graphprune.analysis.types import Types
from graphprune.ir.provenance import module_path
from graphprune.plan.steps import Permutation, WeightDim
from graphprune.transforms.heads.kv_heads import Heads

Label = tuple[frozenset[tuple[Atom, int]], int]
"""Of a coordinate: the units of atoms that it belongs to, and its number among those of them."""


class Unmapped(Exception):
    """The reason why the heads of an attention cannot be told apart coordinate by coordinate."""


@dataclass(frozen=True, eq=False)
class Projection:
    """The part of a matrix that makes queries, keys or values, or takes in what was attended.

    Parameters
    ----------
    matrix
        The matrix; it is used once.
    bias
        The parameter that its output is added to, or "".
    indices
        ``[kv, slots, d]``: rows of the matrix (columns, where it takes in), one slot for keys and
        values.
    """

    matrix: Matrix
    bias: str
    indices: Tensor

    @property
    def node(self) -> fx.Node:
        """The contraction."""
        return self.matrix.uses[0].node

    def inputs(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """``[n, in]``, float64."""
        return torch.cat([rows.double() for _, rows in self.matrix.uses[0].rows(values)])


@dataclass(frozen=True, eq=False)
class Operand:
    """The dimensions of a node's value that heads and their coordinates lie in.

    Parameters
    ----------
    node
        The node, of four dimensions: batch, heads, positions and coordinates, in any order.
    heads
        The dimension of the heads and ``[kv, slots]``, the index of each.
    width
        The dimension of the coordinates and ``[d]``, the index of each.
    """

    node: fx.Node
    heads: tuple[int, Tensor]
    width: tuple[int, Tensor]

    def read(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """``[batch, positions, kv, slots, d]``, float64."""
        value = values[self.node].movedim((self.heads[0], self.width[0]), (2, 3)).double()
        return value[:, :, self.heads[1]][..., self.width[1]]


@dataclass(frozen=True, eq=False)
class HeadMap:
    """The heads of one attention, from the projections to the output.

    Parameters
    ----------
    heads
        The KV heads.
    projections
        Of queries, keys, values, and of what was attended.
    operands
        Queries, keys and values as they are attended to, and what comes out.
    planes, fixed
        ``[n, 2]`` and ``[d - 2 n]``: the coordinates of keys that one rotary frequency rotates, and
        the others.
    """

    heads: Heads
    projections: tuple[Projection, Projection, Projection, Projection]
    operands: tuple[Operand, Operand, Operand, Operand]
    planes: Tensor
    fixed: Tensor


def head_atom(types: Types, heads: Heads) -> Atom:
    """Return the axis of the KV heads and of their queries, if `types` let attention tie the two.

    Raises
    ------
    Unmapped
        When none counts the heads as `heads` does.
    """
    for weight, dim, slices in heads.slices():
        axis = types.weight(weight)[dim]
        for atom in dict.fromkeys(types.axes.atoms(axis)):
            if atom.size == heads.size:
                units = units_along(types, axis, atom)
                if all(bool((units[each] == at).all()) for at, each in enumerate(slices)):
                    return atom
    raise Unmapped("its heads share no axis with their queries")


def reorder_units(types: Types, atom: Atom, order: Sequence[int]) -> tuple[Permutation, ...]:
    """Return how every weight that holds `atom` is permuted so that unit ``order[i]`` is the i-th.

    That changes nothing that the program gives where `atom` is not frozen.
    """
    if list(order) == sorted(order):
        return ()
    found = []
    for name, node in types.program.weight_nodes():
        for dim, axis in enumerate(types.axes_of[node]):
            if atom in set(types.axes.atoms(axis)):
                units = units_along(types, axis, atom)
                sources = torch.arange(len(units))
                for new, old in enumerate(order):
                    sources[units == new] = (units == old).nonzero().flatten()
                found.append(Permutation(name, dim, tuple(sources.tolist())))
    return tuple(found)


def map_heads(types: Types, held: Contractions, heads: Heads) -> HeadMap:
    """Find where `heads` lie in the program of `types`, whose matrices are `held`.

    Raises
    ------
    Unmapped
        With the reason.
    """
    return _Mapping(types, held, heads).map()


class _Mapping:
    def __init__(self, types: Types, held: Contractions, heads: Heads) -> None:
        self.types, self.held, self.heads = types, held, heads
        self.atom = head_atom(types, heads)
        self.attention = self._attention()
        self.slots = self._slots()
        self.own: dict[WeightDim, set[int]] = defaultdict(set)
        for weight, dim, slices in heads.slices():
            self.own[weight, dim].update(at for each in slices for at in each)

    def _attention(self) -> Attention:
        names = {each.node.name for each in self.heads.attentions}
        among = attentions_of(self.types, self.atom)
        found = [each for each in among if each.node.name in names]
        if len(found) != 1 or len(names) != 1:
            raise Unmapped(f"{len(names)} attentions read them, of which {len(found)} are plain")
        return found[0]

    def _slots(self) -> list[Atom]:
        found = dict.fromkeys(
            atom
            for axis in self.attention.head_axes(self.types)
            for atom in self.types.axes.atoms(axis)
            if atom is not self.atom and not self.types.is_dynamic(atom)
        )
        return list(found)

    def map(self) -> HeadMap:
        queries, keys, values = self.attention.operands
        key, value = self.attention.key_axis(self.types), self.attention.value_axis(self.types)
        inner, outer = self._labels(key), self._labels(value)
        if {atom for atom, *_ in inner} & {atom for atom, *_ in outer}:
            raise Unmapped("keys and values have their coordinates in common")
        projections = (
            self._projection("query", inner, own=False),
            self._projection("key", inner, own=True),
            self._projection("value", outer, own=True),
            self._projection("output", outer, own=False, takes_in=True),
        )
        operands = (
            self._operand(queries, inner, key),
            self._operand(keys, inner, key),
            self._operand(values, outer, value),
            self._operand(self.attention.node, outer, value),
        )
        return HeadMap(self.heads, projections, operands, *self._planes(inner))

    # -- coordinates ----------------------------------------------------------------------------

    def _labels(self, axis: Axis) -> dict[Label, int]:
        """Return the coordinates along `axis` and where they are."""
        atoms = dict.fromkeys(self.types.axes.atoms(axis))
        found = self._found(axis, atoms, slots=1, kv=1)
        labels = {label: indices[0] for label, indices in found[0, 0].items()}
        if len(labels) != self.types.axes.head(axis).size:
            raise Unmapped("coordinates of its heads have no axis")
        return labels

    def _found(
        self, axis: Axis, atoms: Iterable[Atom], slots: int, kv: int, only: Collection[int] = ()
    ) -> dict[tuple[int, int], dict[Label, list[int]]]:
        """Return (KV head, slot) -> coordinate -> where along `axis` it is, in `only` if given."""
        axes = self.types.axes
        held = set(axes.atoms(axis))
        along = {a: units_along(self.types, axis, a).tolist() for a in atoms if a in held}
        size = axes.head(axis).size
        heads = units_along(self.types, axis, self.atom).tolist() if kv > 1 else [0] * size
        slot = self._slot_along(axis).tolist() if slots > 1 else [0] * size
        found: dict[tuple[int, int], dict[Label, list[int]]] = defaultdict(dict)
        seen: dict[Any, int] = defaultdict(int)
        for at in only or range(size):
            units = frozenset((atom, of[at]) for atom, of in along.items() if of[at] >= 0)
            if (atoms and not units) or heads[at] < 0:
                continue
            key = heads[at], slot[at]
            found[key].setdefault((units, seen[key, units]), []).append(at)
            seen[key, units] += 1
        return found

    def _slot_along(self, axis: Axis) -> Tensor:
        """Return which query of its KV head each index along `axis` belongs to."""
        found = torch.zeros(self.types.axes.head(axis).size, dtype=torch.long)
        for atom in self.slots:
            found = found * atom.size + units_along(self.types, axis, atom).clamp(min=0)
        return found

    def _planes(self, labels: Mapping[Label, int]) -> tuple[Tensor, Tensor]:
        """Return the coordinates that one frequency rotates, in pairs, and the others."""
        marks = (mark for mark in self.types.facts.uses if mark.kind == "rotary")
        rotary = {atom for mark in marks for atom in self.types.axes.atoms(mark.axis)}
        pairs: dict[tuple[Atom, int], list[int]] = defaultdict(list)
        fixed = []
        for (units, _), at in labels.items():
            turned = [unit for unit in units if unit[0] in rotary]
            if turned:
                pairs[turned[0]].append(at)
            else:
                fixed.append(at)
        if any(len(pair) != 2 for pair in pairs.values()):
            raise Unmapped("a frequency rotates more or less than two coordinates")
        planes = torch.tensor(sorted(sorted(pair) for pair in pairs.values()), dtype=torch.long)
        return planes.reshape(-1, 2), torch.tensor(sorted(fixed), dtype=torch.long)

    # -- weights --------------------------------------------------------------------------------

    def _projection(
        self, what: str, labels: Mapping[Label, int], *, own: bool, takes_in: bool = False
    ) -> Projection:
        """Return the only projection that makes (or takes in) these coordinates."""
        atoms = {atom for units, _ in labels for atom, _ in units}
        slots = 1 if own else math.prod(atom.size for atom in self.slots)
        found, why = [], f"no weight holds its {what} heads"
        for name, node in self.types.program.weight_nodes():
            if self.types.program.weights[name].ndim < 2:
                continue
            for dim, axis in enumerate(self.types.axes_of[node]):
                held = set(self.types.axes.atoms(axis))
                if self.atom not in held or not held & atoms:
                    continue
                mine = self.own.get((name, dim), set())
                size = self.types.axes.head(axis).size
                only = sorted(mine) if own else [at for at in range(size) if at not in mine]
                indices = self._found(axis, atoms, slots, self.atom.size, only) if only else {}
                if not indices:
                    continue
                table = self._table(what, indices, labels, slots)
                try:
                    found.append(self._in_matrix(what, name, dim, table, takes_in))
                except Unmapped as reason:
                    why = str(reason)
        if len(found) > 1:
            why = f"{len(found)} weights hold its {what} heads"
        if len(found) != 1:
            raise Unmapped(why)
        return found[0]

    def _table(
        self,
        what: str,
        indices: Mapping[tuple[int, int], Mapping[Label, Sequence[int]]],
        labels: Mapping[Label, int],
        slots: int,
    ) -> Tensor:
        table = torch.full((self.atom.size, slots, len(labels)), -1)
        for (kv, slot), coordinates in indices.items():
            for label, (at, *_) in coordinates.items():
                if label not in labels:
                    raise Unmapped(
                        f"{what} heads are not in the order in which they are attended to"
                    )
                table[kv, slot, labels[label]] = at
        if bool((table < 0).any()):
            raise Unmapped(f"{what} heads do not hold all coordinates")
        return table

    def _in_matrix(
        self, what: str, name: str, dim: int, table: Tensor, takes_in: bool
    ) -> Projection:
        """Return `table` as rows (or columns) of the one matrix that holds these indices."""
        weight = self.types.program.weights[name]
        shape = [1] * weight.ndim
        shape[dim] = -1
        index = torch.arange(weight.shape[dim]).view(shape).expand(weight.shape)
        for matrix in self.held.matrices:
            if matrix.weight != name or matrix.shape[0] != 1 or len(matrix.uses) != 1:
                continue
            numbers = matrix.read(index)[0]
            numbers = numbers if takes_in else numbers.mT
            row = torch.full((weight.shape[dim],), -1)
            row[numbers[0]] = torch.arange(len(numbers[0]))
            indices = row[table]
            if bool((numbers == numbers[0]).all()) and bool((indices >= 0).all()):
                bias = "" if takes_in else bias_of(self.types.program, matrix)
                return Projection(matrix, bias, indices)
        raise Unmapped(f"{name}, which holds its {what} heads, is no matrix that is used once")

    # -- operands -------------------------------------------------------------------------------

    def _operand(self, node: fx.Node, labels: Mapping[Label, int], width: Axis) -> Operand:
        axes, type_ = self.types.axes, self.types.axes_of[node]
        slots = math.prod(atom.size for atom in self.slots)
        dims = [dim for dim, axis in enumerate(type_) if axes.same(axis, width)]
        over = [dim for dim, axis in enumerate(type_) if self.atom in set(axes.atoms(axis))]
        plain = len(type_) == 4 and len(dims) == len(over) == 1
        if not plain or self.types.is_dynamic(type_[over[0]]):
            where = f"{node.target} in {module_path(node)}"
            raise Unmapped(f"batch, heads and coordinates are not told apart at {where}")
        table = torch.full((self.atom.size, slots), -1)
        units = units_along(self.types, type_[over[0]], self.atom).tolist()
        spread = bool(set(self.slots) & set(axes.atoms(type_[over[0]])))
        slot = self._slot_along(type_[over[0]]).tolist()
        for at, unit in enumerate(units):
            table[unit, slot[at] if spread else slice(None)] = at
        if bool((table < 0).any()):
            raise Unmapped("attention reads heads that no query has")
        order = torch.empty(len(labels), dtype=torch.long)
        for label, at in self._labels(type_[dims[0]]).items():
            order[labels[label]] = at
        return Operand(node, (over[0], table), (dims[0], order))
