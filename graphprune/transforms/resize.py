"""Changing the sizes of axes in a graph: literals follow and weights are gathered."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.axes import Axis
from graphprune.analysis.axis_cuts import AxisCut, AxisCuts, is_cut, kept_indices, kept_size
from graphprune.analysis.operators.facts import MeanLiteral, Type
from graphprune.analysis.typed_graph import Length
from graphprune.analysis.types import Types
from graphprune.errors import RewriteError
from graphprune.ir.interpreter import run_part
from graphprune.ir.nodes import get_argument, set_argument
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path, operator_of
from graphprune.ir.shape_propagation import follow_size, with_graph
from graphprune.transforms.removal import take_out
from graphprune.weights.deferred import cut, later

RESCALE = "rescale"
"""Key in a node's meta: (new size, old size) of a mean whose divisor this multiplication keeps."""


class Resize:
    """A copy of a program's graph in which the units of `cuts` are gone.

    Parameters
    ----------
    types
        The axis types of the program.
    cuts
        Resolved atoms -> what they lose (or gain).

    Raises
    ------
    RewriteError
        When fewer units would be left than are chosen at once, or units that own branches of the
        graph cannot go together.
    """

    def __init__(self, types: Types, cuts: AxisCuts) -> None:
        self.types = types
        self.cuts = cuts
        self.axes = types.axes
        for routing in types.facts.routings:
            if self.touched((routing.axis,)):
                left = kept_size(self.axes, routing.axis, cuts)
                if left < routing.min_units:
                    where = module_path(routing.node) or "the model"
                    raise RewriteError(
                        f"{where} chooses {routing.min_units} units, and {left} are left"
                    )
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        output = self.graph.graph_copy(types.program.graph, self.new)
        self.graph.output(output)
        self._remove_branches()
        self._fold_norms()
        for literal in types.facts.sizes:
            if self.touched((literal.axis,)) and literal.node in self.new:
                node = self.new[literal.node]
                follow_size(node, literal.argument, literal.index, self._ratio(literal.axis))

    # -- branches -------------------------------------------------------------------------------

    def _remove_branches(self) -> None:
        """Take out what belongs to units that go, and number those that stay anew.

        Raises
        ------
        RewriteError
            When they do not go together, naming the operator.
        """
        owners = self.types.owners
        gone = [
            owners[atom].entries[unit]
            for atom, cut in self.cuts.items()
            if atom in owners and isinstance(cut, AxisCut)
            for unit in cut.removed
        ]
        removal = self.types.unit_ownership.without(gone)
        if removal.stuck is not None:
            raise RewriteError(f"{operator_of(removal.stuck)} cannot do without all of these units")
        for node, gone_at in removal.stacked.items():
            tensors: Any = self.new[node].args[0]
            kept = [each for at, each in enumerate(tensors) if at not in gone_at]
            self.new[node].args = (kept, *self.new[node].args[1:])
        take_out(self.graph, self.new, removal)
        for select in self.types.facts.unit_selects:
            if select.node in self.new and self.touched((select.axis,)):
                index = kept_indices(self.axes, select.axis, self.cuts).index(select.index)
                for argument, past in select.literals:
                    set_argument(self.new[select.node], argument, None, index + past)

    # -- norms of weights -----------------------------------------------------------------------

    def _fold_norms(self) -> None:
        """Let weights whose norm would change be the normalized ones, so that it does not.

        Where a parameter is the length of the result, it is to take over what the norm loses.
        """
        self.folded: dict[str, fx.Node] = {}
        self.shortened: dict[str, Length] = {}
        for each in self.types.normalized_weights:
            if not each.foldable or each.atoms.isdisjoint(self.cuts):
                continue
            if each.length is not None:
                self.shortened[each.name] = each.length
            else:
                self.folded[each.name] = each.result
                self.new[each.result].replace_all_uses_with(self.new[each.weight])
        dead = list(self.folded.values())
        while dead:
            node = dead.pop()
            if node in self.new and not self.new[node].users:
                self.graph.erase_node(self.new.pop(node))
                dead += node.all_input_nodes

    def touched(self, type_: Type) -> bool:
        """Tell whether any axis of `type_` changes its size."""
        return any(is_cut(self.axes, axis, self.cuts) for axis in type_)

    def _ratio(self, axis: Axis) -> Fraction:
        if not is_cut(self.axes, axis, self.cuts):
            return Fraction(1)
        return Fraction(kept_size(self.axes, axis, self.cuts), self.axes.head(axis).size)

    def gathered(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that stay, with the indices that do; unchanged ones are shared."""
        if self.folded:
            values = run_part(self.types.program, [*self.folded.values()], self._given(weights))
            weights = {**weights, **dict(zip(self.folded, values, strict=True))}
        found = {
            name: self._gather(weights[name], self.types.axes_of[node])
            for name, node in self.types.program.weight_nodes()
            if node in self.new
        }
        for name, length in self.shortened.items():
            found[length.name] = self._shortened(
                length, weights[length.name], weights[name], found[name]
            )
        return found

    def _shortened(self, of: Length, length: Tensor, whole: Tensor, part: Tensor) -> Tensor:
        """Return what is to the norm of `part` as `length` is to that of the `whole` weight."""
        type_ = self.types.weight(of.name)

        def norm(weight: Tensor, like: Tensor) -> Tensor:
            return torch.linalg.vector_norm(weight, dim=of.dims, keepdim=True).reshape_as(like)

        def shorter(part: Tensor) -> Tensor:
            of_one = self._gather(length / norm(whole, length), type_)
            return of_one * norm(part, of_one)

        return later(shorter, part, self._gather(length, type_).shape)

    def _given(self, weights: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        return {node: weights[name] for name, node in self.types.program.weight_nodes()}

    def _gather(self, weight: Tensor, type_: Type) -> Tensor:
        for dim, axis in enumerate(type_):
            if is_cut(self.axes, axis, self.cuts):
                weight = cut(weight, dim, torch.tensor(kept_indices(self.axes, axis, self.cuts)))
        return weight

    def program(self, weights: Mapping[str, Tensor]) -> Program:
        """Return the new program with `weights`, its sizes derived again and checked by the types.

        Raises
        ------
        RewriteError
            When an operator does not accept its new sizes, or a size comes out otherwise than its
            axis says.
        """
        shapes = {
            self.new[node]: self._shapes(node.meta["val"], type_)
            for node, type_ in self.types.axes_of.items()
            if type_ is not None and node in self.new and self._any_touched(type_)
        }
        return with_graph(self.types.program, self.graph, weights, shapes)

    def _any_touched(self, type_: Type | list[Type | None]) -> bool:
        if isinstance(type_, list):
            return any(self.touched(one) for one in type_ if one is not None)
        return self.touched(type_)

    def _shapes(self, value: Any, type_: Any) -> Any:
        if isinstance(type_, list):
            return [self._shapes(part, one) for part, one in zip(value, type_, strict=True)]
        ratios = map(self._ratio, type_)
        return tuple(
            size * ratio.numerator // ratio.denominator if ratio != 1 else size
            for size, ratio in zip(value.shape, ratios, strict=True)
        )

    # -- means ----------------------------------------------------------------------------------

    def keep_divisors(self) -> None:
        """Let every mean over an axis that shrinks divide by the old size.

        Zeros in place of the removed units would not change its sum, so the result is then exact.
        """
        ratios: dict[fx.Node, Fraction] = defaultdict(lambda: Fraction(1))
        forms: dict[fx.Node, MeanLiteral] = {}
        for literal in self.types.facts.means:
            if self.touched((literal.axis,)) and literal.node in self.new:
                ratios[literal.node] *= self._ratio(literal.axis)
                forms[literal.node] = literal
        for node, ratio in ratios.items():
            self._rescale(self.new[node], ratio, forms[node].form)

    def _rescale(self, node: fx.Node, ratio: Fraction, form: str) -> None:
        factor = float(ratio)
        if form == "rms_norm":
            # x / sqrt(ratio * mean + eps) = ratio^-1/2 * x / sqrt(mean + eps / ratio)
            set_argument(node, "eps", None, get_argument(node, "eps") / float(ratio))
            factor = math.sqrt(1 / ratio)
        users = list(node.users)
        if len(users) == 1 and RESCALE in users[0].meta:
            scaled = users[0]
            earlier = Fraction(*scaled.meta[RESCALE])
            scaled.args = (node, scaled.args[1] * factor)  # type: ignore[operator]
            ratio *= earlier
        else:
            with self.graph.inserting_after(node):
                scaled = self.graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
            scaled.meta = {k: v for k, v in node.meta.items() if k != "val"}
        scaled.meta[RESCALE] = (ratio.numerator, ratio.denominator)
