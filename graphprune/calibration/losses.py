"""Losses of a program on calibration batches: cross entropy of labels or of next tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from graphprune.calibration.data import LABELS, inputs_of
from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.logits import Logits, RowLoss, as_logits
from graphprune.errors import CalibrationError
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.program import PRESENT, Program

Departure = Callable[[Logits, Logits, Mapping[str, Tensor]], Tensor]
"""Of an output of a program and of the original on a batch: how far each sample is off,
``[samples]``; not finite where all of it is padding."""

_INSTEAD = "give labels, or a criterion that needs no loss, such as criterion=wanda or criterion=l2"


def task_loss(logits: Tensor | Logits, batch: Mapping[str, Tensor], every: int = 1) -> Tensor:
    """Mean cross entropy of the labels of a batch, or without labels its `next_token_loss`.

    Parameters
    ----------
    logits
        ``[batch, classes]``, or ``[batch, ..., classes]`` with a label for each position.
    batch
        What the program was run on, with ``labels`` ``[batch]`` or ``[batch, ...]``; a label of
        -100 does not count.
    every
        One of so many predictions counts: logits of others are not computed.

    Returns
    -------
    Tensor
        A float32 scalar, in nats; differentiable.

    Raises
    ------
    CalibrationError
        When labels and logits do not belong together, or `next_token_loss` does so.

    Examples
    --------
    >>> batch = {"x": torch.ones(3, 5), "labels": torch.tensor([1, 7, 0])}
    >>> round(task_loss(torch.zeros(3, 8), batch).exp().item(), 3)
    8.0
    """
    logits = as_logits(logits)
    at, labels = (each[::every] for each in _targets(logits, batch))
    return logits.summed(at, cross_entropy(labels)) / len(at)


def check_task(program: Program, batch: Mapping[str, Tensor]) -> None:
    """Refuse a batch without labels where predicting its next tokens says nothing.

    Raises
    ------
    CalibrationError
        When the first output scores no tokens, as that of a decoder without a head, or what
        predicts a token depends on that token, as in a masked language model or an encoder.
    """
    if LABELS in batch:
        return
    if why := why_no_scores(program, program.outputs[0].name):
        raise CalibrationError(f"{why}, so that there is no next-token loss; {_INSTEAD}")
    if "decoder_input_ids" in batch or "input_ids" not in batch:
        return
    if not looks_back_only(program, batch):
        raise CalibrationError(
            "what the program gives for a token depends on the tokens after it, so that predicting "
            f"the next one says nothing; {_INSTEAD}"
        )


def why_no_scores(program: Program, output: str) -> str:
    """Say why `output` scores no tokens; "" where it may.

    What a transformers model gives is called by what it is, unlike the outputs of other modules.
    """
    if program.source is None or output == "logits":
        return ""
    return f"{output}, which {program.source.model_class.__name__} gives, scores no tokens"


def looks_back_only(program: Program, batch: Mapping[str, Tensor]) -> bool:
    """Tell whether the first output stays at all tokens of `batch` before one that changes.

    It does where it is nothing of single tokens.
    """
    ids = batch["input_ids"]
    if program.is_decoder or ids.ndim != 2:  # a decoder has a cache, which says so
        return True
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    last = real.int().cumsum(1).argmax(1, keepdim=True)
    other = torch.where(ids.gather(1, last) == 0, 1, 0)
    changed = {**batch, "input_ids": ids.scatter(1, last, other)}
    logits, again = (
        each.all() for each in logits_of_all(program, [inputs_of(batch), inputs_of(changed)])
    )
    if logits.shape[:2] != ids.shape:
        return True
    before = (torch.arange(ids.shape[1]) < last).to(logits.device)
    return relative_error(logits[before], again[before]) <= tolerance_of(logits.dtype)


def next_token_loss(logits: Tensor | Logits, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy of every next token, in nats; differentiable.

    Parameters
    ----------
    logits
        ``[batch, length, vocabulary]``.
    batch
        ``input_ids`` ``[batch, length]`` and, where some tokens are padding, ``attention_mask``
        of the same shape, zero for tokens that are neither predicted nor counted.

    Returns
    -------
    Tensor
        A float32 scalar.

    Raises
    ------
    CalibrationError
        When the shapes do not belong together, or there is nothing to predict.

    Examples
    --------
    >>> logits = torch.zeros(1, 3, 8)
    >>> loss = next_token_loss(logits, {"input_ids": torch.tensor([[1, 2, 3]])})
    >>> round(loss.exp().item(), 3)
    8.0
    """
    logits = as_logits(logits)
    at, labels = _next_tokens(logits, batch)
    return logits.summed(at, cross_entropy(labels)) / len(at)


def sample_losses(logits: Tensor | Logits, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the `task_loss` of every sample of a batch, ``[samples]``, without gradients.

    It is not finite where a sample has nothing to predict.

    Raises
    ------
    CalibrationError
        As `task_loss`.
    """
    logits = as_logits(logits)
    at, labels = _targets(logits, batch)
    return _means(logits.each(at, cross_entropy(labels)), at, logits)


def predicted(batch: Mapping[str, Tensor]) -> Tensor:
    """Return a mask of the tokens that are predicted, ``[batch, length - 1]``: not of the first."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return mask[:, 1:].bool() & mask[:, :-1].bool()


def cross_entropy(labels: Tensor) -> RowLoss:
    """Return the cross entropy of rows whose labels are `labels`, in nats and float32."""

    def loss(logits: Tensor, at: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), labels[at], reduction="none")

    return loss


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before || after) of the classes of every row, in nats and float32."""
    wanted, found = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)


def departure_of(program: Program) -> tuple[str, str, Departure]:
    """Return how far programs made of `program` are from it: a name, the output, the measure.

    That is the divergence of the logits, as a mean over positions, or the relative squared change
    of the first output. Positions that are padding do not count.

    Raises
    ------
    CalibrationError
        When no output is of floating-point numbers.
    """
    outputs = program.outputs
    if any(value.name == "logits" for value in outputs):
        return "divergence", "logits", _divergence
    own = [value for value in outputs if not value.name.startswith(PRESENT)]
    name = next((value.name for value in own if value.dtype.is_floating_point), None)
    if name is None:
        names = ", ".join(value.name for value in own)
        raise CalibrationError(
            f"no output is of floating-point numbers ({names}): how far one is from the original "
            "cannot be measured"
        )
    return f"relative squared change of {name}", name, _change


def _divergence(found: Logits, whole: Logits, batch: Mapping[str, Tensor]) -> Tensor:
    at = torch.arange(found.shape[:-1].numel(), device=found.device)
    real = _real(found, batch)
    if real is not None:
        at = at[real.flatten()]
    each = found.each(at, lambda logits, piece: divergence(whole.rows(at[piece]), logits))
    return _means(each, at, found)


def _change(found: Logits, whole: Logits, batch: Mapping[str, Tensor]) -> Tensor:
    after, before = found.all(), whole.all()
    real = _real(found, batch)
    if real is not None:
        padding = ~real.view(*real.shape, *[1] * (after.ndim - 2))
        after, before = (each.masked_fill(padding, 0) for each in (after, before))
    return (after - before).square().flatten(1).sum(1) / before.square().flatten(1).sum(1)


def _real(logits: Logits, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return a mask, ``[batch, length]``, of tokens that are no padding; None where none says so.

    None, too, where the logits are not of these tokens one by one.
    """
    side = "decoder_" if "decoder_input_ids" in batch else ""
    ids, mask = batch.get(f"{side}input_ids"), batch.get(f"{side}attention_mask")
    if ids is None or mask is None or not ids.shape == mask.shape == logits.shape[:2]:
        return None
    return mask.bool().to(logits.device)


def _means(each: Tensor, at: Tensor, logits: Logits) -> Tensor:
    """Return the mean of what the rows `at` have, ``[n]``, over every sample, ``[samples]``."""
    of = at // logits.shape[1:-1].numel()
    totals = each.new_zeros(2, logits.shape[0])
    total, count = totals.index_add_(1, of, torch.stack([each, torch.ones_like(each)]))
    return total / count


def _targets(logits: Logits, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return which rows of logits predict something, and what, ``[n]`` both."""
    labels = batch.get(LABELS)
    if labels is None:
        return _next_tokens(logits, batch)
    if not logits.shape or logits.shape[:-1] != labels.shape:
        raise CalibrationError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: one for each "
            "position but the classes is needed"
        )
    flat, classes = labels.flatten().to(logits.device), logits.shape[-1]
    at = (flat != -100).nonzero().flatten()
    odd = flat[at][(flat[at] < 0) | (flat[at] >= classes)]
    if len(odd):
        raise CalibrationError(
            f"there is a label {int(odd[0])}; the logits are of {classes} classes"
        )
    return at, flat[at]


def _next_tokens(logits: Logits, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch.get("input_ids")
    if ids is None or len(logits.shape) != 3 or logits.shape[:2] != ids.shape:
        shape = None if ids is None else tuple(ids.shape)
        raise CalibrationError(
            "a next-token loss needs logits [batch, length, vocabulary] and input_ids "
            f"[batch, length], not {tuple(logits.shape)} and {shape}"
        )
    at = functional.pad(predicted(batch), (0, 1)).flatten().nonzero().flatten().to(logits.device)
    if not len(at):
        raise CalibrationError("there is no next token to predict: a window needs two tokens")
    tokens, classes = ids.flatten().to(logits.device)[at + 1], logits.shape[-1]
    if (highest := int(tokens.max())) >= classes:
        raise CalibrationError(
            f"the program predicts no tokens: its first output has {classes} numbers for each, and "
            f"there is a token {highest}; {_INSTEAD}"
        )
    return at, tokens
