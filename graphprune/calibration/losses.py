"""What a program loses on calibration batches: cross entropy of labels or of next tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from graphprune.calibration.data import LABELS
from graphprune.errors import CalibrationError


def task_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy of the labels of a batch, or without labels its `next_token_loss`.

    Parameters
    ----------
    logits
        ``[batch, classes]``, or ``[batch, ..., classes]`` with a label for each place.
    batch
        What the program was run on, with ``labels`` ``[batch]`` or ``[batch, ...]``; a label of
        -100 does not count.

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
    labels = batch.get(LABELS)
    if labels is None:
        return next_token_loss(logits, batch)
    if not logits.ndim or logits.shape[:-1] != labels.shape:
        raise CalibrationError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: one for each "
            "place but the classes is needed"
        )
    classes = logits.shape[-1]
    odd = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
    if len(odd):
        raise CalibrationError(
            f"there is a label {int(odd[0])}; the logits are of {classes} classes"
        )
    return _cross_entropy(logits.flatten(0, -2), labels.flatten())


def next_token_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
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
    ids = batch.get("input_ids")
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        shape = None if ids is None else tuple(ids.shape)
        raise CalibrationError(
            "a next-token loss needs logits [batch, length, vocabulary] and input_ids "
            f"[batch, length], not {tuple(logits.shape)} and {shape}"
        )
    counted = predicted(batch)
    if not counted.any():
        raise CalibrationError("there is no next token to predict: a window needs two tokens")
    return _cross_entropy(logits[:, :-1][counted], ids[:, 1:][counted])


def predicted(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens after the first are predicted, ``[batch, length - 1]``, as a boolean mask."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return mask[:, 1:].bool() & mask[:, :-1].bool()


_AT_ONCE = 2**24
"""Logits that are in memory in float32 at once."""


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of ``[n, classes]``, in float32, in pieces of tokens.

    A vocabulary of 256,000 makes logits larger than everything else of a small model. They are in
    float32, and differentiated, a piece at a time.
    """
    rows = max(_AT_ONCE // logits.shape[-1], 1)
    if len(labels) <= rows:
        return functional.cross_entropy(logits.float(), labels)
    sums = [
        checkpoint(_summed, piece, of, use_reentrant=False)
        for piece, of in zip(logits.split(rows), labels.split(rows), strict=True)
    ]
    return torch.stack(sums).sum() / (labels != -100).sum()


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="sum")
