"""Where experts end in a graph: their matrices, and how their outputs are added up.

An expert's last matrix is found by the units of its parts, and from there rows are followed,
through bias and gate, to the operator that adds them up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.groups import Group, unit_numbers
from graphprune.analysis.matrices import Matrix, contractions, last_sum
from graphprune.errors import SelectionError
from graphprune.ir.aten import LOOKUPS, RESHAPES, is_copy, name_of, plain_name, printed_name
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program

# -- the matrices of experts -----------------------------------------------------------------------


def own_matrices(
    program: Program, group: Group, sizes: Sequence[int]
) -> list[tuple[Matrix, Tensor]]:
    """Return the matrices whose parts are units of `group`, with the unit of each part.

    Units are ``[parts]``, counted over all parents; `sizes` are the sizes of these, and its own.
    What has units along a side of a matrix, as a router does, is not among them.

    Raises
    ------
    SelectionError
        When a unit has none, as what is no expert.
    """
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


@dataclass(frozen=True, eq=False)
class ExpertOutputs:
    """Where a graph adds up the outputs of a matrix of experts.

    Parameters
    ----------
    matrix
        The matrix.
    units
        ``[parts]``: the unit that each part of the matrix is.
    end
        The outputs as they are added up, behind their gates.
    gates
        The operators that multiply or divide outputs by one number a row, each with the outputs
        before.
    sum
        The operator that adds them up.
    linear
        Whether nothing else is done to outputs, so that what is added up is a product of the
        matrix, but for a bias.
    """

    matrix: Matrix
    units: Tensor
    end: fx.Node
    gates: tuple[tuple[fx.Node, fx.Node], ...]
    sum: fx.Node
    linear: bool

    def units_of_rows(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """Return the unit that each row comes from: ``[rows]``."""
        if picks := self.matrix.uses[0].picks:
            return self.units[values[picks[0]].flatten().cpu()]
        return self.units.repeat_interleave(self._form(values).numel() // len(self.units))

    def factors(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """Return what each row is multiplied with: ``[rows]``, float64."""
        found = torch.ones(self._form(values), dtype=torch.float64, device=values[self.end].device)
        for scales, before in self.gates:
            factor = _other(scales, before)
            if isinstance(factor, fx.Node):
                value = values[factor].double()
                factor = value.expand(values[before].shape)[..., 0].reshape(found.shape)
            found = found / factor if plain_name(scales) == "div" else found * factor
        return found.flatten()

    def tokens(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """Return a number of the token that each row is added to: ``[rows]``."""
        form = self._form(values)
        given, how = arguments_of(self.sum), plain_name(self.sum)
        found: Tensor = torch.arange(form.numel())
        if how == "sum":
            summed = {dim % (len(form) + 1) for dim in given["dim"]}
            left = [1 if dim in summed else size for dim, size in enumerate(form)]
            found = torch.arange(math.prod(left)).view(left).expand(form)
        elif how == "index_add":
            found = values[given["index"]]
        elif how == "index_put":
            whole = values[given["self"]].shape[:-1]
            indices = (slice(None) if at is None else values[at].cpu() for at in given["indices"])
            found = torch.arange(math.prod(whole)).view(whole)[tuple(indices)]
        return found.flatten()

    def _form(self, values: Mapping[fx.Node, Any]) -> torch.Size:
        """Return the sizes of the outputs but the last."""
        form: torch.Size = values[self.end].shape[:-1]
        return form


def expert_outputs(program: Program, group: Group, sizes: Sequence[int]) -> list[ExpertOutputs]:
    """Return where the outputs of the units of `group` are added up, each unit once.

    Raises
    ------
    SelectionError
        When a unit is no expert, or its outputs cannot be followed, with the operator.
    """
    owned = own_matrices(program, group, sizes)
    last = {unit: matrix for matrix, units in owned for unit in units.tolist()}
    weights = {node for name, node in program.weight_nodes() if name in group.weights()}
    found = []
    for matrix, units in owned:
        if matrix not in last.values():
            continue
        if len(matrix.uses) != 1:
            raise SelectionError(f"{group.name}: {matrix.name} is used more than once")
        found.append(_followed(group, matrix, units, weights))
    return found


def _followed(
    group: Group, matrix: Matrix, units: Tensor, weights: Collection[fx.Node]
) -> ExpertOutputs:
    """Follow the outputs of a contraction to where they are added up."""
    use = matrix.uses[0]
    end, gates, linear = use.node, list[tuple[fx.Node, fx.Node]](), True
    if not use.picks and len(units) > 1 and end.meta["val"].ndim != 3:
        raise SelectionError(f"{group.name}: {printed_name(end.target)} has no row of experts")
    while True:
        users = [user for user in end.users if name_of(user) != "sym_size"]
        user, how = users[0], plain_name(users[0])
        others = [other for other in user.all_input_nodes if other is not end]
        if len(users) > 1:
            break
        if how == "mul" or (how == "div" and user.args[0] is end):
            if all(other.meta["val"].shape[-1:] in ((), (1,)) for other in others):
                gates.append((user, end))
            else:
                linear = False
        elif how == "add" and others and _stored(others[0]) in weights:
            pass  # a bias
        elif not (is_copy(user) or how in RESHAPES or _of_one(user)):
            break
        end = user
    if len(users) == 1 and _adds_up(user, end):
        return ExpertOutputs(matrix, units, end, tuple(gates), user, linear)
    raise SelectionError(
        f"{group.name}: the outputs of its units go into {printed_name(user.target)}, which is no "
        "sum of them"
    )


def _other(node: fx.Node, before: fx.Node) -> Any:
    """Return what `node` multiplies or divides `before` by: a node or a number."""
    given = arguments_of(node)
    return given["other"] if given["self"] is before else given["self"]


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


def end_of_all(group: Group, outputs: Sequence[ExpertOutputs]) -> fx.Node:
    """Return the value behind the sum of all experts of a layer, with what else is added to it.

    It is the stream where they are added to it at once. Its rows are tokens in the order in which
    they are numbered.

    Raises
    ------
    SelectionError
        When the experts do not come together in one value.
    """
    ends = {last_sum(each.sum) for each in outputs}
    if len(ends) != 1:
        raise SelectionError(
            f"{group.name}: the outputs of its units are not added up in one value"
        )
    return ends.pop()
