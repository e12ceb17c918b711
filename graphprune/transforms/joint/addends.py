"""Matrices whose products are added up in a residual stream, and what each is multiplied with."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.experts.outputs import ExpertOutputs, end_of_all, expert_outputs
from graphprune.analysis.matrices import Matrix, bias_of, contractions, last_sum
from graphprune.errors import SelectionError
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of
from graphprune.plan.plan import Plan
from graphprune.training.pieces import counterparts
from graphprune.weights.deferred import made

TOWARD = 0.5
"""How far a matrix that lost inputs is drawn from what it would have given to what makes up for
layers before it as well. On published and trained models a half is better than neither, and the
whole way is worse where much went (`tools/REAL_MODELS.md`)."""


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
    toward
        How far what they are fitted to lies on the way from what they add up to now to what the
        original has there, in (0, 1].
    """

    name: str
    matrices: Sequence[tuple[Matrix, Tensor]]
    end: fx.Node
    toward: float = field(default=1.0, kw_only=True)

    @property
    def widths(self) -> dict[int, int]:
        """Unit -> how many inputs it has."""
        return {u: m.shape[2] for m, units in self.matrices for u in units.tolist()}

    @property
    def weights(self) -> set[str]:
        """Names of the weights that hold the matrices."""
        return {matrix.weight for matrix, _ in self.matrices}

    @abstractmethod
    def rows(self, values: Mapping[fx.Node, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs ``[rows, in]``, and unit and number of the token ``[rows]`` of each."""

    def lacks(self, values: Mapping[fx.Node, Any], wanted: Tensor) -> Tensor:
        """Return what the value lacks of what it is fitted to, ``[tokens, out]``."""
        have: Tensor = values[self.end].reshape(wanted.shape)
        return (wanted.float() - have) * self.toward

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
    """A matrix that nothing is refitted together with.

    Parameters
    ----------
    bias
        The parameter that is added to its products alone, which is refitted with it, or "".
    gone
        ``[out, in]``, boolean: elements that are to stay as they are, as units go; None for none.
    """

    bias: str = ""
    gone: Tensor | None = None

    @classmethod
    def of(cls, program: Program, matrix: Matrix, **options: Any) -> Alone | None:
        """Return a matrix of `program` that is multiplied once, with a row of each token, or None.

        What its products are fitted to is the last sum that they go into.
        """
        use = matrix.uses[0]
        if len(matrix.uses) > 1 or matrix.view.ndim != 2 or not use.right or use.picks:
            return None
        end = last_sum(use.node)
        made, ends = (node.meta["val"].shape for node in (use.node, end))
        if made[-1] != len(matrix.view) or not _alike(made[:-1], ends[:-1]):
            return None
        one = torch.zeros(1, dtype=torch.int64)
        return cls(matrix.name, [(matrix, one)], end, bias=bias_of(program, matrix), **options)

    @property
    def matrix(self) -> Matrix:
        """The matrix."""
        return self.matrices[0][0]

    @property
    def adds(self) -> bool:
        """Whether its products are added to something."""
        return self.end is not self.matrix.uses[0].node

    @property
    def widths(self) -> dict[int, int]:
        """How many inputs it has, a one for its bias among them."""
        return {0: self.matrix.shape[2] + bool(self.bias)}

    def lacks(self, values: Mapping[fx.Node, Any], wanted: Tensor) -> Tensor:
        """Return what the value lacks, which is nothing of what goes, ``[tokens, out]``."""
        lacks = super().lacks(values, wanted)
        return lacks if self.gone is None else lacks.masked_fill(self.gone.all(1), 0)

    def rows(self, values: Mapping[fx.Node, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield all rows."""
        inputs = _inputs(self.matrix, values).float()
        if self.gone is not None:
            inputs = inputs.masked_fill(self.gone.all(0), 0)
        if self.bias:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        yield inputs, torch.zeros(len(inputs), dtype=torch.int64), torch.arange(len(inputs))

    def changed(
        self, weights: Mapping[str, Tensor], changes: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weight, and its bias, with the change added."""
        change, size = changes[0], self.matrix.shape[2]
        new = super().changed(weights, {0: change[:, :size]})
        if self.bias:
            old = weights[self.bias]
            new[self.bias] = (old.double() + change[:, size].to(old.device)).to(old.dtype)
        return new


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
    same = counterparts(program, original)

    def as_it_was(weight: str) -> bool:
        return torch.equal(made(original.weights[weight]), made(program.weights[weight]))

    return [
        each
        for each in _behind(program, contractions(program).matrices, merged)
        if each.weights.isdisjoint(merged) and each.end in same
        if each.adds or (layer_of(each.matrix.weight) and as_it_was(each.matrix.weight))
    ]


def behind_cuts(
    program: Program,
    matrices: Sequence[Matrix],
    gone: Mapping[str, Tensor],
    lost: Collection[Matrix],
) -> list[Alone]:
    """Return the matrices that are fitted again once consumers of units that go have been.

    These are, of all that such units reach, the consumers that add to a residual stream, and what
    is within a layer and consumes no unit that goes. The former go a part of the way alone, since
    they give by then what they would have given with all inputs.

    Parameters
    ----------
    program
        The program that loses units.
    matrices
        All matrices of it.
    gone
        Weight name -> boolean mask of what goes.
    lost
        Those of them that lose inputs.
    """
    found = []
    for each in _behind(program, matrices, gone):
        weight = each.matrix.weight
        if each.adds != (each.matrix in lost) or not (each.adds or layer_of(weight)):
            continue
        stays = each.matrix.read(gone[weight])[0] if weight in gone else None
        toward = TOWARD if each.adds else 1.0
        found.append(dataclasses.replace(each, gone=stays, toward=toward))
    return found


def _behind(program: Program, matrices: Sequence[Matrix], weights: Collection[str]) -> list[Alone]:
    """Return the matrices that products with some weights go into, and those of the weights."""
    reached = {use.node for matrix in matrices if matrix.weight in weights for use in matrix.uses}
    waiting = list(reached)
    while waiting:
        new = waiting.pop().users.keys() - reached
        reached |= new
        waiting += new
    behind = (Alone.of(program, m) for m in matrices if m.uses[0].node in reached)
    return [each for each in behind if each is not None]


def _alike(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return whether sizes that inputs alone decide are as many rows in both."""
    known = not free_unbacked_symbols([*some, *others])
    return known and bool(statically_known_true(math.prod(some) == math.prod(others)))


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
