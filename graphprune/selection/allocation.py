"""Measure the loss as ever more of each group is masked, so that unlike groups can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from graphprune import ranks
from graphprune.analysis.groups import Group
from graphprune.calibration.data import Calibration, inputs_of, own_batches
from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.losses import check_task, task_loss
from graphprune.criteria import Scores, ScoringContext
from graphprune.errors import SelectionError
from graphprune.ir.interpreter import Compute, call
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.selector import lowest_units

LEVELS = 8
"""In how many parts a group is taken away while its loss is measured."""


def loss_margins(
    context: ScoringContext, scores: Scores, levels: int = LEVELS
) -> dict[str, Tensor]:
    """Measure what each next unit of a group adds to the loss on the calibration data.

    Ever more units of one group, the least important first, are masked (their weights are zero, as
    they are in the reference that a removal is verified against) while all else stays whole. Where
    the loss grows more slowly later than before, both parts count at their mean, so that a greedy
    choice over groups is the best one for the curves as measured; what groups do to each other is
    not measured. This costs a run over the data for each group and level.

    Parameters
    ----------
    context
        The program, its coupling, the groups and the calibration data.
    scores
        Which units of each group go first.
    levels
        In how many equal parts a group is taken away.

    Returns
    -------
    dict
        Group name -> nats per unit, in the order in which they go, ``[size]``; never falling.

    Raises
    ------
    CalibrationError
        When there is no data, it does not fit, or it has no loss (`check_task`).
    SelectionError
        For a group whose removal does not equal zeroing weights.
    """
    data, program = context.data(), context.program
    for group in context.groups:
        if not group.is_zeroing:
            raise SelectionError(
                f"{group.name} ({group.role}, {group.exactness}): its removal is no zeroing of "
                "weights, so its loss cannot be measured by masking"
            )
    check_task(program, next(iter(data.labeled())))
    losses, fingerprint = [mean_loss(program, data)], program.fingerprint()
    runs = [(group, count) for group in context.groups for count in _counts(group, levels)]
    for group, count in context.track(runs, "measuring the loss of groups"):
        cut = group.cut(lowest_units(scores[group.name], count))
        plan = Plan((Step(fingerprint, (cut,)),))
        masked = program.with_weights(plan.masked(program.weights))
        losses.append(mean_loss(masked, data))
    measured = torch.tensor(losses, dtype=torch.float64)
    ranks.sum_of([measured])
    whole, *others = measured.tolist()
    points: dict[str, list[tuple[int, float]]] = {g.name: [(0, 0.0)] for g in context.groups}
    for (group, count), loss in zip(runs, others, strict=True):
        points[group.name].append((count, loss - whole))
    return {group.name: _slopes(points[group.name], group.size) for group in context.groups}


def _counts(group: Group, levels: int) -> Sequence[int]:
    """Return how many units of a group are masked, up to all that may go."""
    most = group.size - group.min_units
    return sorted({round(most * level / levels) for level in range(1, levels + 1)} - {0})


def mean_loss(
    program: Program, data: Calibration, compute: Compute = call, every: int = 1
) -> float:
    """Return the mean loss over the samples of `data`, as far as this process runs them.

    Parameters
    ----------
    program, data
        What is run, on what.
    compute
        Makes the values of nodes.
    every
        One of so many predictions of a batch counts.
    """
    total, labeled = 0.0, list(data.labeled())
    batches = [labeled[at] for at in own_batches(labeled)]
    inputs = [inputs_of(batch) for batch in batches]
    given = logits_of_all(program, inputs, compute=lambda: compute)
    for batch, logits in zip(batches, given, strict=True):
        with torch.no_grad():
            total += task_loss(logits, batch, every).item() * len(next(iter(batch.values())))
    return total / data.samples


def _slopes(points: Sequence[tuple[int, float]], size: int) -> Tensor:
    """Return the slopes of the lower convex hull of a rising curve, one for each unit."""
    hull: list[tuple[int, float]] = []
    highest = 0.0
    for count, loss in points:
        highest = max(highest, loss)  # a loss that falls is a unit for free
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (count, highest)):
            hull.pop()
        hull.append((count, highest))
    slopes = torch.zeros(size, dtype=torch.float64)
    for left, right in pairwise(hull):
        slopes[left[0] : right[0]] = _slope(left, right)
    slopes[hull[-1][0] :] = slopes[hull[-1][0] - 1] if len(hull) > 1 else 0.0
    return slopes


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
