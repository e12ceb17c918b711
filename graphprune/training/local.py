"""Training a program piece by piece to give what another program gave, each on the results so far.

After a cut (or zeros, or merged heads) every piece that lost something is trained, in the order of
the graph, so that what crosses to the next one comes as near as can be to what the original gives
there on the same samples. What went wrong before is so made up for as well. No more than one piece
is differentiated at a time, and what crosses lies on disk past the limit of memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.calibration.data import Calibration, own_batches
from graphprune.calibration.layerwise import (
    BatchExecution,
    ChangedWeights,
    SegmentWeights,
    unpadded,
)
from graphprune.errors import TrainingError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.aten import is_mutating
from graphprune.ir.interpreter import Interpreter, Memory, Values
from graphprune.ir.program import Program
from graphprune.training.pieces import Piece, pieces
from graphprune.training.samples import Samples, seed_of
from graphprune.training.trainable import Batch, master, mixed_precision, without
from graphprune.weights.deferred import made

HELD_OUT = 8
"""One of so many samples is not trained on: what is measured on them decides what is kept."""

TOKENS, OF_ANOTHER = 1024, 128
"""Tokens of a step, and how many a sample without tokens counts for."""

LOOKS, SLOWER = 8, 3.0
"""How often a piece is measured while it is trained, and what the learning rate is divided by
where that finds it no better: which rates do good differs from model to model."""


@dataclass(frozen=True)
class TrainedPieces:
    """What a local training made.

    Parameters
    ----------
    weights
        The weights that it changed, as they are stored.
    account
        Counts what activations, gradients and moments take; not what is held within a piece while
        it is differentiated.
    errors
        Name of a piece -> its `relative_error` on samples that were not trained on, before and
        after.
    shared
        Weights of these pieces that stay as they are, because others use them too.
    """

    weights: Mapping[str, Tensor]
    account: Memory
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)


def train_locally(
    program: Program,
    original: Program,
    calibration: Calibration,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    track: Progress = no_progress,
) -> TrainedPieces:
    """Train every piece of `program` in which a weight is not what it was in `original`.

    A piece is a residual branch, or what else lies between two places that a single value crosses
    (`graphprune.training.pieces`). Zeros of matrices stay zero. What is kept of a piece is what was
    best on held-out samples, at its start or at one of a few looks: by this measure none becomes
    worse. A look that finds nothing better goes back to what was best, with a lower rate.

    Parameters
    ----------
    program
        What was made of `original` by cuts, merges, zeros and the like.
    original
        What it is to resemble.
    calibration
        Samples; one of eight, at least one, is not trained on.
    steps
        Steps of AdamW for each piece; the learning rate falls in equal parts to zero.
    lr
        The highest learning rate, as a part of the root mean square of each weight.
    seed
        Of the order of samples.
    track
        Wraps the loop over pieces in a progress bar.

    Raises
    ------
    TrainingError
        When there is only one sample, or an error is not finite before any training.
    CalibrationError
        When the batches do not fit the program, or a layer takes more memory than is allowed.
    """
    calibration.check(program)
    fit, held = _divided(calibration)
    batches = [*fit, *held]
    found = pieces(program, original)
    branches = [_Branch(program, original, found, at) for at in range(len(found))]
    while branches and not branches[-1].differs:
        branches.pop()
    account = Memory()
    account.reserve(max((each.bytes for each in branches), default=0))
    own = own_batches(batches)
    runs = _Run.of_all(program, original, branches, {at: batches[at] for at in own}, account)
    changed = ChangedWeights(program, [each.piece.nodes for each in branches], account)
    result = TrainedPieces(changed.weights, account)
    settings = _Settings(steps, lr, seed, len(fit), len(batches))
    for branch in track(branches, "training piece by piece"):
        for run in runs.values():
            run.original.advance(branch.piece.model)
        if branch.differs:
            result.shared.extend(branch.names[node] for node in branch.shared)
        if branch.trained:
            new, errors = branch.train(runs, settings)
            name = branch.name
            result.errors[f"{name} ({branch.at})" if name in result.errors else name] = errors
            stored = changed.store(new)
            for run in list(runs.values())[:1]:  # they share their weights
                run.program.replace(stored)
        for run in runs.values():
            run.program.advance(branch.piece.nodes)
    return result


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared difference of rows as a part of their square, on average.

    Every row, along the last dimension, counts by itself, so that a few large ones (such as first
    tokens) are not all that matters; one that is hardly there counts as a hundredth of the mean.

    Examples
    --------
    >>> wanted = torch.tensor([[2.0, 0.0], [200.0, 0.0]])
    >>> float(relative_error(wanted + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), wanted)) < 0.25
    True
    """
    difference = (found.float() - wanted.float()).square().mean(-1)
    return (difference / squares_of_rows(wanted)).mean()


def squares_of_rows(wanted: Tensor) -> Tensor:
    """Return what errors of rows are divided by: mean squares, a hundredth of their mean at least.

    ``[...]`` for ``[..., size]``, float32.
    """
    squares = wanted.float().square().mean(-1)
    return squares.clamp(min=max(float(squares.mean()) / 100, 1e-30))


def samples_of_a_step(batches: Iterable[Batch]) -> int:
    """Return how many samples a step takes, of those like the longest of `batches`."""
    inputs = (each for batch in batches for each in batch.values())
    sizes = (each.shape[1] for each in inputs if each.ndim == 2 and not each.is_floating_point())
    return max(1, TOKENS // max(sizes, default=OF_ANOTHER))


def _divided(calibration: Calibration) -> tuple[list[Batch], list[Batch]]:
    """Return batches to train on, a step each, and batches to measure on."""
    rows = [
        {name: tensor[at : at + 1] for name, tensor in batch.items()}
        for batch in unpadded(calibration)
        for at in range(len(next(iter(batch.values()))))
    ]
    if len(rows) < 2:
        raise TrainingError("one sample is too little to train on some and hold some out")
    together = samples_of_a_step(rows)
    count = max(1, len(rows) // HELD_OUT)
    return Samples(rows[:-count]).all(together), Samples(rows[-count:]).all(together)


@dataclass(frozen=True)
class _Settings:
    """How long and how fast; batches before `fitted` are trained on, others measured on."""

    steps: int
    lr: float
    seed: int
    fitted: int
    total: int

    def order(self, at: int) -> Iterator[int]:
        """Yield the number of the batch of every step of the piece `at`."""
        for step in range(self.steps):
            epoch, place = divmod(step, self.fitted)
            drawn = torch.Generator().manual_seed(seed_of(self.seed, at, epoch))
            yield int(torch.randperm(self.fitted, generator=drawn)[place])

    def rate(self, step: int) -> float:
        """Return the part of the highest rate at a step: it rises for a tenth, then falls."""
        return min(1.0, 10 * (step + 1) / self.steps) * (1 - step / self.steps)

    def looks(self, done: int) -> bool:
        """Return whether to measure after so many steps."""
        return done == self.steps or done % -(-self.steps // LOOKS) == 0


@dataclass(frozen=True, eq=False)
class _Run:
    """A batch on its way through the program and through the original."""

    program: BatchExecution
    original: BatchExecution
    rows: int

    @classmethod
    def of_all(
        cls,
        program: Program,
        original: Program,
        branches: Sequence[_Branch],
        batches: Mapping[int, Batch],
        account: Memory,
    ) -> dict[int, _Run]:
        """Return one for each of some numbered batches, at the start of both graphs."""
        goals = branches[-1].piece.goals if branches else {}
        ours, theirs = (
            BatchExecution.of_all(each, batches.values(), parts, memory=account, goals=ends)
            for each, parts, ends in (
                (program, [b.piece.nodes for b in branches], set(goals)),
                (original, [b.piece.model for b in branches], set(goals.values())),
            )
        )
        rows = (len(next(iter(batch.values()))) for batch in batches.values())
        return dict(zip(batches, map(cls, ours, theirs, rows), strict=True))


class _Branch:
    """A piece of a program as it is trained.

    Parameters
    ----------
    program, original
        The programs.
    found
        The pieces of `program`.
    at
        Which of them it is.
    """

    def __init__(
        self, program: Program, original: Program, found: Sequence[Piece], at: int
    ) -> None:
        self.program, self.piece, self.at = program, found[at], at
        nodes = self.piece.nodes
        elsewhere = {node for piece in found if piece is not found[at] for node in piece.nodes}
        self._read = list(dict.fromkeys(n for each in nodes for n in each.all_input_nodes))
        self.names = {n: name for name, n in program.weight_nodes() if n in set(self._read)}
        self.differs = any(_differ(program, original, name) for name in self.names.values())
        self.shared = [n for n in self.names if not elsewhere.isdisjoint(n.users)]
        self.trained = [
            node
            for node, name in self.names.items()
            if self.differs
            and self.piece.goals
            and node not in self.shared
            and program.kinds[name] == "parameter"
            and program.weights[name].is_floating_point()
        ]

    @property
    def bytes(self) -> int:
        """What parameters, gradients and moments take while it is trained."""
        return sum(20 * self.program.weights[self.names[node]].numel() for node in self.trained)

    @property
    def name(self) -> str:
        """The module that its matrices have in common."""
        weights = self.program.weights
        names = [self.names[node] for node in self.trained]
        names = [name for name in names if weights[name].ndim > 1] or names
        return ".".join(commonprefix([name.split(".")[:-1] for name in names])) or "the model"

    def train(
        self, runs: Mapping[int, _Run], settings: _Settings
    ) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """Return new weights, none where none are better, and the error before and after."""
        held = SegmentWeights(self.program).of(self.piece.nodes)
        masters = {node: master(held[node]) for node in self.trained}
        for node, each in masters.items():
            if each.ndim > 1 and bool((zero := held[node] == 0).any()):
                each.register_hook(without(zero))
        optimizer = torch.optim.AdamW(
            [{"params": [each], "most": settings.lr * _size(each)} for each in masters.values()],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        before = best = self._measured(runs, settings, held)
        if not math.isfinite(before):
            raise TrainingError(f"{self.name}: what it gives on the calibration data is not finite")
        new: dict[fx.Node, Tensor] = {}
        back = {node: each.detach().clone() for node, each in masters.items()}
        part = 1.0
        for step, number in enumerate(settings.order(self.at)):
            for group in optimizer.param_groups:
                group["lr"] = group["most"] * part * settings.rate(step)
            if number in runs:
                with torch.enable_grad():
                    error = self._error(runs[number], {**held, **masters})
                if error.requires_grad:
                    error.backward()
            self._add_up(masters.values())
            optimizer.step()
            optimizer.zero_grad()
            if settings.looks(step + 1):
                now = {node: self._stored(node, each) for node, each in masters.items()}
                reached = self._measured(runs, settings, {**held, **now})
                if reached < best:
                    best, new, back = reached, now, now
                else:
                    part /= SLOWER
                    for node, each in masters.items():
                        each.data.copy_(back[node])
                    optimizer.state.clear()
        return {self.names[node]: each for node, each in new.items()}, (before, best)

    def _add_up(self, masters: Collection[Tensor]) -> None:
        """Add up the gradients of all processes."""
        for each in masters:
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        ranks.sum_of(each.grad for each in masters if each.grad is not None)

    @torch.no_grad()
    def _measured(
        self, runs: Mapping[int, _Run], settings: _Settings, weights: Mapping[fx.Node, Tensor]
    ) -> float:
        """Return the mean error of the samples that are not trained on."""
        total = torch.zeros(2, dtype=torch.float64)
        for number, run in runs.items():
            if number >= settings.fitted:
                error = float(self._error(run, weights))
                total += torch.tensor([error * run.rows, run.rows], dtype=torch.float64)
        ranks.sum_of([total])
        return float(total[0] / total[1])

    def _error(self, run: _Run, weights: Mapping[fx.Node, Tensor]) -> Tensor:
        """Return how far the piece is from what the original gives, a differentiable scalar."""
        inside, writes = set(self.piece.nodes), any(map(is_mutating, self.piece.nodes))
        values = Values(weights)
        for node in self._read:
            if node not in weights and node not in inside and node in run.program.values:
                value = run.program.values[node]
                values[node] = value.clone() if writes and isinstance(value, Tensor) else value
        with mixed_precision(self.program):
            Interpreter(values, device=self.program.device).run(self.piece.nodes)
        errors = [
            relative_error(values[node], run.original.values[other])
            for node, other in self.piece.goals.items()
        ]
        return torch.stack(errors).sum()

    def _stored(self, node: fx.Node, weight: Tensor) -> Tensor:
        """Return `weight` as it comes back when it is stored."""
        name = self.names[node]
        stored = weight.detach().to(self.program.weights[name].dtype, copy=True)
        return stored.to(self.program.compute_types[name])


def _differ(program: Program, original: Program, name: str) -> bool:
    """Return whether a weight is not what it was."""
    new, old = program.weights[name], original.weights.get(name)
    if old is None or new.shape != old.shape:
        return True
    return new is not old and not torch.equal(made(new), made(old).to(new.device))


def _size(weight: Tensor) -> float:
    """Return the root mean square of a weight; 1 where it is zero."""
    return float(weight.detach().square().mean().sqrt()) or 1.0
