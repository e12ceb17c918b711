"""What a rewritten program is compared with: the original on edited weights.

It is made from the plan's index maps and the original graph alone; nothing of the rewriter's
slicing is shared. Removing zeroes; where units are chosen at run time, as experts are, those that
went are never chosen, since their logits are minus infinity. A residual branch that went adds
zeros. Merging replaces every head of a run
by the run's mean. Where a normalization's statistics run over an axis that lost units (LayerNorm
over the residual stream), they are taken over what stays; a plain mean (RMSNorm) keeps its old
divisor, which zeroing does by itself. Norms of weights are those of all units.

All weights are zeroed, buffers and constants among them: the analysis takes each of them to be zero
at a unit that went, and sums over units are exact only where that makes a factor zero. Any other
value there is multiplied by such a zero before it reaches a unit that stays, so it may be anything
that is finite. What zeros make infinite (a quotient, a power, a logarithm) is made finite at the
units that went: by the values that weights had where these alone did it, else by one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.axes import Axis, Product
from graphprune.analysis.index_maps import indices_by_unit, unit_indices
from graphprune.analysis.inference import infer
from graphprune.analysis.operators.facts import Routing
from graphprune.analysis.residual.branches import Branches
from graphprune.analysis.types import Types
from graphprune.ir.aten import is_mutating, is_random, is_view, random_nodes
from graphprune.ir.interpreter import Compute, Hooks, call, run_program
from graphprune.ir.nodes import argument_names
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.verification.draws import Draws
from graphprune.verification.kept_norms import kept_norms, narrow_weights
from graphprune.verification.narrow_weights import NarrowWeights
from graphprune.weights.deferred import made

Left = tuple[int, Tensor, bool]
"""A dimension, its indices that are left, and whether a result has zeros at the others."""


def masked(
    original: Program, plan: Plan, types: Types | None = None
) -> Callable[..., dict[str, Tensor]]:
    """Return `original` with what `plan` removes zeroed, to be called as a program is.

    Parameters
    ----------
    original
        The program that the plan was made for.
    plan
        What goes; it need not be one that can be applied.
    types
        The types of `original`, where they are known; inferred by default.
    """
    return torch.no_grad()(MaskedReference(original, plan, types).__call__)


class MaskedReference:
    """The original graph on edited weights: removed slices zeroed, merged heads made equal.

    Parameters
    ----------
    original
        The program that the plan was made for.
    plan
        What goes, merges and has other values.
    types
        The types of `original`, where they are known; inferred by default.
    narrow
        What the plan leaves of the weights, which the program must hold; by default as it says.

    Attributes
    ----------
    weights
        The edited weights, each made anew where it is used.
    """

    def __init__(
        self,
        original: Program,
        plan: Plan,
        types: Types | None = None,
        narrow: NarrowWeights | None = None,
    ) -> None:
        self.original = original
        types = types or infer(original)
        self.narrow = narrow or narrow_weights(original, plan, types)
        self.weights = {name: self.narrow.widen(name) for name in original.weights}
        self._normalized = {
            each.result: self.narrow.widen(each.name)
            for each in kept_norms(types, plan)
            if each.length is None
        }
        self.statistics: dict[fx.Node, list[Left]] = {}
        self.choices: dict[fx.Node, list[Tensor]] = {}
        self._unmasked = _Unmasked(original)
        self._types = types
        gone = [branch.name for step in plan.steps for branch in step.branches]
        branches = Branches(types) if gone else None
        self._absent = {branches.named(name).term for name in gone} if branches else set()
        self._kept_under = self._kept_units()
        self._kept = {
            atom: torch.stack([kept.view(-1, kept.shape[-1]).any(0) for kept in each.values()]).any(
                0
            )
            for atom, each in self._kept_under.items()
        }
        if self._kept:
            self._find_what_stays()

    def _find_what_stays(self) -> None:
        """Find normalizations over, and choices from, axes that lost units."""
        types = self._types
        for entry in types.facts.statistics:
            left = self._stays(types.axes_of[entry.node.all_input_nodes[0]][entry.dim])
            if left is not None:
                found = self.statistics.setdefault(entry.node, [])
                found.append((entry.dim, left.nonzero().flatten(), entry.clears))
        for choice in types.facts.routings:
            if self._kept.keys().isdisjoint(types.axes.atoms(choice.axis)):
                continue  # it may be of any dynamic size
            left = self._left_to_choose(choice)
            if not bool(left.all()):
                self.choices.setdefault(choice.node, []).append(left)

    def _left_to_choose(self, choice: Routing) -> Tensor:
        """Return a mask of what is left to choose from, to be broadcast to the operand.

        Under each unit of another axis other units may have gone, such as experts of a group.
        """
        axes, operand = self._types.axes, choice.node.all_input_nodes[0]
        type_ = [axes.head(axis) for axis in self._types.axes_of[operand]]
        sizes = [axis.size if axis in self._kept else 1 for axis in type_]
        sizes[choice.dim] = type_[choice.dim].size
        mask = torch.ones(sizes).bool()
        lines = mask.movedim(choice.dim, -1)
        beside = [axis for dim, axis in enumerate(type_) if dim != choice.dim]
        for occurrence in axes.occurrences(type_[choice.dim]):
            each = self._kept_under.get(occurrence.atom)
            if each is None:
                continue
            outer = max(each, key=len)
            loops = [axes.head(axis) for axis, _ in occurrence.outer]
            indices = unit_indices(occurrence, occurrence.atom.size)
            for place in itertools.product(*map(range, lines.shape[:-1])):
                at = dict(zip(beside, place, strict=True))
                kept = _under(each[outer], outer, loops, at)
                lines[place].index_fill_(0, indices[~kept.expand(indices.shape[:-1])].flatten(), 0)
        return mask

    def _stays(self, axis: Axis, size: int | None = None) -> Tensor | None:
        """Return a boolean mask of the indices along `axis` that stay; None where all do.

        `size` is how long it is in this run, where a part of it, such as a batch, may have any.
        """
        axes = self._types.axes
        axis = axes.head(axis)
        if self._kept.keys().isdisjoint(axes.atoms(axis)):  # it may be of any dynamic size
            return None
        if isinstance(axis, Product) and size is not None and size != axis.size:
            return self._stays_in_product(axis, size)
        found = torch.ones(axis.size).bool()
        for occurrence in axes.occurrences(axis):
            if (kept := self._kept.get(occurrence.atom)) is not None:
                found[indices_by_unit(occurrence)[~kept].flatten()] = False
        return None if bool(found.all()) else found

    def _stays_in_product(self, axis: Product, size: int) -> Tensor | None:
        """Return the mask of a product one of whose factors is dynamic."""
        fixed = [f.size for f in axis.factors if not self._types.is_dynamic(f)]
        if len(fixed) < len(axis.factors) - 1:
            return None  # nobody knows how long each of several is
        length = size // math.prod(fixed)
        found = torch.ones(1).bool()
        for factor in axis.factors:
            dynamic = self._types.is_dynamic(factor)
            left = self._stays(factor, length if dynamic else None)
            if left is None:
                left = torch.ones(length if dynamic else factor.size).bool()
            found = (found[:, None] & left).flatten()
        return None if bool(found.all()) else found

    def _stays_along(self, node: fx.Node, shape: Sequence[int]) -> dict[int, Tensor]:
        """Return each dimension of a tensor that lost indices -> a boolean mask of those left."""
        axes = self._types.axes_of[node] if isinstance(node.meta.get("val"), Tensor) else ()
        pairs = zip(axes, shape, strict=False)
        found = {dim: self._stays(*pair) for dim, pair in enumerate(pairs)}
        return {dim: left for dim, left in found.items() if left is not None}

    def narrowed(self, draws: Draws) -> Callable[[int], Tensor | None]:
        """Return what gives, by number, what a run of the reference drew for units that stay."""
        nodes = random_nodes(self.original.graph)

        def narrow(number: int) -> Tensor | None:
            drawn = draws.again(number)
            if drawn is not None and self._kept:
                for dim, left in self._stays_along(nodes[number], drawn.shape).items():
                    drawn = drawn.index_select(dim, left.nonzero().flatten().to(drawn.device))
            return drawn

        return narrow

    def _kept_units(self) -> dict[Axis, dict[tuple[Axis, ...], Tensor]]:
        """Return every atom that lost units -> those that are left, as masks by what is around it.

        Under the units of the axes around it, ``[*their sizes, units]``.
        """
        types, found = self._types, dict[Axis, dict[tuple[Axis, ...], Tensor]]()
        for (name, dim), origin in self.narrow.origin.items():
            for occurrence in types.axes.occurrences(types.weight(name)[dim]):
                indices = unit_indices(occurrence, occurrence.atom.size)
                stays = (origin[indices] >= 0).any(-1)
                outer = tuple(types.axes.head(axis) for axis, _ in occurrence.outer)
                each = found.setdefault(occurrence.atom, {})
                each[outer] = each.get(outer, torch.zeros_like(stays)) | stays
        return found

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the reference as a program is run."""
        return self.run(inputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the reference on inputs by name."""
        operands = self.original.as_operands(self.weights)
        return run_program(self.original, inputs, Hooks(compute=self.computing()), operands)

    def computing(self, draws: Draws | None = None) -> Compute:
        """Return what computes the nodes of one run of the original on `weights`.

        What it draws at random is kept in `draws`.
        """
        return functools.partial(self._compute, draws or Draws())

    def _compute(
        self, draws: Draws, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a node makes with statistics over what stays, and choices from it."""
        if node in self._normalized:
            return made(self._normalized[node])
        if node in self._absent:
            return torch.zeros_like(call(node, args, kwargs))
        for left in self.choices.get(node, ()):
            args = (args[0].masked_fill(~left.to(args[0].device), -torch.inf), *args[1:])
        if node in self.statistics:
            return _over_what_stays(node, self.statistics[node], *args, **kwargs)
        result = draws.compute(node, args, kwargs)
        # What a view shows is for its source to mend; a copy of it could not be written through.
        shared = is_mutating(node) or is_view(node)
        if not isinstance(result, Tensor) or shared or bool(result.isfinite().all()):
            return result
        return self._finite(node, args, kwargs, result)

    def _finite(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Tensor:
        """Return `result` with something finite where zeros made it infinite."""

        def own(other: Any, value: Any) -> Any:
            is_weight = isinstance(other, fx.Node) and other in self._unmasked
            return self._unmasked[other] if is_weight else value

        if not self._unmasked.isdisjoint(node.all_input_nodes):
            again = [own(*pair) for pair in zip(node.args, args, strict=True)]
            named = {name: own(node.kwargs[name], value) for name, value in kwargs.items()}
            result = torch.where(result.isfinite(), result, call(node, tuple(again), named))
        for dim, stays in self._stays_along(node, result.shape).items():
            shape = [1] * result.ndim
            shape[dim] = -1
            spoiled = ~result.isfinite() & ~stays.view(shape).to(result.device)
            # Zero by zero is zero: what goes may be divided by what goes along with it.
            is_quotient = node.target is torch.ops.aten.div.Tensor
            result = torch.where(spoiled, (args[0] != 0) if is_quotient else 1, result)
        return result


def _under(
    kept: Tensor, outer: Sequence[Axis], loops: Sequence[Axis], at: Mapping[Axis, int]
) -> Tensor:
    """Return ``[*outer, units]`` as ``[*loops, units]``: of axes that are `at` a unit, that one."""
    for dim in reversed(range(len(outer))):
        if outer[dim] in at:
            kept = kept.select(dim, at[outer[dim]])
        elif outer[dim] not in loops:
            kept = kept.any(dim)
    for dim, axis in enumerate(loops):
        if axis not in outer:
            kept = kept.unsqueeze(dim)
    return kept


class _Unmasked:
    """The values of a program that follow from its weights alone, before anything was zeroed."""

    def __init__(self, program: Program) -> None:
        operands = program.operands
        self._values: dict[fx.Node, Any] = {
            node: operands[name] for name, node in program.weight_nodes()
        }
        self._nodes = set(self._values)
        for node in program.graph.nodes:
            inputs = node.all_input_nodes
            if (
                node.op == "call_function"
                and self._nodes.issuperset(inputs)
                and not is_random(node)
            ):
                self._nodes.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def isdisjoint(self, nodes: Iterable[fx.Node]) -> bool:
        """Return whether none of `nodes` is among them."""
        return self._nodes.isdisjoint(nodes)

    def __getitem__(self, node: fx.Node) -> Any:
        if node not in self._values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.__getitem__)
            self._values[node] = call(node, args, kwargs)
        return self._values[node]


def _over_what_stays(
    node: fx.Node, left: Sequence[Left], whole: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Return what `node` makes of the indices of `whole` that are left, with zeros elsewhere."""
    left = [(dim, kept.to(whole.device), clears) for dim, kept, clears in left]
    names = argument_names(node)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    narrow = whole
    for dim, kept, _ in left:
        narrow = narrow.index_select(dim, kept)
    if "normalized_shape" in given:
        lead = whole.ndim - len(given["normalized_shape"])
        given["normalized_shape"] = list(narrow.shape[lead:])
        affine = [(dim - lead, kept) for dim, kept, _ in left]
    elif "num_groups" in given:
        (_, kept, _), inner = left[0], whole.shape[1] // given["num_groups"]
        given["num_groups"] = len((kept // inner).unique())
        affine = [(0, kept)]
    else:
        affine = []
    for name in ("weight", "bias"):
        for dim, kept in affine:
            if given.get(name) is not None:
                given[name] = given[name].index_select(dim, kept)
    result = call(node, (narrow,), given)
    if not any(clears for _, _, clears in left):
        return result
    for dim, kept, _ in left:
        wide = [*result.shape[:dim], whole.shape[dim], *result.shape[dim + 1 :]]
        result = result.new_zeros(wide).index_copy(dim, kept, result)
    return result
