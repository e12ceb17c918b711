"""What an axis does: read from how the graph uses it, never from a module's name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from torch import fx

from graphprune.analysis.axes import Atom, Axis
from graphprune.analysis.inference import Types
from graphprune.analysis.operators.rule import Attention, Zero
from graphprune.ir.aten import PRODUCTS, name_of, plain_name, uncopied

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
    """The role of each of `atoms`."""
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
        for mark in types.facts.marks
        if mark.kind == kind
        for atom in types.axes.atoms(mark.axis)
    }


def _spread(types: Types, atoms: Collection[Atom]) -> Iterator[Atom]:
    """Atoms along which values that hold other groups are repeated (keys over query slots)."""
    groups = set(atoms)
    for mark in types.facts.marks:
        if mark.kind == "spread" and mark.node.all_input_nodes:
            found = set(types.axes.atoms(mark.axis))
            if found & groups and (types.held[mark.node.all_input_nodes[0]] - found) & groups:
                yield from found


def _beside_picked(types: Types) -> set[Atom]:
    """Atoms in weights of which one axis is picked by index at run time (packed experts)."""
    picked = _marked(types, "picked")
    found: set[Atom] = set()
    for _, node in types.program.weight_nodes():
        if types.held[node] & picked:
            found |= types.held[node]
    return found


def _multiplied(types: Types) -> set[Atom]:
    """Atoms in matrix products of two computed values: they mix places, as attention does."""
    computed = {node for _, node in types.program.input_nodes()}
    found: set[Atom] = set()
    for node in types.program.graph.nodes:
        if node.op != "call_function" or computed.isdisjoint(node.all_input_nodes):
            continue
        computed.add(node)
        factors = [other for other in node.all_input_nodes if other in computed]
        alone = len(node.all_input_nodes) == 1
        if name_of(node) in _PRODUCTS and (alone or len(factors) > 1):
            found = found.union(*(types.held[other] for other in factors))
    return found


# -- attention ----------------------------------------------------------------------------------


def _attention_axes(types: Types) -> tuple[set[Atom], set[Atom], set[Atom]]:
    """Atoms of head axes, of query-key axes, and of value axes."""
    heads: set[Atom] = set()
    keys: set[Atom] = set()
    values: set[Atom] = set()
    for site in (*types.facts.attentions, *attention_sites(types)):
        for axis in site.heads:
            heads |= set(types.axes.atoms(axis))
        keys |= set(types.axes.atoms(site.key))
        values |= set(types.axes.atoms(site.value))
    return heads, keys, values


def _attended(types: Types) -> set[Atom]:
    """Atoms in keys or values: heads that are not among them share theirs with other heads."""
    found: set[Atom] = set()
    for site in (*types.facts.attentions, *attention_sites(types)):
        for operand in site.operands[1:]:
            found |= types.held[operand]
    return found


_PARTING = ("slice", "narrow", "split_with_sizes", "split")
_JOINTS = ("cat", "constant_pad_nd", "pad")
_PRODUCTS = PRODUCTS | {"baddbmm", "einsum"}


def attention_sites(types: Types) -> Iterator[Attention]:
    """Attention spelled out: a product, a softmax over its last axis, and a product again.

    Where one softmax runs over the scores of several products that are joined, and its parts weigh
    several values, there is one for each.
    """
    for node in (mark.node for mark in types.facts.marks if mark.kind == "softmax"):
        several, contexts = _back_to_products(types, node), _on_to_products(node)
        probabilities: tuple[Axis, ...] = types.of[node]
        for at in range(max(len(several), len(contexts)) if several and contexts else 0):
            scores, context = (
                several[min(at, len(several) - 1)],
                contexts[min(at, len(contexts) - 1)],
            )
            query, key = (*scores.all_input_nodes, *scores.all_input_nodes)[-2:]
            operands = (query, key, context.all_input_nodes[-1])
            yield Attention(
                (scores, context),
                probabilities[:-2],
                types.of[query][-1],
                types.of[context][-1],
                operands,
            )


def _back_to_products(types: Types, node: fx.Node) -> list[fx.Node]:
    """The products behind a softmax: the nearest along the axis that it runs over.

    Of what is joined each part may have one; it may also hold no scores, such as a sink.
    """
    pending, seen = [node], {node}
    while pending:
        node = pending.pop(0)
        if name_of(node) in _PRODUCTS:
            return [node]
        along = types.of[node][-1]
        joint = name_of(node) in _JOINTS
        inputs = []
        for other in dict.fromkeys(node.all_input_nodes):
            type_ = types.of.get(other)
            if other in seen or not isinstance(type_, tuple) or not type_:
                continue
            if (joint or types.axes.same(type_[-1], along)) and (
                other.meta["val"].is_floating_point()
            ):
                inputs.append(other)
        if joint and len(inputs) > 1:
            parts = (_back_to_products(types, each) for each in inputs)
            return list(dict.fromkeys(product for found in parts for product in found))
        seen.update(inputs)
        pending += inputs
    return []


def _on_to_products(node: fx.Node, steps: int = 12) -> list[fx.Node]:
    """The products in which probabilities, or parts of them, weigh values."""
    users = list(node.users)
    if len(users) > 1:
        users = [user for user in users if name_of(user) in _PARTING]
    found: list[fx.Node] = []
    for user in users:
        if name_of(user) in _PRODUCTS:
            found += [user] if user.all_input_nodes[0] is node else []
        elif steps:
            found += _on_to_products(user, steps - 1)
    return list(dict.fromkeys(found))


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
        for atom in (types.held.get(node, frozenset()) & groups) - found:
            around = _reaches(late, early, order, types, None)
            if around and not _reaches(late, early, order, types, atom):
                found.add(atom)
    return found


def _reaches(
    late: fx.Node, early: fx.Node, order: dict[fx.Node, int], types: Types, atom: Atom | None
) -> bool:
    """Whether `late` is computed from `early` (through values that hold `atom` only)."""
    limit = order[early]
    pending, seen = [late], {late}
    while pending:
        node = pending.pop()
        if node is early:
            return True
        # Zeros to add to are of the form of a value, and nothing of it is in them.
        for other in node.all_input_nodes if types.laws.get(node) is not Zero.ALWAYS else ():
            if other in seen or order[other] < limit:
                continue
            if atom is not None and atom not in types.held.get(other, frozenset()):
                continue
            seen.add(other)
            pending.append(other)
    return False
