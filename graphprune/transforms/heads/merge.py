"""Merging KV heads: multi-head attention becomes grouped-query, grouped-query becomes multi-query.

Heads of keys and values are pooled in runs of neighbors (Ainslie et al., GQA, 2305.13245, section
2: mean pooling of the key and value projections). A merge is an edit and a change of shape: the
heads of a run all become their mean (the edit, on the original graph), then one of the equal copies
is kept and spread over the queries again (the change of shape, which is exact).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from graphprune.analysis.attention.attentions import Attention
from graphprune.analysis.axes import Axis, Product
from graphprune.analysis.axis_cuts import AxisCut, Growth
from graphprune.analysis.types import Types
from graphprune.errors import MergeError, PlanError
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path
from graphprune.plan.index_map import IndexMap
from graphprune.plan.steps import Merge, Permutation
from graphprune.transforms.heads.deinterleave import permute_weights
from graphprune.transforms.heads.kv_heads import HeadAnalysis, Heads, spread_atoms
from graphprune.transforms.resize import Resize


def merge_of(heads: Heads, groups: int, reordering: tuple[Permutation, ...] = ()) -> Merge:
    """Return the merge of `heads` into `groups`, once `reordering` makes those of each neighbors.

    Raises
    ------
    MergeError
        When the heads cannot be merged, or `groups` does not divide their number.
    """
    if heads.refusal:
        raise MergeError(f"{heads.name}: KV heads cannot be merged: {heads.refusal}")
    if groups < 1 or heads.size % groups:
        raise MergeError(f"{heads.name}: {groups} groups do not divide {heads.size} KV heads")
    return Merge(heads.name, heads.size, groups, heads.members, heads.deinterleaving, reordering)


def merge_heads(program: Program, merges: tuple[Merge, ...]) -> Program:
    """Return `program` with the KV heads of `merges` pooled.

    Raises
    ------
    PlanError
        When a merge names heads that the program does not have.
    MergeError
        When the heads cannot be merged.
    """
    fused = {each.weight for merge in merges for each in merge.deinterleaving}
    if reordering := [each for merge in merges for each in merge.reordering]:
        program = program.with_weights(permute_weights(program.weights, reordering))
    analysis = HeadAnalysis(program, fused)
    named = {heads.name: heads for heads in analysis.heads}
    cuts: dict[Axis, AxisCut | Growth] = {}
    spread: list[tuple[Heads, int]] = []
    for merge in merges:
        heads = named.get(merge.group)
        ours = (heads.size, heads.members, heads.deinterleaving) if heads else None
        if heads is None or ours != (merge.size, merge.members, merge.deinterleaving):
            raise PlanError(f"{merge.group}: the plan's KV heads and the program's differ")
        merge_of(heads, merge.groups)
        copies = tuple(unit for unit in range(heads.size) if unit % merge.width)
        cuts[heads.atom] = AxisCut(removed=copies)
        spread.append((heads, merge.width))
    grown: dict[Axis, Growth] = {
        slots: Growth(slots.size * (width - 1))
        for heads, width in spread
        for slots in spread_atoms(analysis.types, heads)
    }
    resize = Resize(analysis.types, {**cuts, **grown})
    for heads, width in spread:
        if not spread_atoms(analysis.types, heads):
            _insert_broadcasts(resize, heads, width)
    weights = analysis.types.program.weights
    pooled = {**weights, **pool(weights, merges)}
    return resize.program(resize.gathered(pooled))


def pool(weights: Mapping[str, Tensor], merges: Iterable[Merge]) -> dict[str, Tensor]:
    """Return the weights that `merges` change, at their old shapes: each run of heads its mean."""
    pooled: dict[str, Tensor] = {}
    for merge in merges:
        for member in merge.members:
            name = member.weight
            weight = pooled.get(name)
            if weight is None:
                weight = weights[name].detach().clone()
            pooled[name] = _pool_member(weight, member, merge)
    return pooled


def _pool_member(weight: Tensor, member: IndexMap, merge: Merge) -> Tensor:
    for first in range(0, merge.size, merge.width):
        units = range(first, first + merge.width)
        indices = [torch.tensor(member.indices(unit), device=weight.device) for unit in units]
        slices = [weight.index_select(member.dim, each).double() for each in indices]
        mean = (sum(slices[1:], slices[0]) / merge.width).to(weight.dtype)
        for each in indices:
            weight.index_copy_(member.dim, each, mean)
    return weight


def mean_of(weight: str, heads: Tensor) -> Tensor:
    """Return the mean of ``[heads, ...]``, the slices of `weight` that become one."""
    return heads.double().mean(0)


def equal_heads(
    weights: Mapping[str, Tensor],
    heads: Heads,
    groups: Iterable[Sequence[int]],
    choose: Callable[[str, Tensor], Tensor] = mean_of,
) -> dict[str, Tensor]:
    """Return the weights of `heads` as they are when the heads of each group are equal.

    Parameters
    ----------
    weights
        Those of the program that `heads` were found in.
    heads
        The heads.
    groups
        Heads by number, those that are to be equal together.
    choose
        Makes the equal slice of the name of a weight and the slices of a group.
    """
    found: dict[str, Tensor] = {}
    for name, dim, slices in heads.slices():
        weight = found[name] if name in found else weights[name].detach().clone()
        rows = weight.movedim(dim, 0)
        for group in groups:
            at = torch.tensor([slices[head] for head in group], device=weight.device)
            rows[at] = choose(name, rows[at]).to(rows.dtype).expand_as(rows[at])
        found[name] = weight
    return found


def _insert_broadcasts(resize: Resize, heads: Heads, width: int) -> None:
    """Repeat every merged key and value head for the queries of its run, where they meet."""
    aten = torch.ops.aten
    for each in heads.attentions:
        if arguments_of(each.node).get("enable_gqa"):
            continue
        scores, context = each.products
        for operand, product in ((each.operands[1], scores), (each.operands[2], context)):
            dim = _head_dim(resize.types, operand, heads)
            rank = len(resize.types.axes_of[operand])
            sizes = [-1] * (rank + 1)
            sizes[dim + 1] = width
            node = resize.new[operand]
            user = resize.new[product]
            with resize.graph.inserting_before(user):
                wide = resize.graph.call_function(aten.unsqueeze.default, (node, dim + 1))
                wide = resize.graph.call_function(aten.expand.default, (wide, sizes))
                wide = resize.graph.call_function(aten.flatten.using_ints, (wide, dim, dim + 1))
            for made in (wide, wide.args[0], wide.args[0].args[0]):  # type: ignore[union-attr]
                made.meta = {k: v for k, v in node.meta.items() if k != "val"}  # type: ignore[union-attr]
            _replace_operand(user, each, operand, node, wide)


def _replace_operand(
    user: fx.Node, attention: Attention, operand: fx.Node, old: fx.Node, new: fx.Node
) -> None:
    """Let `user` read `new` for `old`, but not where `old` is also its query."""
    if attention.operands[0] is operand:
        raise MergeError(f"{user.target} in {module_path(user)} attends over its own queries")
    user.replace_input_with(old, new)


def _head_dim(types: Types, operand: fx.Node, heads: Heads) -> int:
    for dim, axis in enumerate(types.axes_of[operand]):
        axis = types.axes.head(axis)
        last = axis.factors[-1] if isinstance(axis, Product) and axis.factors else axis
        if types.axes.head(last) is heads.atom:
            return dim
    raise MergeError(f"{heads.name}: keys or values hold their heads inside another axis")
