"""Training the weights of a program at their sizes: the objective, the loop, and its checkpoints.

What is trained is a `Trainable`; the loop knows nothing of the model. Order of the samples, dropout
and learning rate are functions of the seed and the step, so that a run that was cut off and goes on
from its checkpoint gives what the uninterrupted one gives, bit for bit. Where there are several
processes each runs its part of a step's samples, and gradients are added up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graphprune import ranks
from graphprune.calibration.data import inputs_of
from graphprune.errors import TrainingError
from graphprune.io.atomic import staged_file
from graphprune.training.objective import Objective
from graphprune.training.samples import Samples, seed_of
from graphprune.training.trainable import Trainable


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, rates and sizes of a training.

    Parameters
    ----------
    steps
        Steps of the optimizer, AdamW.
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
        """Return the learning rate of a step; the first is 0.

        Examples
        --------
        >>> config = TrainingConfig(steps=6, lr=1.0, warmup=2)
        >>> [round(config.rate(step), 2) for step in range(6)]
        [0.33, 0.67, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.lr
        return self.lr * (self.steps - step) / (self.steps - self.warmup)


@dataclass
class Trained:
    """The course of a training.

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
        """Return what `write` was given last, or None where there is no file.

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
    config: TrainingConfig,
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
    config
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
    return _Loop(student, objective, samples, held, config).run(checkpoint, advance)


class _Loop:
    """A training under way."""

    def __init__(
        self,
        student: Trainable,
        objective: Objective,
        samples: Samples,
        held: Samples,
        config: TrainingConfig,
    ) -> None:
        self.student, self.objective, self.config = student, objective, config
        self.samples, self.held = samples, held or samples
        self.parameters = dict(student.parameters)
        split = [
            [each for each in self.parameters.values() if (each.ndim >= 2) is wide]
            for wide in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": decay}
                for group, decay in zip(split, (config.weight_decay, 0.0), strict=True)
                if group
            ],
            lr=config.lr,
        )
        self.trained = Trained()
        self.best: dict[str, Tensor] = {}

    def run(self, checkpoint: Checkpoint | None, advance: Callable[[float], None]) -> Trained:
        self.objective.check(self.student, self.held.all(1)[0])
        if checkpoint is not None and (state := ranks.of_first(checkpoint.read)) is not None:
            self._restore(state)
            advance(self.trained.step)
        else:
            self._measure()
            self._save(checkpoint)  # where it cannot be written, no step is lost
        trained, config = self.trained, self.config
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            while trained.step < config.steps and not trained.stopped:
                self._step()
                advance(1)
                if trained.step % config.every == 0 or trained.step == config.steps:
                    self._measure()
                    self._save(checkpoint)
        if config.patience is None:
            trained.best = trained.step
        else:
            self._load(self.best)
        return trained

    def _step(self) -> None:
        """One step of the optimizer, on the gradient of all its samples."""
        step, config = self.trained.step, self.config
        batches = self.samples.of_step(step, config.batch, config.micro, config.seed)
        sizes = [self.objective.size(batch) for batch in batches]
        for at in ranks.own(sizes):
            batch = batches[at]
            torch.manual_seed(seed_of(config.seed, "dropout", step, at))
            with torch.enable_grad():
                logits = self.student.logits(inputs_of(batch), self.objective.output, training=True)
                loss = self.objective(logits, batch)
                (loss * (sizes[at] / sum(sizes))).backward()
            self._check_finite(loss.item())
        self._add_up()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trained.step += 1

    def _add_up(self) -> None:
        """Add up the gradients of all processes."""
        for each in self.parameters.values():
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        ranks.sum_of(each.grad for each in self.parameters.values() if each.grad is not None)

    @torch.no_grad()
    def _measure(self) -> None:
        """Note the loss, and whether it is the lowest or has been no lower for too long."""
        trained, patience = self.trained, self.config.patience
        batches = self.held.all(self.config.micro)
        sizes = [self.objective.size(batch) for batch in batches]
        total = torch.zeros((), dtype=torch.float64)
        for at in ranks.own(sizes):
            batch = inputs_of(batches[at])
            logits = self.student.logits(batch, self.objective.output, training=False)
            total += self.objective.measure(logits, batches[at]).item() * sizes[at]
        ranks.sum_of([total])
        self._check_finite(total.item())
        trained.measured[trained.step] = total.item() / sum(sizes)
        if patience is None:
            return
        trained.best = min(trained.measured, key=trained.measured.__getitem__)
        if trained.best == trained.step:
            self.best = {name: each.detach().clone() for name, each in self.parameters.items()}
        since = sum(step > trained.best for step in trained.measured)
        trained.stopped = since >= patience and trained.step < self.config.steps

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            rate = self.config.rate(self.trained.step)
            raise TrainingError(
                f"the loss is not finite at step {self.trained.step}, where the learning rate is "
                f"{rate:.2g}"
            )

    def _save(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None or not ranks.is_first():
            return
        parameters = {name: each.detach() for name, each in self.parameters.items()}
        state = {"trained": vars(self.trained), "parameters": parameters, "best": self.best}
        checkpoint.write({**state, "optimizer": self.optimizer.state_dict()})

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.trained = Trained(**state["trained"])
        self.trained.resumed = self.trained.step
        self._load(state["parameters"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer" if "optimizer" in state else "optimiser"])

    def _load(self, parameters: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, each in self.parameters.items():
                each.copy_(parameters[name])
