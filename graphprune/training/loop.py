"""Training the weights of a program at their sizes: the objective, the loop, and its checkpoints.

What is trained is a `Trainable`; the loop knows nothing of the model. Order of the samples, dropout
and learning rate are functions of the seed and the step, so that a run that was cut off and goes on
from its checkpoint gives what the uninterrupted one gives, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from graphprune.calibration.data import LABELS, Calibration, inputs_of, predicted, task_loss
from graphprune.errors import TrainingError
from graphprune.io.atomic import staged_file
from graphprune.ir.program import Program

Batch = Mapping[str, Tensor]
"""Inputs of a program by name; the first dimension of each counts samples."""


class Trainable(Protocol):
    """What the loop trains."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The tensors that are optimised, by name."""
        ...  # pragma: no cover

    def run(self, batch: Batch, training: bool) -> dict[str, Tensor]:
        """The outputs on a batch, in the caller's grad mode; with dropout where `training`."""
        ...  # pragma: no cover

    def weights(self) -> dict[str, Tensor]:
        """The new weights of the program, at their shapes and element types."""
        ...  # pragma: no cover


class AllWeights:
    """Parameters of a program, trained as they are.

    Weights of less than 32 bits have masters of 32, which are rounded wherever they are used.

    Parameters
    ----------
    program
        The program.
    names
        The parameters to train.
    zeros
        Name -> which elements stay as they are, of the weight's shape.
    """

    def __init__(
        self, program: Program, names: Sequence[str], zeros: Mapping[str, Tensor] | None = None
    ) -> None:
        self._program = program
        self._held = {name: weight.detach() for name, weight in program.weights.items()}
        self.parameters = {name: master(self._held[name]) for name in names}
        for name, zero in (zeros or {}).items():
            if name in self.parameters:
                self.parameters[name].register_hook(_without(zero))

    def run(self, batch: Batch, training: bool) -> dict[str, Tensor]:
        """The outputs; a captured program has no dropout of its own."""
        return self._program.run({**self._held, **self._rounded()}, batch)

    def weights(self) -> dict[str, Tensor]:
        """What the masters are now."""
        return {name: weight.detach().clone() for name, weight in self._rounded().items()}

    def _rounded(self) -> dict[str, Tensor]:
        return {name: each.to(self._held[name].dtype) for name, each in self.parameters.items()}


def master(weight: Tensor) -> Tensor:
    """A copy of `weight` to train, of 32 bits at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype, copy=True).contiguous().requires_grad_()


def _without(zero: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(zero, 0)


# -- the objective ---------------------------------------------------------------------------------


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
    labelled
        Whether batches hold labels, whose cross entropy then takes the place of next tokens'.
    """

    output: str
    teacher: Program | None = None
    distil: float = 0.0
    labelled: bool = False

    def __post_init__(self) -> None:
        if (self.teacher is None) != (self.distil == 0):
            raise ValueError("a teacher is what distil > 0 needs, and nothing else does")

    @property
    def name(self) -> str:
        """What `measure` gives."""
        if self.distil == 1:
            return "divergence from the unpruned program"
        return "cross entropy of the labels" if self.labelled else "next-token loss"

    def __call__(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """What is trained on, a differentiable scalar in nats."""
        logits = outputs[self.output]
        if self.distil == 0:
            return _task_loss(logits, batch)
        divergence = self._divergence(logits, batch)
        if self.distil == 1:
            return divergence
        loss = _task_loss(logits, batch)
        return (1 - self.distil) * loss + self.distil * divergence

    def measure(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The next-token loss, or the divergence where that is all that is trained on."""
        if self.distil == 1:
            return self._divergence(outputs[self.output], batch)
        return _task_loss(outputs[self.output], batch)

    def size(self, batch: Batch) -> int:
        """How much a batch counts among others: its predicted tokens, or its samples."""
        tokens = _of_tokens(batch)
        if self.distil == 1 or self.labelled or "input_ids" not in tokens:
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
            if self.labelled:
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
    """The cross entropy of the labels where there are any, of the next tokens elsewhere."""
    labels = {LABELS: batch[LABELS]} if LABELS in batch else {}
    return task_loss(logits, {**_of_tokens(batch), **labels})


def _of_tokens(batch: Batch) -> dict[str, Tensor]:
    """The tokens that the logits are of, with their mask: the decoder's where there are two."""
    prefix = "decoder_" if "decoder_input_ids" in batch else ""
    names = ("input_ids", "attention_mask")
    return {name: batch[prefix + name] for name in names if prefix + name in batch}


# -- the samples -----------------------------------------------------------------------------------


class Samples:
    """Single samples, and the batches of every step.

    Parameters
    ----------
    rows
        Batches of one sample each.
    """

    def __init__(self, rows: Sequence[Batch]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def split(cls, calibration: Calibration, held_out: float, seed: int) -> tuple[Samples, Samples]:
        """The samples to train on, and those (a part `held_out`, one at least) to measure on.

        Raises
        ------
        TrainingError
            When there are too few for both.
        """
        rows = list(calibration.singly())
        if not held_out:
            return cls(rows), cls(())
        count = max(1, round(len(rows) * held_out))
        if count >= len(rows):
            raise TrainingError(
                f"{len(rows)} samples are too few to hold out {held_out:g} of them and train"
            )
        order = torch.randperm(len(rows), generator=_generator(seed, "held out")).tolist()
        held = set(order[:count])
        kept = [row for at, row in enumerate(rows) if at not in held]
        return cls(kept), cls([rows[at] for at in sorted(held)])

    def steps(self, batch: int) -> int:
        """Steps that go through all of them once."""
        return -(-len(self.rows) // batch)

    def of_step(self, step: int, batch: int, micro: int, seed: int) -> list[Batch]:
        """The `batch` samples of a step, drawn without repeats in an epoch, `micro` at once."""
        epoch, place = divmod(step, self.steps(batch))
        order = torch.randperm(len(self.rows), generator=_generator(seed, epoch)).tolist()
        return self._joined(order[place * batch : (place + 1) * batch], micro)

    def all(self, micro: int) -> list[Batch]:
        """All of them, `micro` at once."""
        return self._joined(range(len(self.rows)), micro)

    def _joined(self, places: Sequence[int], micro: int) -> list[Batch]:
        joined: list[Batch] = []
        ordered = sorted(places, key=self._shape)  # stable: only what cannot go together moves
        for _, alike in itertools.groupby(ordered, key=self._shape):
            held = list(alike)
            for first in range(0, len(held), micro):
                rows = [self.rows[at] for at in held[first : first + micro]]
                joined.append({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
        return joined

    def _shape(self, place: int) -> list[tuple[str, tuple[int, ...]]]:
        return sorted((name, tuple(each.shape)) for name, each in self.rows[place].items())


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*parts))


# -- the loop --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Parameters
    ----------
    steps
        Steps of the optimiser, AdamW.
    lr
        The highest learning rate.
    batch
        Samples of a step.
    micro
        Samples that are run at once.
    warmup
        Steps over which the rate rises in equal parts.
    schedule
        Whether it then falls in equal parts, towards zero after the last step, or stays.
    weight_decay
        Of AdamW, on what has two dimensions or more.
    clip
        The largest norm of the whole gradient; 0 for any.
    every
        Steps from one measurement and checkpoint to the next.
    patience
        How many measurements in a row may bring no lower loss before training stops and the best
        parameters are taken; None to run all steps and take the last.
    seed
        Seed of the order of samples and of dropout.
    """

    steps: int
    lr: float
    batch: int = 64
    micro: int = 4
    warmup: int = 0
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    every: int = 100
    patience: int | None = None
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step; the first is 0.

        Examples
        --------
        >>> recipe = Recipe(steps=6, lr=1.0, warmup=2)
        >>> [round(recipe.rate(step), 2) for step in range(6)]
        [0.33, 0.67, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.lr
        return self.lr * (self.steps - step) / (self.steps - self.warmup)


@dataclass
class Trained:
    """How a training went.

    Parameters
    ----------
    step
        Steps done.
    measured
        Steps done -> loss in nats, on the held-out samples or, without any, on all.
    best
        The step whose parameters were taken.
    stopped
        Whether it stopped before the last step.
    resumed
        The step that it went on from.
    """

    step: int = 0
    measured: dict[int, float] = field(default_factory=dict)
    best: int = 0
    stopped: bool = False
    resumed: int = 0


class Checkpoint:
    """A file that a training goes on from.

    Parameters
    ----------
    path
        The file.
    identity
        What the training is: a file that was written for another one is refused.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, json.dumps(dict(identity))

    def read(self) -> dict[str, Any] | None:
        """What `write` was given last, or None where there is no file.

        Raises
        ------
        TrainingError
            When the file is no checkpoint, or one of another training.
        """
        if not self.path.exists():
            return None
        try:
            held = torch.load(self.path, map_location="cpu", weights_only=True)
            found, wanted = json.loads(held["identity"]), json.loads(self.identity)
            state = dict(held["state"])
        except Exception as error:
            raise TrainingError(f"{self.path} is no checkpoint of a training") from error
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                raise TrainingError(
                    f"{self.path} was written with {name} {found.get(name)}, not "
                    f"{wanted.get(name)}: give another place, or remove it"
                )
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Write `state`, whole or not at all.

        Raises
        ------
        OutputError
            When it cannot be written.
        """
        with staged_file(self.path, overwrite=True) as staged:
            torch.save({"identity": self.identity, "state": dict(state)}, staged)


def train(
    student: Trainable,
    objective: Objective,
    samples: Samples,
    held: Samples,
    recipe: Recipe,
    *,
    checkpoint: Checkpoint | None = None,
    advance: Callable[[float], None] = lambda count: None,
) -> Trained:
    """Train `student` in place.

    Parameters
    ----------
    student
        What to train; it is left at the best or last parameters.
    objective
        What to lower.
    samples
        What to train on.
    held
        What to measure on; empty to measure on `samples`.
    recipe
        Steps, rates and sizes.
    checkpoint
        Where to go on from and to write to.
    advance
        Told of every step.

    Returns
    -------
    Trained
        Losses before, between and after.

    Raises
    ------
    TrainingError
        When the objective does not fit, a loss is not finite, or the checkpoint is of another
        training.
    """
    return _Loop(student, objective, samples, held, recipe).run(checkpoint, advance)


class _Loop:
    """A training under way."""

    def __init__(
        self,
        student: Trainable,
        objective: Objective,
        samples: Samples,
        held: Samples,
        recipe: Recipe,
    ) -> None:
        self.student, self.objective, self.recipe = student, objective, recipe
        self.samples, self.held = samples, held or samples
        self.parameters = dict(student.parameters)
        split = [
            [each for each in self.parameters.values() if (each.ndim >= 2) is wide]
            for wide in (True, False)
        ]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": decay}
                for group, decay in zip(split, (recipe.weight_decay, 0.0), strict=True)
                if group
            ],
            lr=recipe.lr,
        )
        self.trained = Trained()
        self.best: dict[str, Tensor] = {}

    def run(self, checkpoint: Checkpoint | None, advance: Callable[[float], None]) -> Trained:
        self.objective.check(self.student, self.held.all(1)[0])
        if checkpoint is not None and (state := checkpoint.read()) is not None:
            self._restore(state)
            advance(self.trained.step)
        else:
            self._measure()
            self._save(checkpoint)  # where it cannot be written, no step is lost
        trained, recipe = self.trained, self.recipe
        with torch.random.fork_rng(devices=[]):
            while trained.step < recipe.steps and not trained.stopped:
                torch.manual_seed(_seed(recipe.seed, "dropout", trained.step))
                self._step()
                advance(1)
                if trained.step % recipe.every == 0 or trained.step == recipe.steps:
                    self._measure()
                    self._save(checkpoint)
        if recipe.patience is None:
            trained.best = trained.step
        else:
            self._load(self.best)
        return trained

    def _step(self) -> None:
        """One step of the optimiser, on the gradient of all its samples."""
        step, recipe = self.trained.step, self.recipe
        batches = self.samples.of_step(step, recipe.batch, recipe.micro, recipe.seed)
        sizes = [self.objective.size(batch) for batch in batches]
        for batch, size in zip(batches, sizes, strict=True):
            with torch.enable_grad():
                loss = self.objective(self.student.run(inputs_of(batch), training=True), batch)
                (loss * (size / sum(sizes))).backward()
            self._check_finite(loss.item())
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.trained.step += 1

    @torch.no_grad()
    def _measure(self) -> None:
        """Note the loss, and whether it is the lowest or has been no lower for too long."""
        trained, patience = self.trained, self.recipe.patience
        total, count = 0.0, 0
        for batch in self.held.all(self.recipe.micro):
            size = self.objective.size(batch)
            outputs = self.student.run(inputs_of(batch), training=False)
            total += self.objective.measure(outputs, batch).item() * size
            count += size
        self._check_finite(total)
        trained.measured[trained.step] = total / count
        if patience is None:
            return
        trained.best = min(trained.measured, key=trained.measured.__getitem__)
        if trained.best == trained.step:
            self.best = {name: each.detach().clone() for name, each in self.parameters.items()}
        since = sum(step > trained.best for step in trained.measured)
        trained.stopped = since >= patience and trained.step < self.recipe.steps

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            rate = self.recipe.rate(self.trained.step)
            raise TrainingError(
                f"the loss is not finite at step {self.trained.step}, where the learning rate is "
                f"{rate:.2g}"
            )

    def _save(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        parameters = {name: each.detach() for name, each in self.parameters.items()}
        state = {"trained": vars(self.trained), "parameters": parameters, "best": self.best}
        checkpoint.write({**state, "optimiser": self.optimiser.state_dict()})

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.trained = Trained(**state["trained"])
        self.trained.resumed = self.trained.step
        self._load(state["parameters"])
        self.best = state["best"]
        self.optimiser.load_state_dict(state["optimiser"])

    def _load(self, parameters: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, each in self.parameters.items():
                each.copy_(parameters[name])


def kept_zeros(program: Program, names: Sequence[str]) -> dict[str, Tensor]:
    """Where the weights called `names` that have two dimensions or more are exactly zero.

    Weights without a zero are left out.
    """
    weights = {name: program.weights[name].detach() for name in names}
    zeros = {name: weight == 0 for name, weight in weights.items() if weight.ndim >= 2}
    return {name: zero for name, zero in zeros.items() if bool(zero.any())}
