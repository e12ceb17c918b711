"""What a rewritten program is compared with: the original on edited weights.

It is made from the plan's index maps and the original graph alone; nothing of the rewriter's
slicing is shared. Removing zeroes; where units are chosen at run time, as experts are, those that
went are never chosen, since their logits are minus infinity. Merging replaces every head of a run
by the run's mean. Where a normalization's statistics run over an axis that lost units (LayerNorm
over the residual stream), they are taken over what stays; a plain mean (RMSNorm) keeps its old
divisor, which zeroing does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.axes import Axis
from graphprune.analysis.index_maps import indices_by_unit
from graphprune.analysis.inference import infer
from graphprune.analysis.types import Types
from graphprune.ir.interpreter import Hooks, call, run_program
from graphprune.ir.nodes import argument_names
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step, WeightDim

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

    Attributes
    ----------
    narrow
        The edited weights with what goes left out, which the program must hold.
    gone
        The names of weights that go as a whole, which it must not hold.
    """

    def __init__(self, original: Program, plan: Plan, types: Types | None = None) -> None:
        self.original = original
        self.narrow: dict[str, Tensor] = dict(original.weights)
        self.origin: dict[WeightDim, Tensor] = {}
        for step in plan.steps:
            self._edit(step)
        self.gone = {name for step in plan.steps for cut in step.cuts for name in cut.whole}
        for name in self.gone:
            del self.narrow[name]
        # What goes with its unit as a whole says nothing about the units of its own axes.
        self.origin = {at: old for at, old in self.origin.items() if at[0] not in self.gone}
        wide = {name: self._widen(name) for name in original.weights}
        self.weights = wide
        self.statistics: dict[fx.Node, list[Left]] = {}
        self.choices: dict[fx.Node, list[tuple[int, Tensor]]] = {}
        if self.origin:
            self._find_statistics_and_choices(types or infer(original))

    # -- weights --------------------------------------------------------------------------------

    def _edit(self, step: Step) -> None:
        lost: dict[WeightDim, set[int]] = {}
        for cut in step.cuts:
            for weight, dim, indices in cut.indices():
                lost.setdefault((weight, dim), set()).update(indices)
        for at, gone in lost.items():
            size = self.narrow[at[0]].shape[at[1]]
            kept = [index for index in range(size) if index not in gone]
            moved = torch.full((size,), -1)
            moved[kept] = torch.arange(len(kept))
            self._shrink(at, kept, moved)
        for each in step.permutations:
            self._shrink((each.weight, each.dim), list(each.sources), _inverse(each.sources))
        for merge in step.merges:
            for weight, dim, runs in merge.runs():
                self._pool((weight, dim), runs)

    def _pool(self, at: WeightDim, runs: list[list[int]]) -> None:
        name, dim = at
        weight = self.narrow[name].detach().clone().movedim(dim, 0)
        members = torch.tensor(runs)
        pooled = weight[members].double().mean(dim=1).to(weight.dtype)
        weight[members[:, 0]] = pooled
        self.narrow[name] = weight.movedim(0, dim)
        size = len(weight)
        first = torch.arange(size)
        first[members] = members[:, :1].expand_as(members)
        kept = sorted(set(first.tolist()))
        moved = torch.empty(size, dtype=torch.long)
        moved[kept] = torch.arange(len(kept))
        self._shrink(at, kept, moved[first])

    def _shrink(self, at: WeightDim, kept: list[int], moved: Tensor) -> None:
        """Keep only `kept`; `moved` tells where every index is found now (-1: nowhere)."""
        name, dim = at
        weight = self.narrow[name].detach()
        origin = self.origin.get(at, torch.arange(weight.shape[dim]))
        self.origin[at] = torch.where(origin >= 0, moved[origin.clamp(min=0)], -1)
        self.narrow[name] = weight.movedim(dim, 0)[kept].movedim(0, dim).contiguous()

    def _widen(self, name: str) -> Tensor:
        """Return the weight at its original shape: copies of merged heads, zeros for what went."""
        if name not in self.narrow:
            return torch.zeros_like(self.original.weights[name])
        weight = self.narrow[name]
        for (other, dim), origin in self.origin.items():
            if other != name:
                continue
            weight = weight.movedim(dim, 0)[origin.clamp(min=0)]
            weight[origin < 0] = 0
            weight = weight.movedim(0, dim)
        return weight

    # -- running --------------------------------------------------------------------------------

    def _find_statistics_and_choices(self, types: Types) -> None:
        """Find normalizations over, and choices from, axes that lost units, and what stays."""
        kept = self._kept(types)

        def stays(axis: Axis) -> Tensor | None:
            if kept.keys().isdisjoint(types.axes.atoms(axis)):  # it may be of any dynamic size
                return None
            found = torch.ones(axis.size).bool()
            for place in types.axes.occurrences(axis):
                if place.atom in kept:
                    found[indices_by_unit(place)[~kept[place.atom]].flatten()] = False
            return None if bool(found.all()) else found

        for entry in types.facts.statistics:
            left = stays(types.axes_of[entry.node.all_input_nodes[0]][entry.dim])
            if left is not None:
                found = self.statistics.setdefault(entry.node, [])
                found.append((entry.dim, left.nonzero().flatten(), entry.clears))
        for choice in types.facts.routings:
            if (left := stays(choice.axis)) is not None:
                self.choices.setdefault(choice.node, []).append((choice.dim, left))

    def _kept(self, types: Types) -> dict[Axis, Tensor]:
        """Return every atom that lost units -> a boolean mask of those that are left."""
        kept: dict[Axis, Tensor] = {}
        for (name, dim), origin in self.origin.items():
            for place in types.axes.occurrences(types.weight(name)[dim]):
                stays = (origin[indices_by_unit(place)] >= 0).any(1)
                kept[place.atom] = kept.get(place.atom, torch.zeros(place.atom.size).bool()) | stays
        return kept

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the reference as a program is run."""
        hooks = Hooks(compute=self._compute)
        return run_program(self.original, inputs, hooks, self.weights)

    def _compute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a node makes with statistics over what stays, and choices from it."""
        for dim, stays in self.choices.get(node, ()):
            shape = [1] * args[0].ndim
            shape[dim] = -1
            args = (args[0].masked_fill(~stays.view(shape), -torch.inf), *args[1:])
        if node in self.statistics:
            return _over_what_stays(node, self.statistics[node], *args, **kwargs)
        result = call(node, args, kwargs)
        if node.target is torch.ops.aten.div.Tensor and bool(result.isnan().any()):
            # Zero by zero is zero: what goes may be divided by what goes along with it.
            above, below = args[0], torch.as_tensor(args[1])
            return result.masked_fill((above == 0) & (below == 0), 0)
        return result


def _inverse(sources: Sequence[int]) -> Tensor:
    """Return where every index is found among `sources`."""
    return torch.tensor(sources).argsort()


def _over_what_stays(
    node: fx.Node, left: Sequence[Left], whole: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Return what `node` makes of the indices of `whole` that are left, with zeros elsewhere."""
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
