"""Compare the predictions of a smaller program with those of its original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.logits import Logits, RowLoss
from graphprune.calibration.losses import divergence, next_token_loss, predicted
from graphprune.errors import EvaluationError
from graphprune.evaluation.perplexity import why_not_causal
from graphprune.io.progress import DisplayFactory, progress_bar
from graphprune.ir.program import Program


@dataclass(frozen=True)
class Comparison:
    """The measures that `compare` took.

    Parameters
    ----------
    predictions
        How many were compared: one for each token, or for each sample of a classifier.
    loss_before, loss_after
        Mean negative log-likelihood of the next token in nats; None unless both programs are
        causal language models.
    agreement
        The part of the predictions whose likeliest class is the same.
    kl
        Mean Kullback-Leibler divergence of the smaller program's prediction from the original's,
        in nats.
    """

    predictions: int
    loss_before: float | None
    loss_after: float | None
    agreement: float
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def compare(
    original: Program,
    smaller: Program,
    batches: Iterable[Mapping[str, Tensor]],
    progress: DisplayFactory | None = None,
) -> Comparison:
    """Run both programs on the same batches and compare their logits.

    Parameters
    ----------
    original, smaller
        Programs with the same inputs, and ``logits`` among their outputs.
    batches
        Inputs by name; what is masked does not count.
    progress
        Makes a progress display.

    Raises
    ------
    EvaluationError
        When there are no batches, or the programs give no logits over the same classes.
    """
    causal = not why_not_causal(original)
    totals = torch.zeros(4, dtype=torch.float64)
    count = predicted_count = 0
    with progress_bar(progress, "comparing with the original") as advance, torch.no_grad():
        _check_classes(original, smaller)
        given = list(batches)
        both = (logits_of_all(each, given, "logits") for each in (original, smaller))
        for batch, old, new in zip(given, *both, strict=True):
            if causal:
                tokens = int(predicted(batch).sum())
                losses = [next_token_loss(logits, batch).item() for logits in (old, new)]
                totals[:2] += torch.tensor(losses, dtype=torch.float64) * tokens
                predicted_count += tokens
            at = _counted(old, batch)
            totals[2:] += new.each(at, _differences(old, at)).double().sum(0).cpu()
            count += len(at)
            advance(1)
    if not count:
        raise EvaluationError("there is nothing to compare predictions on")
    loss_before, loss_after = (totals[:2] / max(predicted_count, 1)).tolist()
    agreement, kl = (totals[2:] / count).tolist()
    if not causal:
        return Comparison(count, None, None, agreement, kl)
    return Comparison(count, loss_before, loss_after, agreement, kl)


def _differences(original: Logits, at: Tensor) -> RowLoss:
    """Return, for the rows `at`: whether the likeliest class is the same, and the divergence."""

    def of(logits: Tensor, piece: Tensor) -> Tensor:
        before = original.rows(at[piece])
        same = (before.argmax(-1) == logits.argmax(-1)).float()
        return torch.stack([same, divergence(before, logits)], 1)

    return of


def _check_classes(*programs: Program) -> None:
    """Refuse programs without logits over the same classes."""
    sizes = [
        {value.shape[-1] for value in program.outputs if value.name == "logits" and value.shape}
        for program in programs
    ]
    found = set.union(*sizes)
    if not all(sizes) or len(found) != 1 or not isinstance(found.pop(), int):
        raise EvaluationError("the programs have no logits over the same classes to compare")


def _counted(logits: Logits, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the rows of logits that are not of padding, ``[predictions]``."""
    mask = batch.get("attention_mask")
    if mask is not None and logits.shape[:-1] == mask.shape:
        return mask.flatten().nonzero().flatten().to(logits.device)
    return torch.arange(logits.shape[:-1].numel(), device=logits.device)
