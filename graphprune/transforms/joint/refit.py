"""Refitting matrices together, so that what they add to a stream is again what it was.

Where experts went, tokens are sent to others; where KV heads were merged, attention gives something
else. The last matrices of the experts that stay, or those behind the merged heads, are then the
least squares estimate of the stream as it was. Experts are fitted together, since a token is a sum
over those that it is now sent to: one after the other and again until nothing moves (block
Gauss-Seidel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from graphprune import ranks
from graphprune.calibration.data import Calibration, own_batches
from graphprune.calibration.layerwise import BatchExecution, ChangedWeights, unpadded
from graphprune.calibration.segments import segments
from graphprune.errors import SelectionError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import Memory, Segment, ancestors, call
from graphprune.ir.program import Program
from graphprune.training.pieces import counterparts
from graphprune.transforms.joint.addends import Addends
from graphprune.transforms.joint.seen import Seen
from graphprune.transforms.sparsity import check_values
from graphprune.verification.masked_reference import MaskedReference


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

    def after(self, other: Fitted) -> Fitted:
        """Return what this and the `other` before it gave together."""
        errors = {n: (other.errors.get(n, pair)[0], pair[1]) for n, pair in self.errors.items()}
        return Fitted(self.program, self.names, errors, max(self.peak_bytes, other.peak_bytes))


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
        lambda_u as a part of the mean square of u's inputs; None for what the number of tokens
        asks for, or, of matrices that are fitted together, what predicts tokens best that a fit did
        not see.
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
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    ordered = sorted(together, key=lambda each: order[each.matrices[0][0].uses[0].node])
    matrices = [matrix for each in ordered for matrix, _ in each.matrices]
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
        inside = [each for each in ordered if each.end in part.nodes]
        for stage in _stages(inside, part, lambda each: theirs.part_of(goals[each.end])):
            seen = [Seen.nothing(each, program.device) for each in stage]
            first = part.up_to([each.end for each in stage])
            wanted = zip(*(theirs.values(goals[each.end]) for each in stage), strict=True)
            for execution, streams in zip(ours, wanted, strict=True):
                values = execution.trial(first)
                for each, rows, stream in zip(stage, seen, streams, strict=True):
                    rows.add(each, values, stream)
                values.clear()
            seen = [rows.of_all_processes() for rows in seen]
            taken = sum(rows.nbytes for rows in seen)
            account.reserve(taken)
            solved = list(ranks.each_once(seen, lambda rows: rows.solved(damp)))
            account.reserve(-taken)
            for each, (changes, error) in zip(stage, solved, strict=True):
                errors[each.name] = error
                if not changes:
                    continue
                given = {**program.weights, **changed.weights}
                stored = changed.store(each.changed(given, changes))
                for execution in ours[:1]:  # they share their weights
                    execution.replace(stored)
        for execution in ours:
            execution.advance(part.nodes)
    names = [matrix.name for matrix in matrices]
    return Fitted(program.with_weights(changed.weights), names, errors, account.peak)


def _stages(
    together: Sequence[Addends], part: Segment, part_of: Callable[[Addends], int]
) -> Iterator[list[Addends]]:
    """Divide what is refitted in a part, in order, so that none changes what others are given.

    All of a stage are compared with values of one part of the original.
    """
    stage, before = list[Addends](), set(part.inputs)
    for each in together:
        products = {use.node for other in stage for m, _ in other.matrices for use in m.uses}
        depends = not products.isdisjoint(ancestors([each.end], before))
        if stage and (depends or part_of(each) != part_of(stage[0])):
            yield stage
            stage = []
        stage.append(each)
    if stage:
        yield stage


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

    def part_of(self, goal: fx.Node) -> int:
        """Return the number of the part that `goal` is computed in."""
        return self._where[goal]

    def values(self, goal: fx.Node) -> Iterator[Tensor]:
        """Yield what it has at `goal` for each batch, once."""
        while self._done <= self.part_of(goal):
            for execution in self._executions:
                execution.advance(self._parts[self._done])
            self._done += 1
        for execution in self._executions:
            held = execution.values
            yield held.pop(goal) if goal in self._ends else held[goal]
