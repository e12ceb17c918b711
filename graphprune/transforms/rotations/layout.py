"""Where the units of a group lie in a weight, copy by copy, and in the matrices of that weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.index_maps import unit_indices
from graphprune.analysis.matrices import Matrix
from graphprune.analysis.mixing.mixable import Mixable
from graphprune.analysis.mixing.places import Unmixable
from graphprune.ir.program import Program
from graphprune.plan.index_map import IndexMap


@dataclass(frozen=True)
class Copies:
    """All units of a group, each time that they occur along a dimension of a weight.

    Parameters
    ----------
    indices
        ``[copies, units]``, along the dimension.
    parents
        ``[copies]``: the units of the group's parents that each copy is under, as one number.
    """

    indices: Tensor
    parents: Tensor

    @classmethod
    def of(cls, coupling: Coupling, group: Group, member: IndexMap) -> Copies:
        """Return those of one member of `group`."""
        found = unit_indices(member, group.size).transpose(-1, -2)  # [*loops, width, units]
        parents = torch.zeros(found.shape[:-1], dtype=torch.long)
        for name, size in zip(group.parents, coupling.sizes(group), strict=False):
            loop = member.outer_groups.index(name)
            shape = [size if dim == loop else 1 for dim in range(parents.ndim)]
            parents = parents * size + torch.arange(size).view(shape)
        return cls(found.flatten(0, -2), parents.flatten())

    def within(self, line: Tensor, size: int) -> Copies:
        """Return those that lie on a line, by their places there.

        Parameters
        ----------
        line
            ``[n]``: the index along the dimension at each place.
        size
            The size of the dimension.
        """
        position = torch.full((size,), -1)
        position[line] = torch.arange(len(line))
        placed = position[self.indices]
        inside = (placed >= 0).all(1)
        return Copies(placed[inside], self.parents[inside])

    def mix(self, weight: Tensor, dim: int, by: Tensor) -> None:
        """Replace the units along a dimension of `weight` by combinations of them, in place.

        Parameters
        ----------
        weight
            Its values.
        dim
            The dimension.
        by
            ``[parents, units, units]``: column j has how much of each old unit the new unit j is.
        """
        rows = weight.movedim(dim, 0)
        for indices, parent in zip(self.indices, self.parents.tolist(), strict=True):
            old = rows[indices]
            rows[indices] = (by[parent].mT @ old.reshape(len(old), -1)).view(old.shape)

    def add_blocks(self, total: Tensor, products: Tensor, scale: Tensor) -> None:
        """Add the products of pairs of units, copy by copy.

        Parameters
        ----------
        total
            ``[parents, units, units]``, added to in place.
        products
            ``[n, n]``, of all pairs of indices along the dimension.
        scale
            ``[parents, units]``: what each unit is multiplied by before.
        """
        for indices, parent in zip(self.indices, self.parents.tolist(), strict=True):
            factors = torch.outer(scale[parent], scale[parent])
            total[parent] += factors * products[indices[:, None], indices]


@dataclass(frozen=True)
class Diagonal:
    """The gains of a group, by which bases of its members differ.

    Parameters
    ----------
    shape
        ``(parents, units)``.
    gains
        Name of a gain -> what it multiplies each unit by, of that shape.
    """

    shape: tuple[int, int]
    gains: Mapping[str, Tensor]

    @classmethod
    def of(cls, program: Program, coupling: Coupling, mixable: Mixable) -> Diagonal:
        """Read the gains of a group.

        Raises
        ------
        Unmixable
            When they differ among units that are mixed alike.
        """
        *parents, units = coupling.sizes(mixable.group)
        shape, found = (math.prod(parents), units), dict[str, Tensor]()
        for member, basis in zip(mixable.group.members, mixable.bases, strict=True):
            if basis is not None:
                continue
            name, copies = member.weight, Copies.of(coupling, mixable.group, member)
            if sorted(copies.parents.tolist()) != list(range(shape[0])):
                (node,) = (n for each, n in program.weight_nodes() if each == name)
                raise Unmixable(f"{name} multiplies units differently that are mixed alike", node)
            weight = program.take([name])[name].double().cpu()
            found[name] = weight[copies.indices[copies.parents.argsort()]] + mixable.gains[name]
        return cls(shape, found)

    def power(self, powers: Mapping[str, int], side: int = 1) -> Tensor:
        """Return the product of gains in some powers, or in their inverse: ``[parents, units]``.

        Where a gain is zero, so are all its powers: nothing passes there.
        """
        total = torch.ones(self.shape, dtype=torch.float64)
        for name, power in powers.items():
            gain = self.gains[name]
            raised = gain.abs().clamp(min=1e-30).pow(power * side) * gain.sign() ** abs(power)
            total *= torch.where(gain == 0, 0.0, raised)
        return total


def along(matrix: Matrix, shape: torch.Size, dim: int) -> tuple[Literal["in", "out", ""], Tensor]:
    """Return which side of a matrix a dimension of its weight is, and its index at each place.

    Parameters
    ----------
    matrix
        A matrix.
    shape
        That of its weight.
    dim
        The dimension of the weight.

    Returns
    -------
    tuple
        "in" or "out" with the indices along ``in`` or ``out``; "" where it is neither alone.
    """
    step, size = math.prod(shape[dim + 1 :]), shape[dim]

    def indices(dims: range) -> Tensor:
        offsets = torch.tensor(matrix.view.storage_offset())
        for at in dims:
            steps = torch.arange(matrix.view.shape[at]) * matrix.view.stride(at)
            offsets = offsets[..., None] + steps
        return (offsets.flatten() // step) % size

    sides = {
        "": indices(range(matrix.outer)),
        "out": indices(range(matrix.outer, matrix.outer + 1)),
        "in": indices(range(matrix.outer + 1, matrix.view.ndim)),
    }
    moving = [side for side, found in sides.items() if bool((found != found[0]).any())]
    if moving == ["in"]:
        return "in", sides["in"]
    if moving == ["out"]:
        return "out", sides["out"]
    return "", sides[""]
