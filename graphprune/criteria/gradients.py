"""Gradients of the loss on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from graphprune.calibration.data import inputs_of
from graphprune.calibration.logits import Logits, run_to_logits
from graphprune.calibration.losses import task_loss
from graphprune.criteria.base import ScoringContext
from graphprune.errors import CalibrationError, SelectionError
from graphprune.ir.program import Program


def loss_gradients(context: ScoringContext, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, gradient) of the mean `task_loss` on the calibration batches.

    Gradients are taken of the weights called `names` only, and given away one by one.

    Raises
    ------
    CalibrationError
        Without calibration batches, or when they do not fit the program or the loss is not finite.
    """
    data = context.data()
    batches = context.track(list(data.labeled()), "taking gradients")
    yield from _gradients(context.program, batches, data.samples, names)


def sample_gradients(
    context: ScoringContext, names: Sequence[str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, mean gradient, mean squared gradient) over single samples.

    Raises
    ------
    CalibrationError
        As `loss_gradients` does.
    """
    data, weights = context.data(), context.program.weights
    total = {name: torch.zeros_like(weights[name]) for name in names}
    squares = {name: torch.zeros_like(weights[name]) for name in names}
    for sample in context.track(list(data.singly()), "taking gradients"):
        for name, gradient in _gradients(context.program, [sample], 1, names):
            total[name].add_(gradient, alpha=1 / data.samples)
            squares[name].addcmul_(gradient, gradient, value=1 / data.samples)
    for name in names:
        yield name, total.pop(name), squares.pop(name)


def _gradients(
    program: Program, batches: Iterable[Mapping[str, Tensor]], samples: int, names: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, gradient) of the mean loss on `batches`, `samples` samples together."""
    weights = {name: weight.detach() for name, weight in program.weights.items()}
    for name in names:
        if not weights[name].is_floating_point():
            raise SelectionError(f"{name} is of {weights[name].dtype}, which has no gradient")
    leaves = {name: weights[name].requires_grad_() for name in names}
    for batch in batches:
        with torch.enable_grad():
            logits = run_to_logits(program, inputs_of(batch), weights=weights)
            rows = len(next(iter(batch.values())))
            loss = finite_loss(logits, batch) * (rows / samples)
        loss.backward()
    for name, leaf in leaves.items():
        gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        leaf.grad = None
        yield name, gradient.detach()


def finite_loss(logits: Tensor | Logits, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the `task_loss` of a batch; refuse (`CalibrationError`) one that is not finite."""
    loss = task_loss(logits, batch)
    if not bool(torch.isfinite(loss)):
        raise CalibrationError("the loss on the calibration data is not finite")
    return loss
