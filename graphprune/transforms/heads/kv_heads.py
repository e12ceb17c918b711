"""The key and value heads of each attention, told apart from its query heads.

They are found by typing the graph once more with attention not making the two the same. The axis of
the key and value heads is then an atom of its own, and shrinks like any other. Where queries and
keys are interleaved in one projection, its rows are permuted part by part before; where they share
their heads otherwise, a merge is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from graphprune.analysis.attention.attentions import Attention, attentions
from graphprune.analysis.axes import Atom, Product
from graphprune.analysis.groups import common_path
from graphprune.analysis.index_maps import index_map, weight_occurrences
from graphprune.analysis.inference import infer
from graphprune.analysis.types import Types
from graphprune.ir.aten import name_of
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path
from graphprune.plan.index_map import IndexMap
from graphprune.plan.steps import Permutation
from graphprune.transforms.heads.deinterleave import deinterleave
from graphprune.transforms.heads.einsum_to_matmul import with_matrix_products


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
        How interleaved projections among the members are permuted for it.
    """

    name: str
    size: int
    queries: int
    members: tuple[IndexMap, ...]
    refusal: str
    atom: Atom
    attentions: tuple[Attention, ...]
    deinterleaving: tuple[Permutation, ...] = ()

    def slices(self) -> Iterator[tuple[str, int, list[list[int]]]]:
        """(weight, dim, the indices of every head) of every member, as the program counts them."""
        permuted = {(p.weight, p.dim): p.sources for p in self.deinterleaving}
        for member in self.members:
            sources = permuted.get((member.weight, member.dim), range(member.extent))
            found = [[sources[i] for i in member.indices(unit)] for unit in range(self.size)]
            yield member.weight, member.dim, found


class HeadAnalysis:
    """The KV heads of a program, typed apart from its query heads.

    Parameters
    ----------
    program
        The program.
    fused
        Projections that may be deinterleaved; by default those that hold heads of queries and of
        keys in one axis.
    """

    def __init__(self, program: Program, fused: Collection[str] | None = None) -> None:
        self._deinterleaving: dict[str, tuple[Permutation, ...]] = {}
        self._analyze(program)
        if fused is None:
            shared = [h for h in self.heads if h.refusal and self._is_shared(h.atom, h.attentions)]
            fused = {member.weight for heads in shared for member in heads.members}
        program, self._deinterleaving = deinterleave(program, fused)
        if self._deinterleaving:
            self._analyze(program)

    def _analyze(self, program: Program) -> None:
        found = attentions(infer(program))
        sums = [product for each in found for product in each.products]
        spelled = with_matrix_products(program, dict.fromkeys(sums))
        if spelled is not program:
            program, found = spelled, attentions(infer(spelled))
        self.types = infer(program, untied=found)
        self._weights = {node for _, node in program.weight_nodes()}
        by_atom: dict[Atom, list[Attention]] = {}
        for each in found:
            for atom in self._head_atoms(each):
                by_atom.setdefault(atom, []).append(each)
        self.heads = tuple(self._heads(atom, several) for atom, several in by_atom.items())

    def _head_atoms(self, attention: Attention) -> Iterable[Atom]:
        """Return the head atoms of the attended values that parameters hold: the KV heads."""
        kinds = self.types.program.kinds
        parameters = (
            n for name, n in self.types.program.weight_nodes() if kinds[name] == "parameter"
        )
        held = set[Atom]().union(*(self.types.atoms_of[node] for node in parameters))
        _, _, value = attention.operands
        batch = self.types.axes_of[value][:-2]
        found = dict.fromkeys(a for axis in batch for a in self.types.axes.atoms(axis))
        return [atom for atom in found if atom in held]

    def _heads(self, atom: Atom, several: list[Attention]) -> Heads:
        members = tuple(
            index_map(*found, {})
            for found in weight_occurrences(self.types)
            if found[-1].atom is atom
        )
        name = f"{common_path(member.weight for member in members)}:kv-head"
        query = self.types.axes_of[several[0].operands[0]]
        queries = 1
        for axis in query[:-2]:
            if axis.size % atom.size == 0 and not self.types.is_dynamic(axis):
                queries = max(queries, axis.size // atom.size)
        weights = dict.fromkeys(member.weight for member in members)
        permuted = dict.fromkeys(p for name in weights for p in self._deinterleaving.get(name, ()))
        why = self._refusal(atom, several)
        return Heads(name, atom.size, queries, members, why, atom, tuple(several), tuple(permuted))

    def _refusal(self, atom: Atom, several: list[Attention]) -> str:
        if atom in self.types.frozen:
            reason = self.types.frozen[atom]
            return f"{reason.why} at {reason.node.target} in {module_path(reason.node)}"
        if self._is_shared(atom, several):
            return self._tie(atom, several)
        means = {literal.node for literal in self.types.facts.means}
        for entry in self.types.facts.contractions:
            if entry.node not in means and atom in set(self.types.axes.atoms(entry.axis)):
                return f"{entry.node.target} in {module_path(entry.node)} sums over the heads"
        return ""

    def _is_shared(self, atom: Atom, several: Iterable[Attention]) -> bool:
        return any(atom in self.types.atoms_of[each.operands[0]] for each in several)

    def _tie(self, atom: Atom, several: list[Attention]) -> str:
        """Say what makes the heads of queries and keys one axis, though attention does not."""
        ours = self._behind(atom, (each.operands[0] for each in several))
        theirs = self._behind(atom, (node for each in several for node in each.operands[1:]))
        common = [
            node
            for node in self.types.program.graph.nodes
            if node in ours & theirs and not self._weights.isdisjoint(node.all_input_nodes)
        ]
        if common and name_of(common[-1]) == "linear":
            return "query and key heads share one axis of a weight"
        found = common[-1] if common else self._joint(atom, several, ours, theirs)
        where = f" at {found.target} in {module_path(found)}" if found else ""
        return f"query and key heads are one axis outside of attention too{where}"

    def _joint(
        self, atom: Atom, several: list[Attention], ours: set[fx.Node], theirs: set[fx.Node]
    ) -> fx.Node | None:
        """Return the first node beside `several` that joins keys with queries or their results."""
        products = {product for each in several for product in each.products}
        queries, keys = set(ours), set(theirs)
        for node in self.types.program.graph.nodes:
            if atom not in self.types.atoms_of.get(node, ()):
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
        """Return `nodes` and what they are made of, as far as it holds `atom`."""
        pending = list(nodes)
        found = set(pending)
        while pending:
            for other in pending.pop().all_input_nodes:
                if other not in found and atom in self.types.atoms_of.get(other, ()):
                    found.add(other)
                    pending.append(other)
        return found


def find_heads(program: Program) -> tuple[Heads, ...]:
    """Return the KV heads of every attention of `program` that has more than one."""
    return HeadAnalysis(program).heads


def spread_atoms(types: Types, heads: Heads) -> list[Atom]:
    """Return the atoms along which the graph itself repeats keys and values for their queries."""
    marked = {
        atom
        for mark in types.facts.uses
        if mark.kind == "spread" and heads.atom in types.atoms_of[mark.node]
        for atom in types.axes.atoms(mark.axis)
        if not types.is_dynamic(atom)
    }
    found: dict[Atom, None] = {}
    for attention in heads.attentions:
        for operand in attention.operands[1:]:
            for axis in types.axes_of[operand][:-2]:
                axis = types.axes.head(axis)
                inside = list(types.axes.atoms(axis)) if isinstance(axis, Product) else []
                if heads.atom in inside:
                    found.update(
                        dict.fromkeys(a for a in inside if a in marked and a is not heads.atom)
                    )
    return list(found)
