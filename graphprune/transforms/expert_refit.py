"""Refitting the experts that stay, so that together they give what all of them gave.

Where experts went, tokens are sent to others. The last matrices of all that stay are then the least
squares estimate of the stream as it was: each token is a sum over the experts that it is now sent
to, so they are fitted together, one after the other and again until nothing moves (block
Gauss-Seidel), on products of pairs of each expert's own inputs alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.experts.outputs import ExpertOutputs, end_of_all, expert_outputs
from graphprune.calibration.damping import DAMPS, UNTRIED_DAMP, damped
from graphprune.calibration.data import Calibration, own_batches
from graphprune.calibration.layerwise import BatchExecution, ChangedWeights, unpadded
from graphprune.calibration.segments import segments
from graphprune.errors import CalibrationError, SelectionError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import Memory, ancestors
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.transforms.sparsity import check_values
from graphprune.verification.masked_reference import MaskedReference

HELD_OUT = 8
"""The last token of so many of a batch is not fitted to: what predicts it best is the damping."""

SWEEPS, STILL = 100, 1e-8
"""How often all experts are fitted in turn at most, and the part of what is left to be explained by
which a sweep that changes less is the last."""


@dataclass(frozen=True)
class FittedExperts:
    """What refitting experts gave.

    Parameters
    ----------
    program
        The program at its first size.
    names
        What was refitted.
    errors
        Name of a group -> the squared error at the stream behind its experts, as a part of the
        stream, before and after a fit to the other tokens: on those that the damping was chosen by.
    peak_bytes
        The most that activations and rows took together.
    """

    program: Program
    names: list[str]
    errors: dict[str, tuple[float, float]]
    peak_bytes: int


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer, and the stream that their outputs are added to."""

    group: str
    outputs: Sequence[ExpertOutputs]
    end: fx.Node

    @property
    def weights(self) -> set[str]:
        """Names of the weights that hold their last matrices."""
        return {each.matrix.weight for each in self.outputs}

    def changed(
        self, weights: Mapping[str, Tensor], changes: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weights with the changes, which are by unit, added to their matrices."""
        new: dict[str, Tensor] = {}
        for each in self.outputs:
            weight = new.get(each.matrix.weight, weights[each.matrix.weight])
            matrix = each.matrix.read(weight).double()
            for part, unit in enumerate(each.units.tolist()):
                if unit in changes:
                    matrix[part] += changes[unit]
            new[each.matrix.weight] = each.matrix.write(weight, matrix)
        return new


def experts_of(program: Program, coupling: Coupling, plan: Plan) -> Iterator[Experts]:
    """Yield the experts of every layer in which `plan` takes some.

    Raises
    ------
    SelectionError
        When their outputs cannot be followed, or are not linear in their last matrices.
    """
    cuts = {cut.group for step in plan.steps for cut in step.cuts if cut.role == "expert"}
    for name in sorted(cuts):
        group = coupling.group(name)
        found = expert_outputs(program, group, coupling.sizes(group))
        if not all(each.linear for each in found):
            raise SelectionError(f"{name}: more is done to its outputs than weighing them")
        yield Experts(name, found, end_of_all(group, found))


def refit_experts(
    program: Program,
    original: Program,
    coupling: Coupling,
    plan: Plan,
    calibration: Calibration,
    *,
    damp: float | None = None,
    track: Progress = no_progress,
) -> FittedExperts:
    """Refit the last matrices of the experts that stay when those of `plan` go.

    With x_e the inputs of expert e's last matrix W_e, times the gate that a token now has for it,
    and r what the stream behind the experts lacks of what `original` gives there, the changes D_e
    minimize ``sum over tokens |r - sum_e D_e x_e|^2 / |stream|^2 + lambda_e |D_e|^2``. Layers
    follow each other, so that what went wrong before is made up for as well.

    Parameters
    ----------
    program
        The program that `plan` was made for, in which other weights may have been refitted.
    original
        What it is to resemble, of the same graph.
    coupling
        Its analysis.
    plan
        Cuts, of groups of experts among others.
    calibration
        Batches to run it on.
    damp
        lambda_e as a part of the mean square of e's inputs; None for what predicts tokens best
        that a fit did not see, layer by layer.
    track
        Wraps the loop over layers in a progress bar.

    Raises
    ------
    SelectionError
        When a group has no experts whose outputs can be followed, or their matrices hold integers
        or values that are not finite.
    CalibrationError
        When the batches do not fit the program, or inputs are too alike in spite of the damping.
    """
    calibration.check(program)
    found = list(experts_of(program, coupling, plan))
    for name in {name for each in found for name in each.weights}:
        check_values(name, program.weights[name], moved=True)
    ends = {each.end for each in found}
    needed = ancestors(list(ends))
    matrices = [outputs.matrix for each in found for outputs in each.outputs]
    parts = segments(program, matrices, among=needed)
    reference = MaskedReference(program, plan)
    account = Memory()
    batches = list(unpadded(calibration))
    own = [batches[at] for at in own_batches(batches)]
    nodes = [part.nodes for part in parts]
    where = {node: at for at, part in enumerate(nodes) for node in part}
    kept = {end for end in ends if max(where.get(user, 0) for user in end.users) <= where[end]}
    theirs = BatchExecution.of_all(original, own, nodes, memory=account, goals=kept)
    ours = BatchExecution.of_all(
        program,
        own,
        nodes,
        memory=account,
        weights=reference.weights,
        computes=(reference.computing() for _ in itertools.count()),
    )
    changed = ChangedWeights(program, nodes, account)
    errors: dict[str, tuple[float, float]] = {}
    for part in track(parts, "refitting experts"):
        for execution in theirs:
            execution.advance(part.nodes)
        for experts in (each for each in found if each.end in part.nodes):
            seen = _Seen()
            for before, after in zip(theirs, ours, strict=True):
                end, held = experts.end, before.values
                values = after.trial(part)
                seen.add(experts, values, held.pop(end) if end in kept else held[end])
                values.clear()
            seen = seen.of_all_processes()
            account.reserve(seen.nbytes)
            [(changes, error)] = ranks.each_once([seen], lambda each: each.solved(damp))
            account.reserve(-seen.nbytes)
            errors[experts.group] = error
            weights = {**program.weights, **changed.weights}
            stored = changed.store(experts.changed(weights, changes))
            for execution in ours[:1]:  # they share their weights
                execution.replace(stored)
        for execution in ours:
            execution.advance(part.nodes)
    names = [outputs.matrix.name for each in found for outputs in each.outputs]
    return FittedExperts(program.with_weights(changed.weights), names, errors, account.peak)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What experts were given for each token, and what the stream behind them lacks.

    Parameters
    ----------
    inputs
        Unit -> inputs of its last matrix times their gates, ``[rows, in]``, and the number of the
        token of each row.
    lacks
        ``[tokens, out]`` for each batch; inputs and lacks are divided by the size of the stream.
    """

    inputs: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    lacks: list[Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        rows = [x for each in self.inputs.values() for pair in each for x in pair]
        return sum(tensor.nbytes for tensor in (*rows, *self.lacks))

    def add(self, experts: Experts, values: Mapping[fx.Node, Any], wanted: Tensor) -> None:
        """Take more tokens, from the values of a batch and what the stream was."""
        size = wanted.shape[-1]
        wanted = wanted.reshape(-1, size)
        squares = wanted.float().square().mean(-1)
        scale = squares.clamp(min=max(float(squares.mean()) / 100, 1e-30)).rsqrt()[:, None]
        first = sum(map(len, self.lacks))
        for each in experts.outputs:
            rows, units, tokens = _rows(experts.group, each, values)
            tokens = tokens.to(rows.device)
            rows = rows * scale[tokens]
            for unit in units.unique().tolist():
                mine = (units == unit).to(rows.device)
                self.inputs.setdefault(unit, []).append((rows[mine], tokens[mine] + first))
        self.lacks.append((wanted.float() - values[experts.end].reshape(-1, size)) * scale)

    def of_all_processes(self) -> _Seen:
        """Return what all processes have seen."""
        found, first = _Seen(), 0
        for seen in ranks.each_once([self] * ranks.size(), lambda each: each):
            for unit, rows in seen.inputs.items():
                moved = [(x, tokens + first) for x, tokens in rows]
                found.inputs.setdefault(unit, []).extend(moved)
            found.lacks.extend(seen.lacks)
            first += sum(map(len, seen.lacks))
        return found

    def solved(self, damp: float | None) -> tuple[dict[int, Tensor], tuple[float, float]]:
        """Return the change of every unit, ``[out, in]``, and the error before and after."""
        rows = {unit: _joined(each) for unit, each in sorted(self.inputs.items())}
        lacks = torch.cat(self.lacks).double()
        held = torch.cat([_last(len(each), each.device) for each in self.lacks])
        fitted = {u: (x[~held[at]], at[~held[at]]) for u, (x, at) in rows.items()}
        if damp is None and not bool(held.any()):
            damp = UNTRIED_DAMP
        if damp is not None:
            changes = _together(fitted, lacks, damp)
        else:
            tried = {each: _together(fitted, lacks, each) for each in DAMPS}
            left = {each: _left(rows, lacks, tried[each])[held] for each in DAMPS}
            damp = min(DAMPS, key=lambda each: float(left[each].square().sum()))
            changes = tried[damp]
        judged = held if bool(held.any()) else ~held
        before, after = (
            float(each[judged].square().mean()) for each in (lacks, _left(rows, lacks, changes))
        )
        return _together(rows, lacks, damp), (before, after)


_ByUnit = Mapping[int, tuple[Tensor, Tensor]]


def _rows(
    group: str, outputs: ExpertOutputs, values: Mapping[fx.Node, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs times gates ``[rows, in]``, units and tokens, of rows that add something."""
    use, (_, out, size) = outputs.matrix.uses[0], outputs.matrix.shape
    made, given = values[use.node], values[use.source]
    if not use.right:
        made, given = made.mT, given.mT
    if not use.picks:
        given = given.expand(*made.shape[:-1], size)
    rows, factors = given.reshape(-1, size), outputs.factors(values)
    if values[outputs.end].shape[-1] != out or len(rows) != len(factors):
        raise SelectionError(f"{group}: {outputs.matrix.name} does not give a row for each token")
    routed = factors != 0
    kept = routed.cpu()
    return (
        rows[routed].float() * factors[routed, None].float(),
        outputs.units_of_rows(values)[kept],
        outputs.tokens(values).cpu()[kept],
    )


def _joined(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, tokens = zip(*rows, strict=True)
    return torch.cat(inputs).double(), torch.cat(tokens)


def _last(count: int, device: torch.device) -> Tensor:
    """Return which of so many tokens are not fitted to: neighbors at the end."""
    return torch.arange(count, device=device) >= count - count // HELD_OUT


def _together(rows: _ByUnit, lacks: Tensor, damp: float) -> dict[int, Tensor]:
    """Return the changes of all units that explain most of what is lacking."""
    factors: dict[int, Tensor] = {}
    for unit, (inputs, _) in rows.items():
        factors[unit], failed = torch.linalg.cholesky_ex(damped(inputs.mT @ inputs, damp))
        if int(failed):
            raise CalibrationError(f"expert {unit}: its inputs are too alike: give more data")
    left = lacks.clone()
    changes = {u: lacks.new_zeros(lacks.shape[1], x.shape[1]) for u, (x, _) in rows.items()}
    size = float(left.square().sum())
    for _ in range(SWEEPS):
        moved = 0.0
        for unit, (inputs, tokens) in rows.items():
            wanted = left[tokens] + inputs @ changes[unit].mT
            new = torch.cholesky_solve(inputs.mT @ wanted, factors[unit]).mT
            step = inputs @ (changes[unit] - new).mT
            left.index_add_(0, tokens, step)
            moved += float(step.square().sum())
            changes[unit] = new
        if moved <= STILL * size:
            break
    return changes


def _left(rows: _ByUnit, lacks: Tensor, changes: Mapping[int, Tensor]) -> Tensor:
    """Return what is lacking after some changes."""
    left = lacks.clone()
    for unit, (inputs, tokens) in rows.items():
        left.index_add_(0, tokens, inputs @ changes[unit].mT, alpha=-1)
    return left
