"""Merging KV heads: multi-head attention becomes grouped-query, grouped-query becomes multi-query.

Heads of keys and values are pooled in runs of neighbours (Ainslie et al., GQA, 2305.13245, section
2: mean pooling of the key and value projections). A merge is an edit and a change of shape: the
heads of a run all become their mean (the edit, on the original graph), then one of the equal copies
is kept and spread over the queries again (the change of shape, which is exact).

What is a key or value head, and what is a query head, is told apart by typing the graph once more
with attention not making the two the same. The axis of the key and value heads is then an atom of
its own, and shrinks like any other; where it is not (queries and keys interleaved in one axis), the
merge is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.axes import Atom, Axis, Cut, Growth, Product
from graphprune.coupling import Member, common_path
from graphprune.errors import MergeError, PlanError
from graphprune.inference import Types, infer
from graphprune.operators.base import Attention
from graphprune.plan import Merge
from graphprune.program import Program, module_path
from graphprune.resize import Resize
from graphprune.roles import attention_sites


@dataclass(frozen=True)
class Heads:
    """The KV heads of one or more attentions that share them.

    Parameters
    ----------
    name
        The module that the key and value weights share.
    size
        Number of KV heads.
    queries
        Number of query heads for each of them.
    members
        Index maps of the heads in key and value weights.
    refusal
        Why they cannot be merged ("" when they can).
    """

    name: str
    size: int
    queries: int
    members: tuple[Member, ...]
    refusal: str
    atom: Atom
    sites: tuple[Attention, ...]


class HeadAnalysis:
    """The KV heads of a program, typed apart from its query heads."""

    def __init__(self, program: Program) -> None:
        together = infer(program)
        sites = (*together.facts.attentions, *attention_sites(together))
        self.types = infer(program, apart=sites)
        self.sites = sites
        by_atom: dict[Atom, list[Attention]] = {}
        for site in sites:
            for atom in self._head_atoms(site):
                by_atom.setdefault(atom, []).append(site)
        self.heads = tuple(self._heads(atom, found) for atom, found in by_atom.items())

    def _head_atoms(self, site: Attention) -> Iterable[Atom]:
        """Head atoms of the values of `site` that weights hold: the KV heads."""
        held_by_weights: set[Atom] = set()
        for _, node in self.types.program.weight_nodes():
            held_by_weights |= self.types.held[node]
        _, _, value = site.operands
        batch = self.types.of[value][:-2]
        found = dict.fromkeys(a for axis in batch for a in self.types.axes.atoms(axis))
        return [atom for atom in found if atom in held_by_weights]

    def _heads(self, atom: Atom, sites: list[Attention]) -> Heads:
        members = tuple(self._members(atom))
        name = f"{common_path(member.weight for member in members)}:kv-head"
        query = self.types.of[sites[0].operands[0]]
        queries = 1
        for axis in query[:-2]:
            if axis.size % atom.size == 0 and axis.size < 10**6:
                queries = max(queries, axis.size // atom.size)
        return Heads(
            name, atom.size, queries, members, self._refusal(atom, sites), atom, tuple(sites)
        )

    def _members(self, atom: Atom) -> Iterable[Member]:
        for name, node in self.types.program.weight_nodes():
            for dim, axis in enumerate(self.types.of[node]):
                for place in self.types.axes.occurrences(axis):
                    if place.atom is atom:
                        outer = tuple((a.size, stride) for a, stride in place.outer)
                        none = (None,) * len(outer)
                        yield Member(name, dim, place.offset, place.inner, axis.size, outer, none)

    def _refusal(self, atom: Atom, sites: list[Attention]) -> str:
        if atom in self.types.frozen:
            reason = self.types.frozen[atom]
            return f"{reason.why} at {reason.node.target} in {module_path(reason.node)}"
        if any(atom in self.types.held[site.operands[0]] for site in sites):
            return "query and key heads share one axis of a weight"
        means = {literal.node for literal in self.types.facts.means}
        for entry in self.types.facts.contractions:
            if entry.node not in means and atom in set(self.types.axes.atoms(entry.axis)):
                return f"{entry.node.target} in {module_path(entry.node)} sums over the heads"
        return ""


def find_heads(program: Program) -> tuple[Heads, ...]:
    """The KV heads of every attention of `program` that has more than one."""
    return HeadAnalysis(program).heads


def merge_of(heads: Heads, groups: int) -> Merge:
    """The merge of `heads` into `groups`.

    Raises
    ------
    MergeError
        When the heads cannot be merged, or `groups` does not divide their number.
    """
    if heads.refusal:
        raise MergeError(f"{heads.name}: KV heads cannot be merged: {heads.refusal}")
    if groups < 1 or heads.size % groups:
        raise MergeError(f"{heads.name}: {groups} groups do not divide {heads.size} KV heads")
    return Merge(heads.name, heads.size, groups, heads.members)


def merge_heads(program: Program, merges: tuple[Merge, ...]) -> Program:
    """`program` with the KV heads of `merges` pooled.

    Raises
    ------
    PlanError
        When a merge names heads that the program does not have.
    MergeError
        When the heads cannot be merged.
    """
    analysis = HeadAnalysis(program)
    named = {heads.name: heads for heads in analysis.heads}
    cuts: dict[Axis, Cut | Growth] = {}
    spread: list[tuple[Heads, int]] = []
    for merge in merges:
        heads = named.get(merge.group)
        if heads is None or (heads.size, heads.members) != (merge.size, merge.members):
            raise PlanError(f"{merge.group}: the plan's KV heads and the program's differ")
        merge_of(heads, merge.groups)
        copies = tuple(unit for unit in range(heads.size) if unit % merge.width)
        cuts[heads.atom] = Cut(removed=copies)
        spread.append((heads, merge.width))
    grown: dict[Axis, Growth] = {
        slots: Growth(slots.size * (width - 1))
        for heads, width in spread
        for slots in _slots(analysis.types, heads)
    }
    resize = Resize(analysis.types, {**cuts, **grown})
    for heads, width in spread:
        if not _slots(analysis.types, heads):
            _insert_broadcasts(resize, heads, width)
    pooled = {**program.weights, **pool(program.weights, merges)}
    return resize.program(resize.gathered(pooled))


def pool(weights: Mapping[str, Tensor], merges: Iterable[Merge]) -> dict[str, Tensor]:
    """The weights that `merges` change, at their old shapes: every run of heads is its mean."""
    pooled: dict[str, Tensor] = {}
    for merge in merges:
        for member in merge.members:
            name = member.weight
            weight = pooled.get(name)
            if weight is None:
                weight = weights[name].detach().clone()
            pooled[name] = _pool_member(weight, member, merge)
    return pooled


def _pool_member(weight: Tensor, member: Member, merge: Merge) -> Tensor:
    for first in range(0, merge.size, merge.width):
        units = range(first, first + merge.width)
        places = [torch.tensor(member.indices(unit), device=weight.device) for unit in units]
        slices = [weight.index_select(member.dim, place).double() for place in places]
        mean = (sum(slices[1:], slices[0]) / merge.width).to(weight.dtype)
        for place in places:
            weight.index_copy_(member.dim, place, mean)
    return weight


def _slots(types: Types, heads: Heads) -> list[Atom]:
    """Atoms along which the graph itself repeats keys and values for their queries."""
    marked = {
        atom
        for mark in types.facts.marks
        if mark.kind == "spread"
        for atom in types.axes.atoms(mark.axis)
    }
    found: dict[Atom, None] = {}
    for site in heads.sites:
        for operand in site.operands[1:]:
            for axis in types.of[operand][:-2]:
                axis = types.axes.head(axis)
                inside = list(types.axes.atoms(axis)) if isinstance(axis, Product) else []
                if heads.atom in inside:
                    found.update(
                        dict.fromkeys(a for a in inside if a in marked and a is not heads.atom)
                    )
    return list(found)


def _insert_broadcasts(resize: Resize, heads: Heads, width: int) -> None:
    """Repeat every merged key and value head for the queries of its run, where they meet."""
    aten = torch.ops.aten
    for site in heads.sites:
        if site.node.kwargs.get("enable_gqa"):
            continue
        scores, context = site.products
        for operand, product in ((site.operands[1], scores), (site.operands[2], context)):
            dim = _head_dim(resize.types, operand, heads)
            rank = len(resize.types.of[operand])
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
            _replace_operand(user, site, operand, node, wide)


def _replace_operand(
    user: fx.Node, site: Attention, operand: fx.Node, old: fx.Node, new: fx.Node
) -> None:
    """Let `user` read `new` for `old`, but not where `old` is also its query."""
    if site.operands[0] is operand:
        raise MergeError(f"{user.target} in {module_path(user)} attends over its own queries")
    user.replace_input_with(old, new)


def _head_dim(types: Types, operand: fx.Node, heads: Heads) -> int:
    for dim, axis in enumerate(types.of[operand]):
        axis = types.axes.head(axis)
        last = axis.factors[-1] if isinstance(axis, Product) and axis.factors else axis
        if types.axes.head(last) is heads.atom:
            return dim
    raise MergeError(f"{heads.name}: keys or values hold their heads inside another axis")
