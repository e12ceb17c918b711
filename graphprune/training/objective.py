"""Training objectives: the loss of labels or next tokens, the divergence from a teacher, a mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graphprune.calibration.data import LABELS, inputs_of
from graphprune.calibration.losses import predicted, task_loss
from graphprune.errors import TrainingError
from graphprune.ir.program import Program
from graphprune.training.trainable import Batch, Trainable


@dataclass(frozen=True)
class Objective:
    """The loss of labels or next tokens, the divergence from a teacher, or a mix of both.

    ``(1 - distil) CE + distil KL(teacher || student)``, in nats, both means over tokens (Hinton et
    al. 1503.02531 at temperature 1). Where the output is not called ``logits``, the divergence is
    the squared difference as a part of the teacher's square.

    Parameters
    ----------
    output
        Which output is looked at; logits are ``[..., classes]``.
    teacher
        The program to distil from, of the same inputs and outputs.
    distil
        The weight of the teacher, in [0, 1].
    labeled
        Whether batches hold labels, whose cross entropy then takes the place of next tokens'.
    """

    output: str
    teacher: Program | None = None
    distil: float = 0.0
    labeled: bool = False

    def __post_init__(self) -> None:
        if (self.teacher is None) != (self.distil == 0):
            raise ValueError("a teacher is what distil > 0 needs, and nothing else does")

    @property
    def name(self) -> str:
        """The name of what `measure` gives."""
        if self.distil == 1:
            return "divergence from the unpruned program"
        return "cross entropy of the labels" if self.labeled else "next-token loss"

    def __call__(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return what is trained on, a differentiable scalar in nats."""
        logits = outputs[self.output]
        if self.distil == 0:
            return _task_loss(logits, batch)
        divergence = self._divergence(logits, batch)
        if self.distil == 1:
            return divergence
        loss = _task_loss(logits, batch)
        return (1 - self.distil) * loss + self.distil * divergence

    def measure(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the next-token loss, or the divergence where that is all that is trained on."""
        if self.distil == 1:
            return self._divergence(outputs[self.output], batch)
        return _task_loss(outputs[self.output], batch)

    def size(self, batch: Batch) -> int:
        """Return how much a batch counts among others: its predicted tokens, or its samples."""
        tokens = _of_tokens(batch)
        if self.distil == 1 or self.labeled or "input_ids" not in tokens:
            return len(next(iter(batch.values())))
        return int(predicted(tokens).sum())

    def check(self, student: Trainable, batch: Batch) -> None:
        """Refuse a program on whose logits this says nothing.

        Raises
        ------
        TrainingError
            When there is no next token to predict, its token is seen by the logits that predict
            it, or the teacher's logits are of other shape.
        """
        with torch.no_grad():
            logits = student.run(inputs_of(batch), training=False)[self.output]
            if self.teacher is not None:
                given = self.teacher(**inputs_of(batch))[self.output]
                if given.shape != logits.shape:
                    raise TrainingError(
                        f"the unpruned program gives {self.output} {tuple(given.shape)}, this one "
                        f"{tuple(logits.shape)}: there is nothing to distil"
                    )
            if self.distil == 1:
                return
            if self.labeled:
                _task_loss(logits, batch)  # refuses labels that do not fit
                return
            tokens = _of_tokens(batch)
            ids = tokens.get("input_ids")
            if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
                raise TrainingError(
                    f"there is no next token in what this program gives, {self.output} "
                    f"{tuple(logits.shape)}: train it with distil=1"
                )
            name = next(name for name, value in batch.items() if value is ids)
            other = ids.clone()
            other[:, -1] = (ids[:, -1] + 1) % logits.shape[-1]
            changed = student.run({**inputs_of(batch), name: other}, training=False)[self.output]
        if not torch.allclose(logits[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-3):
            raise TrainingError(
                "the logits of this program depend on the tokens after them, so that predicting "
                "the next one teaches nothing: train it with distil=1"
            )

    def _divergence(self, logits: Tensor, batch: Batch) -> Tensor:
        assert self.teacher is not None
        given = self.teacher(**inputs_of(batch))[self.output]
        mask = _of_tokens(batch).get("attention_mask")
        if mask is not None and mask.shape == logits.shape[:2]:
            logits, given = logits[mask.bool()], given[mask.bool()]
        if self.output != "logits":
            return (logits - given).float().square().mean() / given.float().square().mean()
        found, wanted = (each.flatten(0, -2).float().log_softmax(-1) for each in (logits, given))
        return functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def _task_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross entropy of the labels where there are any, else of the next tokens."""
    labels = {LABELS: batch[LABELS]} if LABELS in batch else {}
    return task_loss(logits, {**_of_tokens(batch), **labels})


def _of_tokens(batch: Batch) -> dict[str, Tensor]:
    """Return the tokens that the logits are of, with their mask: the decoder's of two."""
    prefix = "decoder_" if "decoder_input_ids" in batch else ""
    names = ("input_ids", "attention_mask")
    return {name: batch[prefix + name] for name in names if prefix + name in batch}
