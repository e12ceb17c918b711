"""Bringing channels into the order in which n of every m neighbors lose least.

Which channels are neighbors is free wherever the analysis lets their axis lose units one by one:
what makes them is permuted alike, so that the program gives what it gave. Channel permutations for
n:m sparsity: Pool and Yu, NeurIPS 2021; a start that spreads what matters over the blocks, and
blocks that are then exchanged as a linear assignment: Zhang et al., "Plug-and-Play", ICLR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from graphprune.analysis.axes import Atom
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.index_maps import units_along
from graphprune.analysis.matrices import Matrix
from graphprune.plan.steps import Permutation
from graphprune.transforms.heads.layout import reorder_units
from graphprune.transforms.sparsity import Pattern

_AT_MOST = 2 * 10**9
"""Comparisons of a channel with a block, row by row, in one assignment; past that some of the rows,
evenly spaced, stand for all."""

_ROUNDS, _ENOUGH = 20, 1e-4
"""Rounds of assignments at most, and the part of what is kept by which one has to keep more."""


@dataclass(frozen=True, eq=False)
class FreeAxis:
    """An axis whose channels may come in any order, and the matrices that sum over it.

    Parameters
    ----------
    name
        The coupled group that its channels are.
    atom
        The axis.
    matrices
        Each sums over the axis once or several times (such as for each head), each time over all of
        its channels in their order.
    """

    name: str
    atom: Atom
    matrices: tuple[Matrix, ...]

    def rows(self, scores: Callable[[Matrix], Tensor], pattern: Pattern) -> Tensor:
        """Return scores as ``[rows, channels]``, those of each matrix 1 together.

        Parameters
        ----------
        scores
            Gives those of the elements of a matrix, ``[parts, out, in]``.
        pattern
            How many of how many neighbors stay.
        """
        blocks = self.atom.size // pattern.of
        count = sum(math.prod(matrix.shape) // self.atom.size for matrix in self.matrices)
        every = -(-count * blocks**2 // _AT_MOST)
        found = []
        for matrix in self.matrices:
            rows = scores(matrix).float().reshape(-1, self.atom.size)[::every]
            found.append(rows / rows.sum().clamp(min=1e-30))
        return torch.cat(found)


def free_axes(coupling: Coupling, matrices: Sequence[Matrix], pattern: Pattern) -> list[FreeAxis]:
    """Return the axes whose channels may be permuted, where `matrices` are to keep n of m.

    Those that are not divided into at least two blocks of m are left out.
    """
    found: dict[Atom, list[Matrix]] = {}
    for matrix in matrices:
        atom = _summed(coupling, matrix)
        if atom is not None and atom.size % pattern.of == 0 and atom.size > pattern.of:
            found.setdefault(atom, []).append(matrix)
    named = {atom: coupling.group_of(atom) for atom in found}
    return [
        FreeAxis(group.name, atom, tuple(found[atom]))
        for atom, group in named.items()
        if group is not None
    ]


def _summed(coupling: Coupling, matrix: Matrix) -> Atom | None:
    """Return the innermost axis that a matrix sums over, if its channels may be permuted."""
    types = coupling.types
    type_ = types.weight(matrix.weight)
    size = [axis.size for axis in type_]
    for dim, axis in enumerate(type_):
        shape = [1] * len(size)
        shape[dim] = -1
        along = matrix.read(torch.arange(size[dim]).view(shape).expand(size))
        if not bool((along == along[:1, :1]).all()):
            continue  # this dimension is the outputs', or the parts'
        for atom in types.axes.atoms(axis):
            if coupling.group_of(atom) is None:
                continue
            units = units_along(types, axis, atom)[along[0, 0]]
            if len(units) % atom.size == 0:
                repeats = units.view(-1, atom.size)
                if bool((repeats == torch.arange(atom.size)).all()):
                    return atom
    return None


def reordered(coupling: Coupling, axis: FreeAxis, order: Tensor) -> tuple[Permutation, ...]:
    """Return how weights are permuted so that channel ``order[i]`` of an axis is the i-th."""
    return reorder_units(coupling.types, axis.atom, order.tolist())


def kept(rows: Tensor, order: Tensor, pattern: Pattern) -> float:
    """Return the sum of the scores that stay in every block.

    Parameters
    ----------
    rows
        ``[rows, channels]``.
    order
        ``[channels]``: which channel comes at each place.
    pattern
        How many of how many neighbors stay.

    Examples
    --------
    >>> rows = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    >>> kept(rows, torch.arange(4), Pattern.parse("1:2")), kept(
    ...     rows, torch.tensor([0, 2, 1, 3]), Pattern.parse("1:2")
    ... )
    (6.0, 7.0)
    """
    blocks = rows[:, order].unflatten(1, (-1, pattern.of))
    return float(blocks.topk(pattern.kept, dim=-1).values.sum(dtype=torch.float64))


def best_order(rows: Tensor, pattern: Pattern) -> Tensor:
    """Return the order of channels found to keep most, ``[channels]``; theirs if none keeps more.

    From a start in which each block has as much of what matters, one channel of every block is
    given to the block in which it adds most, all at once (a linear assignment), in turns.

    Parameters
    ----------
    rows
        Scores, ``[rows, channels]``.
    pattern
        How many of how many neighbors stay.
    """
    table = _spread(rows, pattern.of)
    most = kept(rows, table.flatten(), pattern)
    for _ in range(_ROUNDS):
        for place in range(pattern.of):
            others = torch.cat([table[:, :place], table[:, place + 1 :]], 1)
            table[:, place] = table[_assigned(rows, others, table[:, place], pattern), place]
        now = kept(rows, table.flatten(), pattern)
        if now - most <= _ENOUGH * most:
            break
        most = now
    order, same = table.sort(1).values, torch.arange(rows.shape[1], device=rows.device)
    order = order[order[:, 0].argsort()].flatten()
    return order if kept(rows, order, pattern) > kept(rows, same, pattern) else same


def _spread(rows: Tensor, width: int) -> Tensor:
    """Return channels dealt to blocks, ``[blocks, width]``, from the largest sum on, to and fro."""
    dealt = rows.sum(0).argsort(descending=True).view(width, -1)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.mT.contiguous()


def _assigned(rows: Tensor, others: Tensor, given: Tensor, pattern: Pattern) -> Tensor:
    """Return which of the channels `given` goes to each block, which holds `others` already.

    A channel adds to what a block keeps what it has above the last of the others that stay.
    """
    last = rows[:, others].topk(pattern.kept, dim=-1).values[..., -1]
    offered = rows[:, given]
    gain = torch.zeros(len(others), len(given))
    for block, bar in enumerate(last.unbind(1)):
        gain[block] = (offered - bar[:, None]).clamp(min=0).sum(0).cpu()
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1]).to(given.device)
