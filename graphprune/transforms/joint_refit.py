"""Refitting matrices together, so that what they add to a stream is again what it was.

Where experts went, tokens are sent to others; where KV heads were merged, attention gives something
else. The last matrices of the experts that stay, or those behind the merged heads, are then the
least squares estimate of the stream as it was. Experts are fitted together, since a token is a sum
over those that it is now sent to: one after the other and again until nothing moves (block
Gauss-Seidel), on products of pairs of each expert's own inputs alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.experts.outputs import ExpertOutputs, end_of_all, expert_outputs
from graphprune.analysis.matrices import Matrix, contractions, last_sum
from graphprune.calibration.damping import DAMPS, UNTRIED_DAMP, damped
from graphprune.calibration.data import Calibration, own_batches
from graphprune.calibration.layerwise import BatchExecution, ChangedWeights, unpadded
from graphprune.calibration.segments import segments
from graphprune.errors import CalibrationError, SelectionError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import Memory, ancestors, call
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.training.local import squares_of_rows
from graphprune.training.pieces import counterparts
from graphprune.transforms.sparsity import check_values
from graphprune.verification.masked_reference import MaskedReference

HELD_OUT = 8
"""One in so many tokens, the last ones of each batch, is not fitted to: what predicts them best is
the damping."""

SWEEPS, STILL = 100, 1e-8
"""How often all experts are fitted in turn at most, and the part of what is left to be explained by
which a sweep that changes less is the last."""


@dataclass(frozen=True)
class Fitted:
    """What refitting matrices together gave.

    Parameters
    ----------
    program
        The program, of the size that it had.
    names
        What was refitted.
    errors
        What was refitted together -> the squared error at the stream, as a part of the stream,
        before and after a fit to the other tokens: on those that the damping was chosen by.
    peak_bytes
        The most that activations and rows took together.
    """

    program: Program
    names: list[str]
    errors: dict[str, tuple[float, float]]
    peak_bytes: int


@dataclass(frozen=True, eq=False)
class Addends(ABC):
    """Matrices whose products are added up in one value, such as a residual stream.

    Parameters
    ----------
    name
        What they are together.
    matrices
        Each with the unit that each of its parts is.
    end
        The value.
    """

    name: str
    matrices: Sequence[tuple[Matrix, Tensor]]
    end: fx.Node

    @property
    def weights(self) -> set[str]:
        """Names of the weights that hold the matrices."""
        return {matrix.weight for matrix, _ in self.matrices}

    @abstractmethod
    def rows(self, values: Mapping[fx.Node, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs ``[rows, in]``, and unit and number of the token ``[rows]`` of each."""

    def changed(
        self, weights: Mapping[str, Tensor], changes: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weights with the changes, which are by unit, added to their matrices."""
        new: dict[str, Tensor] = {}
        for matrix, units in self.matrices:
            weight = new.get(matrix.weight, weights[matrix.weight])
            values = matrix.read(weight).double()
            for part, unit in enumerate(units.tolist()):
                if unit in changes:
                    values[part] += changes[unit]
            new[matrix.weight] = matrix.write(weight, values)
        return new


@dataclass(frozen=True, eq=False)
class Experts(Addends):
    """The last matrices of the experts of one layer; inputs are those times their gates."""

    outputs: Sequence[ExpertOutputs]

    def rows(self, values: Mapping[fx.Node, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the rows that add something."""
        for each in self.outputs:
            rows, factors = _inputs(each.matrix, values), each.factors(values)
            width = values[each.end].shape[-1]
            if width != each.matrix.shape[1] or len(rows) != len(factors):
                raise SelectionError(f"{self.name}: {each.matrix.name} gives no row for each token")
            routed = factors != 0
            kept = routed.cpu()
            inputs = rows[routed].float() * factors[routed, None].float()
            yield inputs, each.units_of_rows(values)[kept], each.tokens(values).cpu()[kept]


@dataclass(frozen=True, eq=False)
class Alone(Addends):
    """A matrix that nothing is refitted together with."""

    def rows(self, values: Mapping[fx.Node, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield all rows."""
        inputs = _inputs(self.matrices[0][0], values).float()
        yield inputs, torch.zeros(len(inputs), dtype=torch.int64), torch.arange(len(inputs))


def experts_of(program: Program, coupling: Coupling, plan: Plan) -> list[Experts]:
    """Return the experts of every layer in which `plan` takes some.

    Raises
    ------
    SelectionError
        When their outputs cannot be followed, or are not linear in their last matrices.
    """
    found = []
    cuts = {cut.group for step in plan.steps for cut in step.cuts if cut.role == "expert"}
    for name in sorted(cuts):
        group = coupling.group(name)
        outputs = expert_outputs(program, group, coupling.sizes(group))
        if not all(each.linear for each in outputs):
            raise SelectionError(f"{name}: more is done to its outputs than weighing them")
        matrices = [(each.matrix, each.units) for each in outputs]
        found.append(Experts(name, matrices, end_of_all(group, outputs), outputs))
    return found


def behind_merges(program: Program, plan: Plan) -> list[Alone]:
    """Return the first matrices behind the heads that `plan` merged, where they can be refitted.

    Parameters
    ----------
    program
        What the plan made; its graph is followed from the merged weights on.
    plan
        Merges among others.
    """
    merged = {m.weight for step in plan.steps for each in step.merges for m in each.members}
    matrices = contractions(program).matrices
    uses = {use.node for matrix in matrices for use in matrix.uses}
    own = {use.node for matrix in matrices if matrix.weight in merged for use in matrix.uses}
    reached, waiting = set[fx.Node](), list(own)
    while waiting:
        for user in waiting.pop().users:
            if user not in reached:
                reached.add(user)
                waiting += [] if user in uses else [user]
    return [
        Alone(matrix.name, [(matrix, torch.zeros(1, dtype=torch.int64))], last_sum(node))
        for matrix in matrices
        for node in [matrix.uses[0].node]
        if node in reached and matrix.weight not in merged
        if len(matrix.uses) == 1 and matrix.outer == 0 and matrix.uses[0].right
        if node.meta["val"].shape[-1] == matrix.shape[1]
    ]


def refit_together(
    program: Program,
    original: Program,
    together: Sequence[Addends],
    calibration: Calibration,
    *,
    reference: MaskedReference | None = None,
    damp: float | None = None,
    track: Progress = no_progress,
) -> Fitted:
    """Refit matrices so that the values that they add up to are what `original` has there.

    With x_u the inputs of matrix W_u (of an expert times the gate that a token now has for it), and
    r what the stream lacks of what `original` gives, the changes D_u minimize ``sum over tokens
    |r - sum_u D_u x_u|^2 / |stream|^2 + sum_u lambda_u |D_u|^2``. Layers follow each other, so that
    what went wrong before is made up for as well.

    Parameters
    ----------
    program
        What is refitted.
    original
        What it is to resemble: a program of the same graph, or what it was made of.
    together
        Matrices of `program`.
    calibration
        Batches to run it on.
    reference
        How `program` is run, where units are still to go.
    damp
        lambda_u as a part of the mean square of u's inputs; None for what predicts tokens best
        that a fit did not see, layer by layer.
    track
        Wraps the loop over layers in a progress bar.

    Raises
    ------
    SelectionError
        When matrices hold integers or values that are not finite, do not give a row for each
        token, or add up to what `original` has not.
    CalibrationError
        When the batches do not fit the program, or inputs are too alike in spite of the damping.
    """
    calibration.check(program)
    for name in {name for each in together for name in each.weights}:
        check_values(name, program.weights[name], moved=True)
    goals = _goals(program, original, together)
    matrices = [matrix for each in together for matrix, _ in each.matrices]
    parts = segments(program, matrices, among=ancestors(list(goals)))
    account = Memory()
    batches = list(unpadded(calibration))
    own = [batches[at] for at in own_batches(batches)]
    theirs = _Theirs(original, own, set(goals.values()), account)
    ours = BatchExecution.of_all(
        program,
        own,
        [part.nodes for part in parts],
        memory=account,
        weights=reference.weights if reference else None,
        computes=(reference.computing() if reference else call for _ in own),
    )
    changed = ChangedWeights(program, [part.nodes for part in parts], account)
    errors: dict[str, tuple[float, float]] = {}
    for part in track(parts, "refitting towards the original"):
        for each in (each for each in together if each.end in part.nodes):
            seen = _Seen()
            for wanted, execution in zip(theirs.values(goals[each.end]), ours, strict=True):
                values = execution.trial(part)
                seen.add(each, values, wanted)
                values.clear()
            seen = seen.of_all_processes()
            account.reserve(seen.nbytes)
            [(changes, error)] = ranks.each_once([seen], lambda rows: rows.solved(damp))
            account.reserve(-seen.nbytes)
            errors[each.name] = error
            stored = changed.store(each.changed({**program.weights, **changed.weights}, changes))
            for execution in ours[:1]:  # they share their weights
                execution.replace(stored)
        for execution in ours:
            execution.advance(part.nodes)
    names = [matrix.name for matrix in matrices]
    return Fitted(program.with_weights(changed.weights), names, errors, account.peak)


def _goals(
    program: Program, original: Program, together: Sequence[Addends]
) -> dict[fx.Node, fx.Node]:
    """Return the ends of all -> the same values of the original."""
    if program.graph is original.graph:
        return {each.end: each.end for each in together}
    same = counterparts(program, original)
    for each in together:
        if each.end not in same:
            raise SelectionError(f"{each.name}: the original has no value like what it adds to")
    return {each.end: same[each.end] for each in together}


class _Theirs:
    """The original on its way through its own graph, as far as it was asked for."""

    def __init__(
        self,
        original: Program,
        batches: Sequence[Mapping[str, Tensor]],
        goals: set[fx.Node],
        account: Memory,
    ) -> None:
        parts = segments(original, among=ancestors(list(goals)))
        self._parts = [part.nodes for part in parts]
        self._where = {node: at for at, nodes in enumerate(self._parts) for node in nodes}
        where = self._where
        self._ends = {g for g in goals if max(where.get(u, 0) for u in g.users) <= where[g]}
        self._done = 0
        self._executions = BatchExecution.of_all(
            original, batches, self._parts, memory=account, goals=self._ends
        )

    def values(self, goal: fx.Node) -> Iterator[Tensor]:
        """Yield what it has at `goal` for each batch, once."""
        while self._done <= self._where[goal]:
            for execution in self._executions:
                execution.advance(self._parts[self._done])
            self._done += 1
        for execution in self._executions:
            held = execution.values
            yield held.pop(goal) if goal in self._ends else held[goal]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What matrices were given for each token, and what the stream behind them lacks.

    Parameters
    ----------
    inputs
        Unit -> inputs of its matrix, ``[rows, in]``, and the number of the token of each row.
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

    def add(self, addends: Addends, values: Mapping[fx.Node, Any], wanted: Tensor) -> None:
        """Take more tokens, from the values of a batch and what the stream was."""
        size = wanted.shape[-1]
        wanted = wanted.reshape(-1, size)
        scale = squares_of_rows(wanted).rsqrt()[:, None]
        first = sum(map(len, self.lacks))
        for rows, units, tokens in addends.rows(values):
            tokens = tokens.to(rows.device)
            rows = rows * scale[tokens]
            for unit in units.unique().tolist():
                mine = (units == unit).to(rows.device)
                self.inputs.setdefault(unit, []).append((rows[mine], tokens[mine] + first))
        self.lacks.append((wanted.float() - values[addends.end].reshape(-1, size)) * scale)

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
        tried = DAMPS if bool(held.any()) else (UNTRIED_DAMP,)
        damps = tried if damp is None else (damp,)
        judged = held if bool(held.any()) else ~held
        grams = _grams(fitted)
        after = {
            each: _left(rows, lacks, _together(fitted, grams, lacks, each))[judged].square().mean()
            for each in damps
        }
        best = min(damps, key=lambda each: float(after[each]))
        errors = float(lacks[judged].square().mean()), float(after[best])
        return _together(rows, _grams(rows), lacks, best), errors


_ByUnit = Mapping[int, tuple[Tensor, Tensor]]


def _inputs(matrix: Matrix, values: Mapping[fx.Node, Any]) -> Tensor:
    """Return what a matrix is multiplied with, ``[rows, in]``, in the order of its products."""
    use, size = matrix.uses[0], matrix.shape[2]
    made, given = values[use.node], values[use.source]
    if not use.right:
        made, given = made.mT, given.mT
    if not use.picks:
        given = given.expand(*made.shape[:-1], size)
    rows: Tensor = given.reshape(-1, size)
    return rows


def _joined(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, tokens = zip(*rows, strict=True)
    return torch.cat(inputs).double(), torch.cat(tokens)


def _last(count: int, device: torch.device) -> Tensor:
    """Return which of so many tokens are not fitted to: neighbors at the end."""
    return torch.arange(count, device=device) >= count - count // HELD_OUT


def _grams(rows: _ByUnit) -> dict[int, Tensor]:
    """Return the products of all pairs of inputs, by unit."""
    return {unit: inputs.mT @ inputs for unit, (inputs, _) in rows.items()}


def _together(
    rows: _ByUnit, grams: Mapping[int, Tensor], lacks: Tensor, damp: float
) -> dict[int, Tensor]:
    """Return the changes of all units that explain most of what is lacking."""
    factors: dict[int, Tensor] = {}
    for unit, gram in grams.items():
        factors[unit], failed = torch.linalg.cholesky_ex(damped(gram, damp))
        if int(failed):
            raise CalibrationError("inputs are too alike to refit: give more data or damp")
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
