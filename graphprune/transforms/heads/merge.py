"""Merging KV heads: multi-head attention becomes grouped-query, grouped-query becomes multi-query.

Heads of keys and values are pooled in runs of neighbours (Ainslie et al., GQA, 2305.13245, section
2: mean pooling of the key and value projections). A merge is an edit and a change of shape: the
heads of a run all become their mean (the edit, on the original graph), then one of the equal copies
is kept and spread over the queries again (the change of shape, which is exact).

What is a key or value head, and what is a query head, is told apart by typing the graph once more
with attention not making the two the same. The axis of the key and value heads is then an atom of
its own, and shrinks like any other. Where queries and keys are interleaved in one projection, its
rows are laid out part by part before; where they share their heads otherwise, the merge is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.analysis.axes import Atom, Axis, Cut, Growth, Product
from graphprune.analysis.coupling import common_path
from graphprune.analysis.inference import Types, infer
from graphprune.analysis.operators.rule import Attention
from graphprune.analysis.roles import attention_sites
from graphprune.errors import MergeError, PlanError
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path
from graphprune.plan.index_map import IndexMap
from graphprune.plan.plan import Merge, Order
from graphprune.transforms.heads.deinterleave import laid_out, unfuse
from graphprune.transforms.heads.einsum_to_matmul import with_matrix_products
from graphprune.transforms.resize import Resize

_DYNAMIC = 10**6
"""Sizes from here on stand for dynamic ones, such as that of a batch."""


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
    orders
        How interleaved projections among the members are laid out for it.
    """

    name: str
    size: int
    queries: int
    members: tuple[IndexMap, ...]
    refusal: str
    atom: Atom
    sites: tuple[Attention, ...]
    orders: tuple[Order, ...] = ()

    def slices(self) -> Iterator[tuple[str, int, list[list[int]]]]:
        """(weight, dim, the indices of every head) of every member, as the program counts them."""
        layout = {(order.weight, order.dim): order.places for order in self.orders}
        for member in self.members:
            places = layout.get((member.weight, member.dim), range(member.extent))
            found = [[places[i] for i in member.indices(unit)] for unit in range(self.size)]
            yield member.weight, member.dim, found


class HeadAnalysis:
    """The KV heads of a program, typed apart from its query heads.

    Parameters
    ----------
    program
        The program.
    fused
        Projections that may be laid out part by part; by default those that hold heads of queries
        and of keys in one axis.
    """

    def __init__(self, program: Program, fused: Collection[str] | None = None) -> None:
        self._orders: dict[str, tuple[Order, ...]] = {}
        self._analyze(program)
        if fused is None:
            shared = [h for h in self.heads if h.refusal and self._is_shared(h.atom, h.sites)]
            fused = {member.weight for heads in shared for member in heads.members}
        program, self._orders = unfuse(program, fused)
        if self._orders:
            self._analyze(program)

    def _analyze(self, program: Program) -> None:
        sites = _sites(program)
        sums = [product for site in sites for product in site.products]
        spelled = with_matrix_products(program, dict.fromkeys(sums))
        if spelled is not program:
            program, sites = spelled, _sites(spelled)
        self.types = infer(program, apart=sites)
        self.sites = sites
        self._weights = {node for _, node in program.weight_nodes()}
        by_atom: dict[Atom, list[Attention]] = {}
        for site in sites:
            for atom in self._head_atoms(site):
                by_atom.setdefault(atom, []).append(site)
        self.heads = tuple(self._heads(atom, found) for atom, found in by_atom.items())

    def _head_atoms(self, site: Attention) -> Iterable[Atom]:
        """Head atoms of the values of `site` that parameters hold: the KV heads."""
        kinds = self.types.program.kinds
        parameters = (
            n for name, n in self.types.program.weight_nodes() if kinds[name] == "parameter"
        )
        held = set[Atom]().union(*(self.types.held[node] for node in parameters))
        _, _, value = site.operands
        batch = self.types.of[value][:-2]
        found = dict.fromkeys(a for axis in batch for a in self.types.axes.atoms(axis))
        return [atom for atom in found if atom in held]

    def _heads(self, atom: Atom, sites: list[Attention]) -> Heads:
        members = tuple(self._members(atom))
        name = f"{common_path(member.weight for member in members)}:kv-head"
        query = self.types.of[sites[0].operands[0]]
        queries = 1
        for axis in query[:-2]:
            if axis.size % atom.size == 0 and axis.size < _DYNAMIC:
                queries = max(queries, axis.size // atom.size)
        weights = dict.fromkeys(member.weight for member in members)
        orders = dict.fromkeys(o for weight in weights for o in self._orders.get(weight, ()))
        refusal = self._refusal(atom, sites)
        return Heads(name, atom.size, queries, members, refusal, atom, tuple(sites), tuple(orders))

    def _members(self, atom: Atom) -> Iterable[IndexMap]:
        for name, node in self.types.program.weight_nodes():
            for dim, axis in enumerate(self.types.of[node]):
                for place in self.types.axes.occurrences(axis):
                    if place.atom is atom:
                        outer = tuple((a.size, stride) for a, stride in place.outer)
                        none = (None,) * len(outer)
                        yield IndexMap(name, dim, place.offset, place.inner, axis.size, outer, none)

    def _refusal(self, atom: Atom, sites: list[Attention]) -> str:
        if atom in self.types.frozen:
            reason = self.types.frozen[atom]
            return f"{reason.why} at {reason.node.target} in {module_path(reason.node)}"
        if self._is_shared(atom, sites):
            return self._tie(atom, sites)
        means = {literal.node for literal in self.types.facts.means}
        for entry in self.types.facts.contractions:
            if entry.node not in means and atom in set(self.types.axes.atoms(entry.axis)):
                return f"{entry.node.target} in {module_path(entry.node)} sums over the heads"
        return ""

    def _is_shared(self, atom: Atom, sites: Iterable[Attention]) -> bool:
        return any(atom in self.types.held[site.operands[0]] for site in sites)

    def _tie(self, atom: Atom, sites: list[Attention]) -> str:
        """What makes the heads of queries and keys one axis, though attention does not."""
        ours = self._behind(atom, (site.operands[0] for site in sites))
        theirs = self._behind(atom, (node for site in sites for node in site.operands[1:]))
        common = [
            node
            for node in self.types.program.graph.nodes
            if node in ours & theirs and not self._weights.isdisjoint(node.all_input_nodes)
        ]
        if common and "linear" in str(common[-1].target):
            return "query and key heads share one axis of a weight"
        found = common[-1] if common else self._joint(atom, sites, ours, theirs)
        where = f" at {found.target} in {module_path(found)}" if found else ""
        return f"query and key heads are one axis outside of attention too{where}"

    def _joint(
        self, atom: Atom, sites: list[Attention], ours: set[fx.Node], theirs: set[fx.Node]
    ) -> fx.Node | None:
        """The first node beside `sites` that brings keys together with queries or their results."""
        products = {product for site in sites for product in site.products}
        queries, keys = set(ours), set(theirs)
        for node in self.types.program.graph.nodes:
            if atom not in self.types.held.get(node, ()):
                continue
            inputs = set(node.all_input_nodes)
            if node in products:
                queries.add(node)
            elif inputs & queries and inputs & keys:
                return node
            elif inputs & queries:
                queries.add(node)
            elif inputs & keys:
                keys.add(node)
        return None

    def _behind(self, atom: Atom, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """`nodes` and what they are made of, as far as it holds `atom`."""
        pending = list(nodes)
        found = set(pending)
        while pending:
            for other in pending.pop().all_input_nodes:
                if other not in found and atom in self.types.held.get(other, ()):
                    found.add(other)
                    pending.append(other)
        return found


def _sites(program: Program) -> tuple[Attention, ...]:
    types = infer(program)
    return (*types.facts.attentions, *attention_sites(types))


def find_heads(program: Program) -> tuple[Heads, ...]:
    """The KV heads of every attention of `program` that has more than one."""
    return HeadAnalysis(program).heads


def merge_of(heads: Heads, groups: int, moves: tuple[Order, ...] = ()) -> Merge:
    """The merge of `heads` into `groups`, after `moves` that make those of a group neighbours.

    Raises
    ------
    MergeError
        When the heads cannot be merged, or `groups` does not divide their number.
    """
    if heads.refusal:
        raise MergeError(f"{heads.name}: KV heads cannot be merged: {heads.refusal}")
    if groups < 1 or heads.size % groups:
        raise MergeError(f"{heads.name}: {groups} groups do not divide {heads.size} KV heads")
    return Merge(heads.name, heads.size, groups, heads.members, heads.orders, moves)


def merge_heads(program: Program, merges: tuple[Merge, ...]) -> Program:
    """`program` with the KV heads of `merges` pooled.

    Raises
    ------
    PlanError
        When a merge names heads that the program does not have.
    MergeError
        When the heads cannot be merged.
    """
    fused = {order.weight for merge in merges for order in merge.orders}
    moves = [order for merge in merges for order in merge.moves]
    program = program.with_weights(laid_out(program.weights, moves)) if moves else program
    analysis = HeadAnalysis(program, fused)
    named = {heads.name: heads for heads in analysis.heads}
    cuts: dict[Axis, Cut | Growth] = {}
    spread: list[tuple[Heads, int]] = []
    for merge in merges:
        heads = named.get(merge.group)
        ours = (heads.size, heads.members, heads.orders) if heads else None
        if heads is None or ours != (merge.size, merge.members, merge.orders):
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
    weights = analysis.types.program.weights
    pooled = {**weights, **pool(weights, merges)}
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


def _pool_member(weight: Tensor, member: IndexMap, merge: Merge) -> Tensor:
    for first in range(0, merge.size, merge.width):
        units = range(first, first + merge.width)
        places = [torch.tensor(member.indices(unit), device=weight.device) for unit in units]
        slices = [weight.index_select(member.dim, place).double() for place in places]
        mean = (sum(slices[1:], slices[0]) / merge.width).to(weight.dtype)
        for place in places:
            weight.index_copy_(member.dim, place, mean)
    return weight


def mean_of(weight: str, heads: Tensor) -> Tensor:
    """The mean of ``[heads, ...]``, the slices of `weight` that become one."""
    return heads.double().mean(0)


def equal_heads(
    weights: Mapping[str, Tensor],
    heads: Heads,
    groups: Iterable[Sequence[int]],
    choose: Callable[[str, Tensor], Tensor] = mean_of,
) -> dict[str, Tensor]:
    """The weights of `heads` as they are when the heads of each group are equal.

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
            places = torch.tensor([slices[head] for head in group], device=weight.device)
            rows[places] = choose(name, rows[places]).to(rows.dtype).expand_as(rows[places])
        found[name] = weight
    return found


def _slots(types: Types, heads: Heads) -> list[Atom]:
    """Atoms along which the graph itself repeats keys and values for their queries."""
    marked = {
        atom
        for mark in types.facts.marks
        if mark.kind == "spread" and heads.atom in types.held[mark.node]
        for atom in types.axes.atoms(mark.axis)
        if atom.size < _DYNAMIC
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
