"""The role of an axis: read from how the graph uses it, never from a module's name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from torch import fx

from graphprune.analysis.attention.attentions import ALL_PRODUCTS, attentions
from graphprune.analysis.axes import Atom
from graphprune.analysis.operators.facts import ZeroRule
from graphprune.analysis.types import Types
from graphprune.ir.aten import name_of, plain_name, uncopied

Role = Literal[
    "kv-head",
    "query-slot",
    "head-dim",
    "rope-pair",
    "ffn",
    "expert",
    "expert-unit",
    "residual",
    "channel",
    "other",
]

LABELS: dict[Role, str] = {
    "kv-head": "kv",
    "query-slot": "q",
    "head-dim": "d",
    "rope-pair": "r",
    "ffn": "ffn",
    "expert": "e",
    "expert-unit": "unit",
    "residual": "hidden",
    "channel": "c",
    "other": "x",
}
"""Role -> how its axis is called inside a printed type."""


def find_roles(types: Types, atoms: Collection[Atom]) -> dict[Atom, Role]:
    """Return the role of each of `atoms`."""
    heads, keys, values = _attention_axes(types)
    attended = _attended(types)
    rotary = _marked(types, "rotary")
    spread = set(_spread(types, atoms))
    residual = _residual(types, atoms)
    convolved, linear = _marked(types, "convolved"), _marked(types, "linear")
    picked = _beside_picked(types)
    multiplied = _multiplied(types)
    roles: dict[Atom, Role] = {}
    for atom in atoms:
        if atom in heads:
            own = atom in attended and atom not in spread
            roles[atom] = "kv-head" if own else "query-slot"
        elif atom in keys or atom in values:
            roles[atom] = "rope-pair" if atom in rotary else "head-dim"
        elif atom in residual:
            roles[atom] = "residual"
        elif atom in types.chosen:
            roles[atom] = "expert"
        elif atom in picked and atom in linear:
            roles[atom] = "expert-unit"
        elif atom in convolved:
            roles[atom] = "channel"
        elif atom in linear and atom not in multiplied:
            roles[atom] = "ffn"
        else:
            roles[atom] = "other"
    return roles


def _marked(types: Types, kind: str) -> set[Atom]:
    return {
        atom
        for mark in types.facts.uses
        if mark.kind == kind
        for atom in types.axes.atoms(mark.axis)
    }


def _spread(types: Types, atoms: Collection[Atom]) -> Iterator[Atom]:
    """Atoms along which values that hold other groups are repeated (keys over query slots)."""
    groups = set(atoms)
    for mark in types.facts.uses:
        if mark.kind == "spread" and mark.node.all_input_nodes:
            found = set(types.axes.atoms(mark.axis))
            if found & groups and (types.atoms_of[mark.node.all_input_nodes[0]] - found) & groups:
                yield from found


def _beside_picked(types: Types) -> set[Atom]:
    """Atoms in weights of which one axis is picked by index at run time (packed experts).

    A table of tokens is a matrix whose rows are picked; what experts hold are matrices.
    """
    picked = _marked(types, "picked")
    found: set[Atom] = set()
    for _, node in types.program.weight_nodes():
        if types.atoms_of[node] & picked and node.meta["val"].ndim > 2:
            found |= types.atoms_of[node]
    return found


def _multiplied(types: Types) -> set[Atom]:
    """Atoms in matrix products of two computed values: they mix positions, as attention does."""
    computed = {node for _, node in types.program.input_nodes()}
    found: set[Atom] = set()
    for node in types.program.graph.nodes:
        if node.op != "call_function" or computed.isdisjoint(node.all_input_nodes):
            continue
        computed.add(node)
        factors = [other for other in node.all_input_nodes if other in computed]
        alone = len(node.all_input_nodes) == 1
        if name_of(node) in ALL_PRODUCTS and (alone or len(factors) > 1):
            found = found.union(*(types.atoms_of[other] for other in factors))
    return found


# -- attention ----------------------------------------------------------------------------------


def _attention_axes(types: Types) -> tuple[set[Atom], set[Atom], set[Atom]]:
    """Atoms of head axes, of query-key axes, and of value axes."""
    heads: set[Atom] = set()
    keys: set[Atom] = set()
    values: set[Atom] = set()
    for each in attentions(types):
        for axis in each.head_axes(types):
            heads |= set(types.axes.atoms(axis))
        keys |= set(types.axes.atoms(each.key_axis(types)))
        values |= set(types.axes.atoms(each.value_axis(types)))
    return heads, keys, values


def _attended(types: Types) -> set[Atom]:
    """Atoms in keys or values: heads that are not among them share theirs with other heads."""
    found: set[Atom] = set()
    for each in attentions(types):
        for operand in each.operands[1:]:
            found |= types.atoms_of[operand]
    return found


# -- residual streams ---------------------------------------------------------------------------


def _residual(types: Types, atoms: Collection[Atom]) -> set[Atom]:
    """Atoms along which a value is added to a function of itself that contracts them."""
    groups = set(atoms)
    order = {node: index for index, node in enumerate(types.program.graph.nodes)}
    found: set[Atom] = set()
    for node in types.program.graph.nodes:
        if plain_name(node) != "add":
            continue
        operands = [uncopied(n) for n in node.all_input_nodes if n.op == "call_function"]
        if len(operands) != 2 or any(operand.op != "call_function" for operand in operands):
            continue
        early, late = sorted(operands, key=order.__getitem__)
        for atom in (types.atoms_of.get(node, frozenset()) & groups) - found:
            around = reaches(late, early, order, types, None)
            if around and not reaches(late, early, order, types, atom):
                found.add(atom)
    return found


def reaches(
    late: fx.Node, early: fx.Node, order: dict[fx.Node, int], types: Types, atom: Atom | None
) -> bool:
    """Return whether `late` is computed from `early` (through values that hold `atom` only)."""
    limit = order[early]
    pending, seen = [late], {late}
    while pending:
        node = pending.pop()
        if node is early:
            return True
        # Zeros to add to are of the form of a value, and nothing of it is in them.
        for other in (
            node.all_input_nodes if types.zero_rules.get(node) is not ZeroRule.ALWAYS else ()
        ):
            if other in seen or order[other] < limit:
                continue
            if atom is not None and atom not in types.atoms_of.get(other, frozenset()):
                continue
            seen.add(other)
            pending.append(other)
    return False
