"""Optimal brain surgeon as a criterion for groups."""

from __future__ import annotations

import math

import torch

from graphprune.calibration.statistics import observe
from graphprune.criteria.base import Criterion, Scores, ScoringContext
from graphprune.transforms.refit import removal_errors


class Obs(Criterion):
    """What the consumers of a group lose when the unit leaves and the rest is refitted.

    Optimal brain surgeon on each consumer's output (Hassibi and Stork 1993, equation 5), greedily:
    units leave in small batches, the cheapest first, and the score of a unit is the squared error
    that its leaving adds, summed over consumers' outputs and tokens. Unlike the other criteria it
    knows which units can stand for each other; `reconstruct` then makes the refit real.
    """

    name = "obs"
    requires_calibration = True

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
        scores: Scores = {}
        for group in context.track(context.groups, "scoring groups"):
            total = torch.zeros(math.prod(context.sizes(group)), dtype=torch.float64)
            for matrix, units in held[group.name]:
                weight = matrix.read(context.program.weights[matrix.weight])
                gram = found[matrix.name].gram
                assert gram is not None
                for part in range(len(weight)):
                    if bool((units[part] >= 0).any()):
                        errors = removal_errors(weight[part], gram[part], units[part])
                        total[: len(errors)] += errors
            scores[group.name] = total.view(context.sizes(group))
        return scores
