"""Folding what removed branches added into the matrices that are left.

Where a run of neighboring branches goes, the branch before it can take over a linear part of what
they added: its last matrix is refitted so that the residual stream behind it is as near as can be
to what the original has behind the run. Nothing is added to the program.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from graphprune.analysis.matrices import Matrix, Use, bias_of, contractions
from graphprune.analysis.residual.branches import Branches, ResidualBranch
from graphprune.calibration.damping import DAMPS
from graphprune.calibration.data import Calibration, own_batches
from graphprune.calibration.layerwise import BatchExecution, ChangedWeights, unpadded
from graphprune.calibration.segments import segments
from graphprune.errors import PlanError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.aten import RESHAPES, is_copy, name_of
from graphprune.ir.interpreter import Memory, ancestors, zeroing
from graphprune.ir.program import Program
from graphprune.transforms.joint.sums import HeldOutSums, held_out, of_all_tokens

Fold = Literal["linear", "stream"]
"""What is refitted: what precedes each run of branches that go, or each branch behind it, too."""


@dataclass(frozen=True, eq=False)
class Joint:
    """A branch that is left, and where the stream is to be as the original's.

    Parameters
    ----------
    branch, matrix
        The branch and its last matrix, whose output is what the branch adds.
    end
        The original's stream behind the branches that go after it, if any do.
    """

    branch: ResidualBranch
    matrix: Matrix
    end: fx.Node

    @property
    def use(self) -> Use:
        """The contraction of the matrix."""
        return self.matrix.uses[0]


def joints(branches: Branches, gone: Collection[str], fold: Fold) -> list[Joint]:
    """Return the branches that are refitted when those called `gone` go, in order.

    Raises
    ------
    PlanError
        When nothing precedes a run, or what does adds something else than a matrix's output, such
        as one that is normalized.
    """
    ends: dict[ResidualBranch, fx.Node] = {}
    last: ResidualBranch | None = None
    for node, together in itertools.groupby(branches.all, lambda branch: branch.sum.node):
        inside = list(together)
        left = [branch for branch in inside if branch.name not in gone]
        if left:
            last = left[-1]
            if ends and fold == "stream":
                ends |= dict.fromkeys(left, node)
            elif len(left) < len(inside):
                ends[last] = node
        elif last is None:
            raise PlanError(f"{inside[0].name} cannot be folded: no branch precedes it")
        else:
            ends[last] = node
    matrices = contractions(branches.program).matrices
    return [_joint(branch, end, matrices) for branch, end in ends.items()]


def _joint(branch: ResidualBranch, end: fx.Node, matrices: Sequence[Matrix]) -> Joint:
    node = branch.term
    while is_copy(node) or name_of(node) in RESHAPES:
        node = node.all_input_nodes[0]
    for matrix in matrices:
        single = len(matrix.uses) == 1 and matrix.shape[0] == 1
        if single and matrix.uses[0].node is node:
            return Joint(branch, matrix, end)
    raise PlanError(
        f"{branch.name} cannot take over what is removed behind it: what it adds is no output of a "
        f"matrix, but of {name_of(node)}"
    )


_DAMPS = (*DAMPS, 3.0, 10.0)


def _best_change(sums: HeldOutSums) -> tuple[Tensor, float]:
    """Return the change ``[out, in]``, and the part of the held-out squares that it leaves.

    Where a fit predicts tokens that it did not see no better than none, there is none.
    """
    sums.add_up_over_ranks()
    damp, before, after = sums.best(_DAMPS)
    if not sums.held.any or after >= before:
        return torch.zeros_like(sums.held.crosses[0].mT), 1.0
    return sums.changes(damp)[0], after / before


def fold_branches(
    branches: Branches,
    gone: Collection[str],
    calibration: Calibration,
    fold: Fold = "linear",
    track: Progress = no_progress,
) -> tuple[Program, dict[str, float]]:
    """Return the program with what branches called `gone` add folded into those that are left.

    With x the inputs of the last matrix W of a branch that is left, s the stream behind the branch
    and t what the original has there, or behind the run that goes after it, W takes the change D
    that makes D x nearest to t - s in least squares. How much D is damped is what rows ask for that
    a fit did not see; where they ask for none, W stays. Branches follow each other: s and x are
    those of the program without what goes, with the changes so far.

    Parameters
    ----------
    branches
        The branches of the program.
    gone
        Those that are to be removed of what is returned.
    calibration
        Batches to run it on.
    fold
        linear: the branch before each run that goes. stream: every branch behind it as well.
    track
        Wraps the loop over layers in a progress bar.

    Returns
    -------
    Program, dict
        The program, still with all its branches; name of a branch that was refitted -> the part of
        what the stream lacked, in squares, that it still lacks on rows that were held out.

    Raises
    ------
    PlanError
        As `joints` does.
    CalibrationError
        When the batches do not fit the program.
    """
    program = branches.program
    held = joints(branches, gone, fold)
    calibration.check(program)
    ends = {joint.end for joint in held}
    sums = {joint.branch.sum.node for joint in held}
    needed = ancestors([*ends, *sums])
    parts = segments(program, among=needed)
    nodes, memory = [part.nodes for part in parts], Memory()
    batches = list(unpadded(calibration))
    own = [batches[at] for at in own_batches(batches)]
    whole = BatchExecution.of_all(program, own, nodes, memory=memory, goals=ends)
    for part in nodes:
        for execution in whole:
            execution.advance(part)
    computes = itertools.repeat(zeroing({branches.named(name).term for name in gone}))
    thin = BatchExecution.of_all(program, own, nodes, memory=memory, computes=computes)
    changed, errors = ChangedWeights(program, nodes, memory), dict[str, float]()
    for part in track(parts, "folding what goes"):
        inside = set(part.nodes)
        for joint in (joint for joint in held if joint.branch.sum.node in inside):
            bias = bias_of(program, joint.matrix)
            _, outputs, inputs = joint.matrix.shape
            fit = HeldOutSums.empty({0: inputs + bool(bias)}, outputs, program.device)
            for execution, original in zip(thin, whole, strict=True):
                values = execution.trial(part)
                stream = values[joint.branch.sum.node]
                lacking = original.values[joint.end] - stream
                for _, rows in joint.use.rows(values):
                    one = rows.new_ones(len(rows), int(bool(bias)))
                    given = of_all_tokens(torch.cat([rows, one], 1))
                    held_back = held_out(len(rows), rows.device)
                    fit.add(given, lacking.reshape(-1, outputs), held_back)
                values.clear()
            change, errors[joint.branch.name] = _best_change(fit)
            new = _changed(program, {**program.weights, **changed.weights}, joint, bias, change)
            stored = changed.store(new)
            for execution in thin:
                execution.replace(stored)
        for execution in thin:
            execution.advance(part.nodes)
    return program.with_weights(changed.weights), errors


def _changed(
    program: Program, weights: Mapping[str, Tensor], joint: Joint, bias: str, change: Tensor
) -> dict[str, Tensor]:
    """Return the new matrix, and bias where it has one."""
    name = joint.matrix.weight
    old = weights[name]
    change = change.to(old.device)
    moved = joint.matrix.read(old).double() + change[None, :, : joint.matrix.shape[2]]
    new = {name: joint.matrix.write(old, moved.to(old.dtype))}
    if bias:
        new[bias] = (weights[bias].double() + change[:, -1]).to(weights[bias].dtype)
    return new
