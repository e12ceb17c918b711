"""Optimal brain surgeon as a criterion for groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from graphprune import ranks
from graphprune.analysis.groups import Group
from graphprune.calibration.damping import damped, validated_damp
from graphprune.calibration.statistics import observe, tokens_for_gram
from graphprune.criteria.base import Criterion, Scores, ScoringContext
from graphprune.ir.program import Program


class Obs(Criterion):
    """The loss of the consumers of a group when the unit leaves and the rest is refitted.

    Optimal brain surgeon on each consumer's output (Hassibi and Stork 1993, equation 5), greedily:
    units leave in small batches, the cheapest first, and the score of a unit is the squared error
    that its leaving adds, summed over consumers' outputs and tokens. Unlike the other criteria it
    knows which units can stand for each other; `reconstruct` then makes the refit real.
    """

    name = "obs"
    requires_calibration = True

    def tokens_needed(self, program: Program) -> int:
        """Return the tokens that a least squares fit needs."""
        return tokens_for_gram(program)

    def scores(self, context: ScoringContext) -> Scores:
        """Remove greedily in the consumers of every group.

        Raises
        ------
        SelectionError
            When nothing sums over a group.
        """
        data, held = context.data(), context.consumers(self.name)
        needed = {m.name: m for each in held.values() for m, _ in each}
        given = context.program, list(needed.values()), data
        found = observe(*given, "gram", track=context.track)

        def score(group: Group) -> Tensor:
            total = torch.zeros(math.prod(context.sizes(group)), dtype=torch.float64)
            for matrix, units in held[group.name]:
                weight = matrix.read(context.weight(matrix.weight))
                seen = found[matrix.name]
                assert seen.gram is not None
                for part, (each, gram) in enumerate(zip(weight.double(), seen.gram, strict=True)):
                    own = (units[part] >= 0).to(each.device)
                    if bool(own.any()):
                        least = _least(each, gram, own)
                        damp = validated_damp(each, seen, part, least)
                        errors = removal_errors(each, gram, units[part], damp=damp)
                        total[: len(errors)] += errors.cpu()
            return total.view(context.sizes(group))

        def track(groups: Sequence[Group]) -> Iterable[Group]:
            return context.track(groups, "scoring groups")

        scores = ranks.each_once(context.groups, score, track)
        return {group.name: each for group, each in zip(context.groups, scores, strict=True)}


def _least(weight: Tensor, gram: Tensor, own: Tensor) -> Tensor:
    """Return the quarter of the columns `own` that cost least one by one: a mask, ``[in]``."""
    costs = (weight.square().sum(0) * gram.diagonal()).masked_fill(~own, torch.inf)
    gone = torch.zeros_like(own)
    gone[costs.argsort()[: int(own.sum()) // 4]] = True
    return gone


def removal_errors(
    weight: Tensor, gram: Tensor, units: Tensor, batches: int = 64, damp: float = 0.01
) -> Tensor:
    """Return what each unit costs when they leave in small batches and the rest is refitted.

    Optimal brain surgeon (Hassibi and Stork 1993, equation 5) for sets of columns S: leaving costs
    tr(W_S (H^-1_SS)^-1 W_Sᵀ), and what stays takes -W_S (H^-1_SS)^-1 H^-1_S: up.

    Parameters
    ----------
    weight
        ``[out, in]``.
    gram
        ``[in, in]``: the sum of x xᵀ over the inputs, H up to a factor.
    units
        ``[in]``: which unit each column belongs to, or -1.
    batches
        In how many batches units leave.
    damp
        What is added to the diagonal of `gram`, as a part of its mean.

    Returns
    -------
    Tensor
        ``[units]``, float64, never less than the cost of a unit that left before.
    """
    count, units = int(units.max()) + 1, units.to(weight.device)
    weight = weight.double().clone()
    inverse = torch.linalg.inv(damped(gram.double(), damp))
    columns = [(units == unit).nonzero().flatten() for unit in range(count)]
    single = torch.cat(columns) if all(len(each) == 1 for each in columns) else None
    costs = weight.new_zeros(count)
    left = torch.ones_like(costs, dtype=torch.bool)
    floor = 0.0
    while bool(left.any()):
        errors = torch.full_like(costs, torch.inf)
        if single is not None:
            errors = weight[:, single].square().sum(0) / inverse.diagonal()[single]
        else:
            for unit in left.nonzero().flatten().tolist():
                at = columns[unit]
                held = weight[:, at]
                errors[unit] = (torch.linalg.solve(inverse[at][:, at], held.mT) * held.mT).sum()
        errors = errors.masked_fill(~left, torch.inf)
        leaving = errors.argsort()[: max(1, count // batches)]
        leaving = leaving[left[leaving]]
        costs[leaving] = errors[leaving].clamp(min=floor)
        floor = float(costs[leaving].max())
        left[leaving] = False
        gone = torch.cat([columns[unit] for unit in leaving.tolist()])
        block = inverse[gone]
        factor = torch.linalg.solve(block[:, gone], block)
        weight -= weight[:, gone] @ factor
        inverse = inverse - block.mT @ factor
        # The columns that are gone are out of the problem; a unit diagonal keeps it regular.
        inverse[gone], inverse[:, gone], weight[:, gone] = 0, 0, 0
        inverse[gone, gone] = 1
    return costs
