"""The indices of each unit in the weights of its group, and the operators that sum over units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphprune.analysis.groups import Group, unit_numbers
from graphprune.analysis.index_maps import unit_indices
from graphprune.analysis.matrices import Matrix
from graphprune.plan.index_map import IndexMap


def sum_units(line: Tensor, group: Group, member: IndexMap) -> Tensor:
    """Sum scores along a dimension over the slice of every unit: ``[*parents' sizes, size]``."""
    if member.owner is not None:
        return line.new_zeros(group.size).index_fill(
            0, torch.tensor(member.owner, device=line.device), line.sum()
        )
    units = line[unit_indices(member, group.size)]
    keep = [member.outer_groups.index(parent) for parent in group.parents]
    gone = [dim for dim in range(units.ndim) if dim not in (*keep, units.ndim - 2)]
    order = sorted(keep)
    return units.sum(gone).permute(*(order.index(dim) for dim in keep), len(keep))


def consumers(
    weights: Mapping[str, Tensor], sizes: Sequence[int], group: Group, matrices: Sequence[Matrix]
) -> list[tuple[Matrix, Tensor]]:
    """Return those of `matrices` that sum over `group`, with the unit of each column, or -1.

    Units are ``[parts, in]``. `sizes` are the sizes of the parents of `group`, and its own.
    """
    found = []
    for matrix in matrices:
        weight = weights[matrix.weight]
        for member in group.members:
            if member.weight != matrix.weight:
                continue
            line = unit_numbers(sizes, group, member, weight.shape[member.dim])
            shape = [1] * weight.ndim
            shape[member.dim] = len(line)
            units = matrix.read(line.view(shape).expand(weight.shape).contiguous())
            if bool((units[:, :1] == units).all()) and bool((units >= 0).any()):
                found.append((matrix, units[:, 0]))
    return found
