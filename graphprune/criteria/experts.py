"""Criteria for experts: how often a router chooses each, and what it then adds.

Where an expert ends is read from the graph: its last matrix is found by the units of its parts, and
from there rows are followed, through bias and gate, to the operator that adds them up.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.groups import Group
from graphprune.analysis.matrices import Matrix, Use, contractions
from graphprune.calibration.data import own_batches
from graphprune.calibration.layerwise import BatchExecution, not_run, unpadded
from graphprune.calibration.segments import segments
from graphprune.criteria.base import Criterion, Scores, ScoringContext
from graphprune.criteria.units import unit_numbers
from graphprune.errors import SelectionError
from graphprune.ir.aten import LOOKUPS, RESHAPES, is_copy, name_of, plain_name, printed_name
from graphprune.ir.interpreter import ancestors
from graphprune.ir.nodes import arguments_of

# -- the matrices of experts -----------------------------------------------------------------------


def own_matrices(context: ScoringContext, group: Group) -> list[tuple[Matrix, Tensor]]:
    """Return the matrices whose parts are units of `group`, with the unit of each part.

    Units are ``[parts]``, counted over all parents. What has units along a side of a matrix, as a
    router does, is not among them.

    Raises
    ------
    SelectionError
        When a unit has none, as what is no expert.
    """
    program, sizes = context.program, context.sizes(group)
    found: list[tuple[Matrix, Tensor]] = []
    for matrix, member in itertools.product(contractions(program).matrices, group.members):
        if member.weight != matrix.weight or member.dim:
            continue
        shape = program.weights[matrix.weight].shape
        line = unit_numbers(sizes, group, member, shape[0])
        # Elements between the first and the last of a part lie between them along dimension 0.
        first, last = (at // math.prod(shape[1:]) for at in _ends(matrix))
        if bool((line[first] == line[last]).all()) and (len(first) > 1 or member.owner is not None):
            found.append((matrix, line[first]))
    held = {unit for _, units in found for unit in units.tolist()}
    if not held >= set(range(math.prod(sizes))):
        raise SelectionError(f"{group.name}: its units are no experts, with matrices of their own")
    return found


def _ends(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Return where in the weight the first and the last element of each part are: ``[parts]``."""
    view, first = matrix.view, torch.tensor([matrix.view.storage_offset()])
    for size, stride in zip(view.shape[: matrix.outer], view.stride(), strict=False):
        first = (first[:, None] + torch.arange(size) * stride).flatten()
    inner = zip(view.shape[matrix.outer :], view.stride()[matrix.outer :], strict=True)
    return first, first + sum((size - 1) * stride for size, stride in inner)


# -- where their outputs are added up --------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Outputs of experts, one for each token that an expert computed: ``[rows]`` each.

    Parameters
    ----------
    tokens
        Number of the token that it is added to.
    units
        Which unit it comes from, counted over all parents.
    norms
        Its length as it is added.
    gates
        What it was multiplied with before; one where the graph multiplies no output.
    routed
        Whether it adds anything: some code computes all experts for all tokens.
    """

    tokens: Tensor
    units: Tensor
    norms: Tensor
    gates: Tensor
    routed: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all `parts`."""
        return cls(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))

    @property
    def shares(self) -> Tensor:
        """Lengths with the gates of every token made to sum to one."""
        tokens, numbers = self.tokens.unique(return_inverse=True)
        sums = self.gates.new_zeros(len(tokens)).index_add_(0, numbers, self.gates)
        return torch.where(self.routed, self.norms / sums[numbers], 0)


@dataclass(frozen=True, eq=False)
class ExpertOutputs:
    """Where a graph adds up the outputs of a matrix of experts.

    Parameters
    ----------
    use
        Its contraction.
    units
        ``[parts]``: the unit that each part of the matrix is.
    end
        The outputs as they are added up, behind their gates.
    gates
        What outputs are multiplied with, each with the outputs before.
    sum
        The operator that adds them up.
    """

    use: Use
    units: Tensor
    end: fx.Node
    gates: tuple[tuple[fx.Node, fx.Node], ...]
    sum: fx.Node

    def rows(self, values: Mapping[fx.Node, Any]) -> Rows:
        """Return the rows, from the values before `sum`."""
        outputs = values[self.end]
        norms = outputs.double().norm(dim=-1).flatten()
        gates = torch.ones_like(norms)
        for gate, before in self.gates:
            gates *= values[gate].double().expand_as(values[before])[..., 0].flatten()
        if self.use.picks:
            units = self.units[values[self.use.picks[0]].flatten().cpu()]
        else:
            units = self.units.repeat_interleave(len(norms) // len(self.units))
        routed = (gates if self.gates else norms) != 0
        tokens = self._tokens(values, outputs.shape[:-1]).flatten().to(norms.device)
        return Rows(tokens, units.to(norms.device), norms, gates.abs(), routed)

    def _tokens(self, values: Mapping[fx.Node, Any], form: torch.Size) -> Tensor:
        """Return a number of the token that each row is added to; rows have this `form`."""
        given, how = arguments_of(self.sum), plain_name(self.sum)
        if how == "sum":
            summed = {dim % (len(form) + 1) for dim in given["dim"]}
            left = [1 if dim in summed else size for dim, size in enumerate(form)]
            return torch.arange(math.prod(left)).view(left).expand(form)
        if how == "index_add":
            index: Tensor = values[given["index"]]
            return index
        if how == "index_put":
            whole = values[given["self"]].shape[:-1]
            indices = (slice(None) if at is None else values[at].cpu() for at in given["indices"])
            return torch.arange(math.prod(whole)).view(whole)[tuple(indices)]
        return torch.arange(math.prod(form))


def expert_outputs(context: ScoringContext, group: Group) -> list[ExpertOutputs]:
    """Return where the outputs of the units of `group` are added up, each unit once.

    Raises
    ------
    SelectionError
        When a unit is no expert, or its outputs cannot be followed, with the operator.
    """
    owned = own_matrices(context, group)
    last = {unit: matrix for matrix, units in owned for unit in units.tolist()}
    weights = {node for name, node in context.program.weight_nodes() if name in group.weights()}
    found = []
    for matrix, units in owned:
        if matrix not in last.values():
            continue
        if len(matrix.uses) != 1:
            raise SelectionError(f"{group.name}: {matrix.name} is used more than once")
        found.append(_followed(group, matrix.uses[0], units, weights))
    return found


def _followed(group: Group, use: Use, units: Tensor, weights: Collection[fx.Node]) -> ExpertOutputs:
    """Follow the outputs of a contraction to where they are added up."""
    end, gates = use.node, list[tuple[fx.Node, fx.Node]]()
    if not use.picks and len(units) > 1 and end.meta["val"].ndim != 3:
        raise SelectionError(f"{group.name}: {printed_name(end.target)} has no row of experts")
    while True:
        users = [user for user in end.users if name_of(user) != "sym_size"]
        user, how = users[0], plain_name(users[0])
        others = [other for other in user.all_input_nodes if other is not end]
        if len(users) > 1:
            break
        if how in ("mul", "div"):
            gates += [(other, end) for other in others if other.meta["val"].shape[-1:] == (1,)]
        elif how == "add" and others and _stored(others[0]) in weights:
            pass  # a bias
        elif not (is_copy(user) or how in RESHAPES or _of_one(user)):
            break
        end = user
    if len(users) == 1 and _adds_up(user, end):
        return ExpertOutputs(use, units, end, tuple(gates), user)
    raise SelectionError(
        f"{group.name}: the outputs of its units go into {printed_name(user.target)}, which is no "
        "sum of them"
    )


def _stored(node: fx.Node) -> fx.Node:
    """Return the weight that `node` holds rows of, or the first value that is more than that."""
    while is_copy(node) or name_of(node) in RESHAPES | LOOKUPS:
        node = node.all_input_nodes[0]
    return node


def _of_one(node: fx.Node) -> bool:
    """Return whether `node` takes the only index of a dimension."""
    given = arguments_of(node)
    return plain_name(node) == "select" and given["self"].meta["val"].shape[given["dim"]] == 1


def _adds_up(node: fx.Node, rows: fx.Node) -> bool:
    """Return whether `node` adds `rows` to the tokens that they belong to."""
    given, how = arguments_of(node), plain_name(node)
    if how == "sum":
        last = rows.meta["val"].ndim - 1
        return bool(given.get("dim")) and all(dim % (last + 1) != last for dim in given["dim"])
    if how == "index_add":
        return given["dim"] == 0 and given["source"] is rows
    return how == "add" or (how == "index_put" and given["values"] is rows)


# -- the criteria ----------------------------------------------------------------------------------


class ExpertCriterion(Criterion):
    """Scores experts by the rows that each computes on calibration data."""

    requires_calibration = True

    def scores(self, context: ScoringContext) -> Scores:
        """Run the data through the graph as far as the last experts.

        Raises
        ------
        SelectionError
            When a group is not one of experts whose outputs can be followed.
        CalibrationError
            Without calibration data that fit the program.
        """
        found = {group.name: expert_outputs(context, group) for group in context.groups}
        seen = {
            group.name: torch.zeros(2, math.prod(context.sizes(group)), dtype=torch.float64)
            for group in context.groups
        }
        for name, rows in _rows_of_all(context, found):
            shares, routed = rows.shares.cpu(), rows.routed.double().cpu()
            seen[name].index_add_(1, rows.units.cpu(), torch.stack([shares, routed]))
        ranks.sum_of(seen.values())
        return {
            group.name: self.of_sums(*seen[group.name]).view(context.sizes(group))
            for group in context.groups
        }

    @abstractmethod
    def of_sums(self, shares: Tensor, routed: Tensor) -> Tensor:
        """Return scores ``[units]`` of the sum of `Rows.shares` and the number of rows, of each."""


def _rows_of_all(
    context: ScoringContext, found: Mapping[str, Sequence[ExpertOutputs]]
) -> Iterator[tuple[str, Rows]]:
    """Yield the rows of every group and batch, by name of the group, as they are computed."""
    program = context.program
    at = {outputs.sum: (name, outputs) for name, each in found.items() for outputs in each}
    needed = ancestors([other for node in at for other in node.all_input_nodes])
    parts = [part.nodes for part in segments(program, among=needed | at.keys())]
    batches = list(unpadded(context.data()))
    own = [batches[index] for index in own_batches(batches)]
    idle = itertools.repeat(not_run(at.keys() - needed))
    executions = BatchExecution.of_all(program, own, parts, computes=idle)
    waiting: list[dict[str, list[Rows]]] = [defaultdict(list) for _ in executions]
    for part in context.track(parts, "counting what experts add"):
        for execution, held in zip(executions, waiting, strict=True):

            def look(
                node: fx.Node, values: Mapping[fx.Node, Any], held: dict[str, list[Rows]] = held
            ) -> None:
                if node in at:
                    name, outputs = at[node]
                    held[name].append(outputs.rows(values))

            execution.advance(part, look)
            for name in [name for name, rows in held.items() if len(rows) == len(found[name])]:
                yield name, Rows.joined(held.pop(name))


class Reap(ExpertCriterion):
    """What an expert adds to the tokens that are sent to it: the mean of g ||f(x)|| over these.

    Router-weighted expert activation pruning (Lasby et al. 2510.13999, equation 9), with the gates
    g of the experts that a token is sent to made to sum to one. An expert that no token is sent to
    scores zero. It depends on the kind of text more than others do: 2603.18492 finds half of the
    experts chosen on web text worse for code than experts chosen without data.
    """

    name = "reap"

    def of_sums(self, shares: Tensor, routed: Tensor) -> Tensor:
        """Return the mean."""
        return shares / routed.clamp(min=1)


class Frequency(ExpertCriterion):
    """How many tokens are sent to an expert: the baseline of `reap`."""

    name = "frequency"

    def of_sums(self, shares: Tensor, routed: Tensor) -> Tensor:
        """Return the number."""
        return routed


class Aimer(Criterion):
    """How unlike each other the weights of an expert are: 1 - mean |w| / root mean w^2, no data.

    AIMER (Liu et al. 2603.18492) removes the experts whose absolute mean is largest for their root
    mean square, over all elements of an expert's matrices.
    """

    name = "aimer"

    def scores(self, context: ScoringContext) -> Scores:
        """Take sums over the matrices of every unit.

        Raises
        ------
        SelectionError
            When a group is not one of experts.
        """
        found = {}
        for group in context.track(context.groups, "scoring experts"):
            count = math.prod(context.sizes(group))
            sums = torch.zeros(3, count, dtype=torch.float64)
            for matrix, units in own_matrices(context, group):
                parts = matrix.read(context.weight(matrix.weight)).flatten(1)
                for unit, part in zip(units.tolist(), parts, strict=True):
                    wide = part.double()
                    sums[:, unit] += torch.stack(
                        [wide.abs().sum(), wide.square().sum(), wide.new_tensor(len(wide))]
                    ).cpu()
            total, squares, number = sums
            ratio = total / (number * squares).sqrt().clamp(min=torch.finfo(sums.dtype).tiny)
            found[group.name] = (1 - ratio).view(context.sizes(group))
        return found
