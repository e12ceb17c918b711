"""Wanda's score as a criterion for groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from graphprune.analysis.matrices import contractions
from graphprune.calibration.statistics import observe
from graphprune.criteria.base import ScoringContext
from graphprune.criteria.weights import Measure, WeightCriterion
from graphprune.transforms.sparsity import wanda_scores


class Wanda(WeightCriterion):
    """Weights times the norms of their inputs: sum of |w| ||x|| over the slice.

    The score of Wanda (Sun et al. 2306.11695, equation 1) for single weights, summed over what a
    unit takes with it. A weight that no activation is multiplied with (a bias) counts by itself.
    """

    name = "wanda"
    measure: ClassVar[Measure] = "l1"
    requires_calibration = True

    def elements(
        self, context: ScoringContext, names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the product |w| ||x||."""
        held = [m for m in contractions(context.program).matrices if m.weight in names]
        found = observe(context.program, held, context.data(), track=context.track)
        for name in names:
            weight = context.weight(name)
            scores = weight.float().abs()
            for matrix in held:
                if matrix.weight == name:
                    values = wanda_scores(matrix.read(weight), found[matrix.name])
                    scores = matrix.write(scores, values)
            yield name, scores
