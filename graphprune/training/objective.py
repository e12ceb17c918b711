"""Training objectives: the loss of labels or next tokens, the divergence from a teacher, a mix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.calibration.data import LABELS, inputs_of
from graphprune.calibration.logits import Logits, run_to_logits
from graphprune.calibration.losses import divergence, predicted, task_loss
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

    def __call__(self, logits: Logits, batch: Batch) -> Tensor:
        """Return what is trained on, a differentiable scalar in nats."""
        if self.distil == 0:
            return _task_loss(logits, batch)
        divergence = self._divergence(logits, batch)
        if self.distil == 1:
            return divergence
        loss = _task_loss(logits, batch)
        return (1 - self.distil) * loss + self.distil * divergence

    def measure(self, logits: Logits, batch: Batch) -> Tensor:
        """Return the next-token loss, or the divergence where that is all that is trained on."""
        if self.distil == 1:
            return self._divergence(logits, batch)
        return _task_loss(logits, batch)

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
            logits = student.logits(inputs_of(batch), self.output, training=False)
            if self.teacher is not None:
                given = self._taught(batch)
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
            if ids is None or len(logits.shape) != 3 or logits.shape[:2] != ids.shape:
                raise TrainingError(
                    f"there is no next token in what this program gives, {self.output} "
                    f"{tuple(logits.shape)}: train it with distil=1"
                )
            name = next(name for name, value in batch.items() if value is ids)
            other = ids.clone()
            other[:, -1] = (ids[:, -1] + 1) % logits.shape[-1]
            inputs = {**inputs_of(batch), name: other}
            changed = student.logits(inputs, self.output, training=False)
            found, again = (each.all()[:, :-1] for each in (logits, changed))
        if not torch.allclose(found, again, rtol=1e-3, atol=1e-3):
            raise TrainingError(
                f"the {self.output} of this program depend on the tokens after them, so that "
                "predicting the next one teaches nothing: train it with distil=1"
            )

    def _divergence(self, logits: Logits, batch: Batch) -> Tensor:
        given = self._taught(batch)
        mask = _of_tokens(batch).get("attention_mask")
        at = torch.arange(logits.shape[:-1].numel(), device=logits.device)
        if is_masked := mask is not None and mask.shape == logits.shape[:2]:
            at = at.view(logits.shape[:-1])[mask.bool().to(at.device)].flatten()
        if self.output == "logits":
            return logits.summed(at, lambda z, piece: divergence(given.rows(at[piece]), z)) / len(
                at
            )
        found, wanted = (each.all().float() for each in (logits, given))
        if is_masked:
            found, wanted = (each.flatten(0, -2)[at] for each in (found, wanted))
        return (found - wanted).square().mean() / wanted.square().mean()

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Logits:
        assert self.teacher is not None
        return run_to_logits(self.teacher, inputs_of(batch), self.output)


def _task_loss(logits: Logits, batch: Batch) -> Tensor:
    """Return the cross entropy of the labels where there are any, else of the next tokens."""
    labels = {LABELS: batch[LABELS]} if LABELS in batch else {}
    return task_loss(logits, {**_of_tokens(batch), **labels})


def _of_tokens(batch: Batch) -> dict[str, Tensor]:
    """Return the tokens that the logits are of, with their mask: the decoder's of two."""
    prefix = "decoder_" if "decoder_input_ids" in batch else ""
    names = ("input_ids", "attention_mask")
    return {name: batch[prefix + name] for name in names if prefix + name in batch}
