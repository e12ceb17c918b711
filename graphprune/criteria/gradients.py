"""Gradients of the loss on calibration data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from graphprune.calibration.backward import BackwardWalk
from graphprune.calibration.data import inputs_of
from graphprune.calibration.logits import Logits
from graphprune.calibration.losses import check_task, task_loss
from graphprune.criteria.base import ScoringContext
from graphprune.errors import CalibrationError, SelectionError


def loss_gradients(context: ScoringContext, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, gradient) of the mean `task_loss` on the calibration batches.

    Gradients are taken of the weights called `names` only, and given away one by one, a segment's
    after the other.

    Raises
    ------
    CalibrationError
        Without calibration batches, or when they do not fit the program or the loss is not finite.
    """
    data = context.data()
    yield from loss_walk(context, list(data.labeled()), names).run(track=context.track)


def sample_gradients(
    context: ScoringContext, names: Sequence[str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, mean gradient, mean squared gradient) over single samples.

    Raises
    ------
    CalibrationError
        As `loss_gradients` does.
    """
    data = context.data()

    def fold(held: tuple[Tensor, Tensor] | None, gradient: Tensor) -> tuple[Tensor, Tensor]:
        total, squares = held or (torch.zeros_like(gradient), torch.zeros_like(gradient))
        total.add_(gradient, alpha=1 / data.samples)
        return total, squares.addcmul_(gradient, gradient, value=1 / data.samples)

    walk = loss_walk(context, list(data.singly()), names, mean=False)
    for name, (total, squares) in walk.run(fold, track=context.track):
        yield name, total, squares


def loss_walk(
    context: ScoringContext,
    batches: Sequence[Mapping[str, Tensor]],
    names: Collection[str] = (),
    nodes: Collection[fx.Node] = (),
    beside: Collection[fx.Node] = (),
    *,
    mean: bool = True,
) -> BackwardWalk:
    """Return the walk that differentiates the `task_loss` of batches, or the mean over samples.

    Raises
    ------
    SelectionError
        When a weight in `names` has no gradient.
    CalibrationError
        As `check_task` does.
    """
    program = context.program
    for name in names:
        if not program.weights[name].is_floating_point():
            raise SelectionError(
                f"{name} is of {program.weights[name].dtype}, which has no gradient"
            )
    for batch in batches[:1]:
        check_task(program, batch)
    counts = [len(next(iter(batch.values()))) for batch in batches]

    def loss(logits: Logits, number: int) -> Tensor:
        loss = finite_loss(logits, batches[number])
        return loss * (counts[number] / sum(counts)) if mean else loss

    inputs = [inputs_of(batch) for batch in batches]
    return BackwardWalk(program, inputs, loss, names, nodes, beside)


def finite_loss(logits: Tensor | Logits, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the `task_loss` of a batch; refuse (`CalibrationError`) one that is not finite."""
    loss = task_loss(logits, batch)
    if not bool(torch.isfinite(loss)):
        raise CalibrationError("the loss on the calibration data is not finite")
    return loss
