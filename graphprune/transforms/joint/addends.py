"""Matrices whose products are added up in a residual stream, and what each is multiplied with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.experts.outputs import ExpertOutputs, end_of_all, expert_outputs
from graphprune.analysis.matrices import Matrix, contractions, last_sum
from graphprune.errors import SelectionError
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of
from graphprune.plan.plan import Plan
from graphprune.training.pieces import counterparts
from graphprune.weights.deferred import made


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
                    values[part] += changes[unit].to(values.device)
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


def behind_merges(program: Program, plan: Plan, original: Program) -> list[Alone]:
    """Return the matrices that merged heads reach and that can be fitted to what `original` has.

    Those that add to the residual stream are, and those within a layer whose products still mean
    what they did: neither merged nor moved to another basis for the merge.

    Parameters
    ----------
    program
        What the plan made; its graph is followed from the merged weights on.
    plan
        Merges among others.
    original
        What the program was made of.
    """
    merged = {m.weight for step in plan.steps for each in step.merges for m in each.members}
    matrices = contractions(program).matrices
    reached, same = set[fx.Node](), counterparts(program, original)
    waiting = [use.node for matrix in matrices if matrix.weight in merged for use in matrix.uses]
    while waiting:
        new = waiting.pop().users.keys() - reached
        reached |= new
        waiting += new

    def as_it_was(weight: str) -> bool:
        return torch.equal(made(original.weights[weight]), made(program.weights[weight]))

    return [
        Alone(matrix.name, [(matrix, torch.zeros(1, dtype=torch.int64))], end)
        for matrix in matrices
        for node in [matrix.uses[0].node]
        if node in reached and matrix.weight not in merged
        if len(matrix.uses) == 1 and matrix.outer == 0 and matrix.uses[0].right
        if node.meta["val"].shape[-1] == matrix.shape[1] and (end := last_sum(node)) in same
        if end is not node or (layer_of(matrix.weight) and as_it_was(matrix.weight))
    ]


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
