"""Which coupled groups are free to be mixed: the answer for a group, or the reason against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from graphprune.analysis.axes import Atom
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.mixing.gains import find_gains
from graphprune.analysis.mixing.operators import Squares, read_node, read_norm
from graphprune.analysis.mixing.places import Bases, Basis, Unmixable
from graphprune.ir.program import PAST, PRESENT


@dataclass(frozen=True, eq=False)
class Mixable:
    """A group whose units may be replaced by independent linear combinations of them.

    Under each unit of the group's parents that may be another combination.

    Parameters
    ----------
    group
        The group.
    bases
        For each of its members how it is mixed, for a matrix A that is the same for all; None for
        those that are gains.
    gains
        Parameters that become neutral, since others take over what they multiply by -> what the
        graph adds to them.
    orthogonal
        Whether A must be orthogonal.
    """

    group: Group
    bases: tuple[Basis | None, ...]
    gains: Mapping[str, float]
    orthogonal: bool


def mixable(coupling: Coupling, group: Group) -> Mixable:
    """Return how the units of `group` may be mixed so that the program gives what it gave.

    The caches of the program are then held in the new basis, coming in and going out.

    Raises
    ------
    Unmixable
        With the first reason against it.
    """
    atom, types = coupling.atom(group.name), coupling.types
    bases = Bases(types, atom)
    weights = dict(types.program.weight_nodes())
    _ends(coupling, bases)
    nodes = list(_around(coupling, atom))
    gains = find_gains(bases, nodes)
    inside = {node for gain in gains.values() for node in gain.nodes}
    squares: Squares = {}
    for node in nodes:
        if node in gains and gains[node].source not in squares:
            read_norm(bases, node)
            bases.gained(gains[node].source, gains[node].weight, node)
        elif node not in inside:
            read_node(bases, node, squares)
    solved = bases.solved()
    found: list[Basis | None] = []
    for member in group.members:
        node = weights[member.weight]
        if member.owner is not None:
            raise Unmixable("its units own whole weights", node)
        holder = bases.holder(node)
        at = [each.offset for each in holder.occurrences].index(member.offset)
        found.append(None if node in inside else solved.get(holder.places[at], Basis()))
    offsets = {gain.weight: gain.offset for gain in gains.values()}
    return Mixable(group, tuple(found), offsets, bases.orthogonal)


def _ends(coupling: Coupling, bases: Bases) -> None:
    """Check weights, inputs and outputs; caches come in as they went out."""
    program = coupling.program
    kept = {value.name.removeprefix(PAST): node for value, node in program.input_nodes()}
    for name, node in program.weight_nodes():
        if bases.holds(node) and program.kinds[name] != "parameter":
            raise Unmixable(f"{name}, which holds it, is no parameter", node)
    returned = {}
    for value, node in program.output_nodes():
        name = value.name.removeprefix(PRESENT)
        cached = value.name.startswith(PRESENT) and name in kept
        if bases.holds(node) and not cached:
            raise Unmixable(f"it goes out in {value.name}", node)
        returned[name] = node
    for value, node in program.input_nodes():
        name = value.name.removeprefix(PAST)
        if not bases.holds(node):
            continue
        if not (value.is_cache and name in returned):
            raise Unmixable(f"it comes in with {value.name}", node)
        bases.same(node, returned[name])


def _around(coupling: Coupling, atom: Atom) -> Iterator[fx.Node]:
    """Yield the operators that have the axis in what they take or give, in order."""
    atoms_of = coupling.types.atoms_of
    for node in coupling.program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if any(atom in atoms_of.get(n, ()) for n in (node, *node.all_input_nodes)):
            yield node
