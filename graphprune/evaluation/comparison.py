"""How far the predictions of a smaller program are from those of its original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration.losses import next_token_loss, predicted
from graphprune.errors import EvaluationError
from graphprune.evaluation.perplexity import why_not_causal
from graphprune.io.progress import DisplayFactory, progress_bar
from graphprune.ir.program import Program

_MOST_LOGITS = 2**26
"""Logits of one program that are in memory at once."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

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
        for batch in _small(batches, _classes(original, smaller)):
            old, new = (program(**batch)["logits"].float() for program in (original, smaller))
            if causal:
                tokens = int(predicted(batch).sum())
                losses = [next_token_loss(logits, batch).item() for logits in (old, new)]
                totals[:2] += torch.tensor(losses, dtype=torch.float64) * tokens
                predicted_count += tokens
            old, new = (_counted(logits, batch) for logits in (old, new))
            before, after = old.log_softmax(-1), new.log_softmax(-1)
            totals[2] += (old.argmax(-1) == new.argmax(-1)).sum()
            totals[3] += (before.exp() * (before - after)).sum()
            count += len(old)
            advance(1)
    if not count:
        raise EvaluationError("there is nothing to compare predictions on")
    loss_before, loss_after = (totals[:2] / max(predicted_count, 1)).tolist()
    agreement, kl = (totals[2:] / count).tolist()
    if not causal:
        return Comparison(count, None, None, agreement, kl)
    return Comparison(count, loss_before, loss_after, agreement, kl)


def _classes(*programs: Program) -> int:
    """Return how many classes both programs have logits of."""
    sizes = {
        value.shape[-1]
        for program in programs
        for value in program.outputs
        if value.name == "logits" and value.shape
    }
    found = sizes.pop() if len(sizes) == 1 else None
    if not isinstance(found, int):
        raise EvaluationError("the programs have no logits over the same classes to compare")
    return found


def _small(batches: Iterable[Mapping[str, Tensor]], classes: int) -> Iterator[dict[str, Tensor]]:
    """Cut batches so that their logits fit into memory."""
    for batch in batches:
        rows = len(next(iter(batch.values())))
        places = max(tensor[0].numel() for tensor in batch.values())
        at_once = max(_MOST_LOGITS // (places * classes), 1)
        for start in range(0, rows, at_once):
            yield {name: tensor[start : start + at_once] for name, tensor in batch.items()}


def _counted(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits that are not of padding, ``[predictions, classes]``."""
    mask = batch.get("attention_mask")
    if mask is not None and logits.shape[:-1] == mask.shape:
        return logits[mask.bool()]
    return logits.flatten(0, -2)
