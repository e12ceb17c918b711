"""Compare what a smaller program gives with what its original gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.logits import Logits, as_logits
from graphprune.calibration.losses import divergence, next_token_loss, predicted
from graphprune.errors import EvaluationError
from graphprune.evaluation.perplexity import why_not_causal
from graphprune.io.progress import DisplayFactory, progress_bar
from graphprune.ir.program import PRESENT, Program

_LOGITS = "logits"
"""The output that is taken for scores of classes."""

_Batch = Mapping[str, Tensor]

_Pair = tuple[_Batch, Logits, Logits]
"""A batch, and what the original and the smaller program give for it."""

_Measure = Callable[[Tensor, Tensor], Tensor]
"""Given rows of the original and of the smaller program, ``[n, size]``: a number for each."""


@dataclass(frozen=True)
class Comparison:
    """The measures that `compare` took.

    Parameters
    ----------
    predictions
        How many rows were compared: one for each token, or for each sample of what has no tokens.
    loss_before, loss_after
        Mean negative log-likelihood of the next token in nats; None unless both programs are
        causal language models.
    agreement
        The part of the rows whose likeliest class is the same; None where there are no ``logits``.
    kl
        Mean Kullback-Leibler divergence of the smaller program's prediction from the original's,
        in nats; None where there are no ``logits``.
    distances
        Mean of 1 - cosine between both programs' rows, by output; empty for causal language models.
    """

    predictions: int
    loss_before: float | None
    loss_after: float | None
    agreement: float | None
    kl: float | None
    distances: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    def measures(self) -> Iterator[tuple[str, str, str]]:
        """Yield what each measure is called, and how it was before and is after, for people."""
        if self.loss_before is not None and self.loss_after is not None:
            grown = f"{self.loss_after:.4f} ({self.loss_after - self.loss_before:+.4f})"
            yield "loss, nats/token", f"{self.loss_before:.4f}", grown
        if self.agreement is not None and self.kl is not None:
            yield "agreement with the original", "", f"{self.agreement:.1%}"
            yield "KL from the original, nats", "", f"{self.kl:.4f}"
        for name, distance in self.distances.items():
            yield f"1 - cosine of {name}", "", f"{distance:.4f}"

    @property
    def counted(self) -> str:
        """What was compared, for people, such as "18 rows of outputs"."""
        what = "rows of outputs" if self.loss_before is None else "predictions of text"
        return f"{self.predictions:,} {what}"


def compare(
    original: Program,
    smaller: Program,
    batches: Iterable[_Batch],
    progress: DisplayFactory | None = None,
) -> Comparison:
    """Run both programs on the same batches and compare what they give.

    A causal language model is compared by its predictions of the next token. Of any other program
    every output is, by its direction, and ``logits`` by the likeliest class too.

    Parameters
    ----------
    original, smaller
        Programs with the same inputs and outputs.
    batches
        Inputs by name; what is masked does not count.
    progress
        Makes a progress display.

    Raises
    ------
    EvaluationError
        When there are no batches, or the programs have no outputs of the same size.
    """
    given = list(batches)
    if not given:
        raise EvaluationError("there is nothing to compare on")
    names = _outputs_of_both(original, smaller)
    causal = not why_not_causal(original)
    names = [_LOGITS] if causal else names
    with progress_bar(progress, "comparing with the original", len(names) * len(given)) as advance:

        def pairs(name: str) -> Iterator[_Pair]:
            both = (logits_of_all(each, given, name) for each in (original, smaller))
            for batch, old, new in zip(given, *both, strict=True):
                yield batch, _in_rows(old), _in_rows(new)
                advance(1)

        if causal:
            losses = _NextTokenLosses()
            count, (agreement, kl) = _means(losses.watch(pairs(_LOGITS)), [_agrees, divergence])
            return Comparison(count, *losses.means(), agreement, kl)
        of_classes = [_agrees, divergence] if _are_scores(original) else []
        found = {
            name: _means(pairs(name), [_apart, *(of_classes if name == _LOGITS else [])])
            for name in names
        }
    count, means = found[_LOGITS if of_classes else names[0]]
    distances = {name: of[0] for name, (_, of) in found.items()}
    if not of_classes:
        return Comparison(count, None, None, None, None, distances)
    agreement, kl = means[1:]
    return Comparison(count, None, None, agreement, kl, distances)


class _NextTokenLosses:
    """The losses of both programs on what is compared, added up as it passes."""

    def __init__(self) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64)
        self.tokens = 0

    def watch(self, pairs: Iterable[_Pair]) -> Iterator[_Pair]:
        for batch, old, new in pairs:
            tokens = int(predicted(batch).sum())
            losses = [next_token_loss(logits, batch).item() for logits in (old, new)]
            self.totals += torch.tensor(losses, dtype=torch.float64) * tokens
            self.tokens += tokens
            yield batch, old, new

    def means(self) -> tuple[float, float]:
        before, after = (self.totals / max(self.tokens, 1)).tolist()
        return before, after


@torch.no_grad()
def _means(pairs: Iterable[_Pair], measures: Sequence[_Measure]) -> tuple[int, list[float]]:
    """Return how many rows there are, and the mean of each measure over them."""
    totals, count = torch.zeros(len(measures), dtype=torch.float64), 0
    for batch, old, new in pairs:
        at = _counted(old, batch)

        def measured(after: Tensor, piece: Tensor, old: Logits = old, at: Tensor = at) -> Tensor:
            before = old.rows(at[piece])
            return torch.stack([measure(before, after) for measure in measures], 1)

        totals += new.each(at, measured).double().sum(0).cpu()
        count += len(at)
    if not count:
        raise EvaluationError("there is nothing to compare on")
    return count, (totals / count).tolist()


def _agrees(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 for rows whose likeliest class is the same, else 0."""
    return (before.argmax(-1) == after.argmax(-1)).float()


def _apart(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cosine of rows: 0 where both are the same, be they zero."""
    before, after = before.double(), after.double()
    cosine = functional.cosine_similarity(before, after, -1, eps=1e-30)
    return (1 - cosine).masked_fill((before == after).all(-1), 0.0)


def _in_rows(output: Logits) -> Logits:
    """Return an output ``[batch, ...]`` with rows to compare.

    Of two or three dimensions the last makes a row, as of tokens; else all of a sample does.
    """
    if len(output.shape) in (2, 3):
        return output
    return as_logits(output.all().reshape(output.shape[0], -1))


def _are_scores(program: Program) -> bool:
    """Return whether ``logits`` score classes in their last dimension, as maps of pixels do not."""
    shapes = [value.shape for value in program.outputs if value.name == _LOGITS]
    return any(len(shape) in (2, 3) and shape[-1] != 1 for shape in shapes)


def _outputs_of_both(original: Program, smaller: Program) -> list[str]:
    """Return the outputs that can be compared; logits over other classes are refused."""
    fixed = [
        {
            value.name: [size for size in value.shape if isinstance(size, int)]
            for value in program.outputs
            if value.dtype.is_floating_point
            and len(value.shape) > 1
            and not value.name.startswith(PRESENT)
        }
        for program in (original, smaller)
    ]
    found = [name for name, sizes in fixed[0].items() if sizes == fixed[1].get(name)]
    if not found or (_LOGITS in fixed[0]) != (_LOGITS in found):
        raise EvaluationError("the programs have no outputs of the same sizes to compare")
    return found


def _counted(rows: Logits, batch: _Batch) -> Tensor:
    """Return the rows that are not of padding, ``[rows]``."""
    mask = batch.get("attention_mask")
    if mask is not None and rows.shape[:-1] == mask.shape:
        return mask.flatten().nonzero().flatten().to(rows.device)
    return torch.arange(rows.shape[:-1].numel(), device=rows.device)
