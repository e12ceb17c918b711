"""Which coupled groups are free to be mixed: the answer for a group, or the reason against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from graphprune.analysis.axes import Atom
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.mixing.operators import Squares, read_node
from graphprune.analysis.mixing.places import Bases, Unmixable
from graphprune.ir.program import PAST, PRESENT


@dataclass(frozen=True, eq=False)
class Mixable:
    """A group whose units may be replaced by independent linear combinations of them.

    Under each unit of the group's parents that may be another combination.

    Parameters
    ----------
    group
        The group.
    sides
        For each of its members 1, where a matrix T along it gives the new units, or -1, where it is
        the inverse of the transpose of T.
    orthogonal
        Whether T must be orthogonal.
    """

    group: Group
    sides: tuple[int, ...]
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
    squares: Squares = set()
    for node in _around(coupling, atom):
        read_node(bases, node, squares)
    sides = bases.sides()
    found = []
    for member in group.members:
        node = weights[member.weight]
        if member.owner is not None:
            raise Unmixable("its units own whole weights", node)
        holder = bases.holder(node)
        at = [each.offset for each in holder.occurrences].index(member.offset)
        found.append(sides.get(holder.places[at], 1))
    return Mixable(group, tuple(found), bases.orthogonal)


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
