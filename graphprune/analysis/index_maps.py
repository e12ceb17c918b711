"""Index maps as tensors: which indices of a dimension belong to which unit of an atom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from graphprune.analysis.axes import Atom, Axis, Occurrence
from graphprune.analysis.typed_graph import TypedGraph
from graphprune.plan.index_map import IndexMap


def unit_indices(found: Occurrence | IndexMap, units: int) -> Tensor:
    """Return the indices of every unit: ``[*outer loops, units, width]``."""
    if isinstance(found, IndexMap):
        width, loops = found.width, found.outer
    else:
        width = found.inner
        loops = tuple((axis.size, stride) for axis, stride in found.outer)
    indices = torch.tensor(found.offset)
    for size, stride in (*loops, (units, width), (width, 1)):
        indices = indices[..., None] + torch.arange(size) * stride
    return indices


def indices_by_unit(occurrence: Occurrence) -> Tensor:
    """Return the indices of every unit of an occurrence as rows: ``[units, n]``."""
    return unit_indices(occurrence, occurrence.atom.size).movedim(-2, 0).flatten(1)


def units_along(types: TypedGraph, axis: Axis, atom: Atom) -> Tensor:
    """Return the unit of `atom` that each index of `axis` belongs to, or -1."""
    found = torch.full((types.axes.head(axis).size,), -1)
    for occurrence in types.axes.occurrences(axis):
        if occurrence.atom is atom:
            found[indices_by_unit(occurrence)] = torch.arange(atom.size)[:, None]
    return found


def weight_occurrences(types: TypedGraph) -> Iterator[tuple[str, int, int, Occurrence]]:
    """(weight, dim, its size, occurrence) of all atoms in all weights, in their order."""
    for name, node in types.program.weight_nodes():
        for dim, axis in enumerate(types.axes_of[node]):
            for occurrence in types.axes.occurrences(axis):
                yield name, dim, axis.size, occurrence


def index_map(
    weight: str, dim: int, extent: int, occurrence: Occurrence, names: Mapping[Axis, str]
) -> IndexMap:
    """Return an occurrence as a member of a group, where groups are called by `names`."""
    return IndexMap(
        weight,
        dim,
        occurrence.offset,
        occurrence.inner,
        extent,
        tuple((axis.size, stride) for axis, stride in occurrence.outer),
        tuple(names.get(axis) for axis, _ in occurrence.outer),
    )
