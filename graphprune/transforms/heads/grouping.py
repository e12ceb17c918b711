"""Choose the KV heads that become one, and reorder them so that they are neighbors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.analysis.attention.attentions import attentions_of
from graphprune.analysis.axes import Atom
from graphprune.analysis.types import Types
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path
from graphprune.plan.steps import Permutation
from graphprune.transforms.heads.kv_heads import Heads
from graphprune.transforms.heads.layout import Unmapped, head_atom, reorder_units

Groups = tuple[tuple[int, ...], ...]
"""Heads by number, those that become one together."""

_EXACT = 10_000
"""Ways to form groups up to which all are tried."""


@dataclass(frozen=True)
class Grouping:
    """The heads that become one, group by group.

    Parameters
    ----------
    groups
        Heads by number, those of each group.
    reordering
        How weights are permuted so that the heads of each group are neighbors.
    in_order
        Why the heads stay in their order although others would go better together, or "".
    """

    groups: Groups
    reordering: tuple[Permutation, ...] = ()
    in_order: str = ""

    @classmethod
    def cheapest(cls, types: Types, atom: Atom, costs: Tensor, groups: int) -> Grouping:
        """Group the heads that `atom` counts by the `costs` of sharing, ``[heads, heads]``."""
        found = cheapest(costs, groups)
        return cls(found, reorder_units(types, atom, list(itertools.chain(*found))))


def group_by_weights(program: Program, types: Types | None, heads: Heads, groups: int) -> Grouping:
    """Group `heads` without data: neighbors, or, given `types`, those of the most similar weights.

    Heads that may not be reordered stay in their order.
    """
    atom, why = reorderable(types, heads) if types and groups > 1 else (None, "")
    if types is None or atom is None:
        return Grouping(neighbors(heads.size, groups), in_order=why)
    costs = torch.zeros(heads.size, heads.size, dtype=torch.float64)
    for weight, dim, slices in heads.slices():
        rows = program.weights[weight].detach().double().movedim(dim, 0)
        if rows.ndim > 1:
            each = torch.stack([rows[at].flatten() for at in slices])
            far = torch.cdist(each, each).square() / each.square().sum().clamp(min=1e-150)
            costs += far.cpu()
    return Grouping.cheapest(types, atom, costs, groups)


def reorderable(types: Types, heads: Heads) -> tuple[Atom | None, str]:
    """Return the axis of `heads` and their queries if its units may be reordered, else why not."""
    try:
        atom = head_atom(types, heads)
    except Unmapped as why:
        return None, str(why)
    if len(attentions_of(types, atom)) > len(heads.attentions):
        return None, "another attention has its heads in the same order"
    if atom not in types.frozen:
        return atom, ""
    reason = types.frozen[atom]
    return None, f"{reason.why} at {reason.node.target} in {module_path(reason.node)}"


def neighbors(heads: int, groups: int) -> Groups:
    """Return runs of neighboring heads, as many as `groups`."""
    width = heads // groups
    return tuple(tuple(range(first, first + width)) for first in range(0, heads, width))


def cheapest(costs: Tensor, groups: int) -> Groups:
    """Return the equal groups whose heads cost the least to share, pair by pair.

    Parameters
    ----------
    costs
        ``[heads, heads]``: what it costs that two heads become one, symmetric.
    groups
        How many groups.

    Returns
    -------
    tuple
        Groups in order of their first heads. All ways are compared where there are at most ten
        thousand (8 heads have at most 105); else heads of neighbors are exchanged while that
        helps.
    """
    heads = len(costs)
    width = heads // groups
    table = costs.tolist()

    def cost(group: tuple[int, ...]) -> float:
        return sum(table[a][b] for a, b in itertools.combinations(group, 2))

    ways = math.factorial(heads) // (math.factorial(width) ** groups * math.factorial(groups))
    if ways <= _EXACT:
        every = _divided(tuple(range(heads)), width)
        return min(every, key=lambda way: sum(map(cost, way)))
    return _exchanged(neighbors(heads, groups), table)


def _divided(heads: tuple[int, ...], width: int) -> Iterator[Groups]:
    """Yield every way to divide `heads` into groups of `width`."""
    if not heads:
        yield ()
        return
    first, *rest = heads
    for others in itertools.combinations(rest, width - 1):
        left = tuple(head for head in rest if head not in others)
        for more in _divided(left, width):
            yield ((first, *others), *more)


def _exchanged(start: Groups, table: list[list[float]]) -> Groups:
    """Exchange heads of two groups, the best exchange first, while one helps."""
    groups = [list(group) for group in start]

    def beside(head: int, group: list[int], leaving: int) -> float:
        return sum(table[head][other] for other in group if other not in (head, leaving))

    while True:
        best: tuple[float, tuple[int, int, int, int]] | None = None
        for a, b in itertools.combinations(range(len(groups)), 2):
            for i, j in itertools.product(range(len(groups[a])), range(len(groups[b]))):
                one, two = groups[a][i], groups[b][j]
                change = beside(two, groups[a], one) - beside(one, groups[a], one)
                change += beside(one, groups[b], two) - beside(two, groups[b], two)
                if change < -1e-12 and (best is None or change < best[0]):
                    best = change, (a, i, b, j)
        if best is None:
            return tuple(sorted(tuple(sorted(group)) for group in groups))
        a, i, b, j = best[1]
        groups[a][i], groups[b][j] = groups[b][j], groups[a][i]
