"""Criteria on the loss's gradient at single weights: LLM-Pruner's Taylor expansions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from graphprune.criteria.base import ScoringContext
from graphprune.criteria.gradients import loss_gradients, sample_gradients
from graphprune.criteria.weights import Measure, WeightCriterion


class Taylor(WeightCriterion):
    """First-order Taylor expansion of the loss, element-wise: sum of |g w| over the slice.

    LLM-Pruner (Ma et al. 2305.11627, equation 4, "Element^1"): the change of the next-token loss on
    the calibration text when a weight is set to zero, to first order. The gradient is that of the
    mean loss over all calibration samples.
    """

    name = "taylor"
    measure: ClassVar[Measure] = "l1"
    requires_calibration = True
    comparable = True

    def elements(
        self, context: ScoringContext, names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the product g w."""
        for name, gradient in loss_gradients(context, names):
            yield name, gradient.mul_(context.weight(name))


class TaylorVector(Taylor):
    """First-order Taylor expansion of the loss, vector-wise: |sum of g w| over the slice.

    LLM-Pruner (Ma et al. 2305.11627, equation 3, "Vector"): signs cancel within a slice.
    """

    name = "taylor-vector"
    measure = "sum"

    def finish(self, total: Tensor) -> Tensor:
        """Take the absolute value after the sum."""
        return total.abs()


class TaylorSecond(Taylor):
    """Second-order term of the loss's Taylor expansion, element-wise: sum of w F w over the slice.

    F is the diagonal of the empirical Fisher matrix, the mean over the calibration samples of the
    squared gradient of each sample's loss, in place of the Hessian's (LLM-Pruner, Ma et al.
    2305.11627, section 3.2, "Element^2"; its code leaves the factor 1/2 out as well, which moves no
    rank).
    """

    name = "taylor-second"

    def elements(
        self, context: ScoringContext, names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the product w F w."""
        for name, _, fisher in sample_gradients(context, names):
            yield name, fisher.mul_(context.weight(name).square())


class TaylorMixed(Taylor):
    """First and second order together, element-wise: sum of |g w - 1/2 w F w| over the slice.

    LLM-Pruner (Ma et al. 2305.11627, equation 5), with F as in `TaylorSecond`.
    """

    name = "taylor-mixed"

    def elements(
        self, context: ScoringContext, names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the difference g w - 1/2 w F w."""
        for name, gradient, fisher in sample_gradients(context, names):
            weight = context.weight(name)
            yield name, gradient.mul_(weight).sub_(fisher.mul_(weight.square()), alpha=0.5)
