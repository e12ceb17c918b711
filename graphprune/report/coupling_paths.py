"""The operators that couple two weights: how an axis gets from one to the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from graphprune.analysis.axes import Atom
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.errors import UsageError
from graphprune.ir.provenance import whereabouts


@dataclass(frozen=True)
class PathStep:
    """One step of a path: `operator` joins the value before with `value`."""

    operator: fx.Node
    value: fx.Node


@dataclass(frozen=True, eq=False)
class CouplingPaths:
    """Walks along the axis of a group, from weight to weight.

    An operator joins all its operands and results that hold the axis: those of `mul` are one after
    broadcasting, a matrix product sums one operand's axis over the other's. A path from weight to
    weight over such operators is why the two are coupled; the shortest one is given.

    Parameters
    ----------
    coupling
        The analysis.
    """

    coupling: Coupling

    def between(self, group: str, first: str, second: str) -> list[PathStep]:
        """Return the steps from one weight to another along the axis of `group`.

        Raises
        ------
        UsageError
            When there is no such group, one of the weights is no member of it, or no operator leads
            from one to the other but an index that is chosen at run time (experts).
        """
        members = self.coupling.group(group).weights()
        aliases = self.coupling.program.aliases
        first, second = (aliases.get(name, name) for name in (first, second))
        for name in (first, second):
            if name not in members:
                raise UsageError(f"{name} is no member of {group}")
        end = dict(self.coupling.program.weight_nodes())[second]
        tree = self.tree(group, first)
        if end not in tree:
            raise UsageError(
                f"{first} and {second} are coupled by what is chosen at run time: the units of one "
                "are picked by index in the other"
            )
        return _path(tree, end)

    def tree(self, group: str, root: str) -> dict[fx.Node, PathStep | None]:
        """Every value that the axis reaches -> the last step to it from the weight `root`.

        The step's value is the one before; that of `root` itself is None.
        """
        atom = self.coupling.atom(group)
        start = dict(self.coupling.program.weight_nodes())[root]
        found: dict[fx.Node, PathStep | None] = {start: None}
        queue = deque([start])
        while queue:
            value = queue.popleft()
            for operator in self._operators(value):
                for other in self._joined(operator, atom):
                    if other not in found:
                        found[other] = PathStep(operator, value)
                        queue.append(other)
        return found

    def _operators(self, value: fx.Node) -> list[fx.Node]:
        made = [value] if value.op == "call_function" else []
        return [*made, *(user for user in value.users if user.op == "call_function")]

    def _joined(self, operator: fx.Node, atom: Atom) -> list[fx.Node]:
        values = (*operator.all_input_nodes, operator)
        return [value for value in values if atom in self._atoms_of.get(value, ())]

    @cached_property
    def _atoms_of(self) -> dict[fx.Node, frozenset[Atom]]:
        return self.coupling.types.atoms_of


def _path(tree: dict[fx.Node, PathStep | None], end: fx.Node) -> list[PathStep]:
    """Return the steps to `end`, each with the value that it leads to."""
    steps, value = [], end
    while (step := tree[value]) is not None:
        steps.append(PathStep(step.operator, value))
        value = step.value
    return steps[::-1]


def explanation(coupling: Coupling, weight: str, dim: int) -> str:
    """Return what a dimension is made of, its groups, and what couples each with another weight."""
    lines = [coupling.explain(weight, dim)]
    for group, name, other in _coupled(coupling, weight, dim):
        lines += ["", str(group)]
        if other is not None:
            lines.append(path_text(coupling, group.name, name, other))
    return "\n".join(lines)


def explanation_json(coupling: Coupling, weight: str, dim: int) -> dict[str, Any]:
    """Return the same as plain data."""
    text = coupling.explain(weight, dim)
    rank = coupling.program.weight(weight).ndim
    groups = []
    for group, name, other in _coupled(coupling, weight, dim):
        found: dict[str, Any] = {
            "name": group.name,
            "size": group.size,
            "role": group.role,
            "exactness": group.exactness,
            "why": group.why,
            "members": [[member.weight, member.dim] for member in group.members],
        }
        if other is not None:
            found["with"] = other
            with suppress(UsageError):  # nothing but a choice at run time couples them
                found["path"] = _path_lines(coupling, group.name, name, other)
        groups.append(found)
    name = coupling.program.aliases.get(weight, weight)
    return {
        "weight": weight,
        "dimension": dim % rank,
        "type": coupling.type_of(weight).text[dim % rank],
        "groups": groups,
        "frozen": [
            {"size": reason.axis.size, "why": reason.why, "at": whereabouts(reason.node)}
            for held, at, reason in coupling.frozen()
            if (held, at) == (name, dim % rank)
        ],
        "text": text,
    }


def _coupled(coupling: Coupling, weight: str, dim: int) -> Iterator[tuple[Group, str, str | None]]:
    """Yield the groups of a dimension, with its weight's own name and another weight of theirs."""
    name = coupling.program.aliases.get(weight, weight)
    dim %= coupling.program.weight(name).ndim
    for group in coupling.groups:
        if any(member.weight == name and member.dim == dim for member in group.members):
            yield group, name, next((w for w in reversed(group.weights()) if w != name), None)


def path_text(coupling: Coupling, group: str, first: str, second: str) -> str:
    """Return why two weights of a group are coupled, an operator in each line."""
    try:
        lines = _path_lines(coupling, group, first, second)
    except UsageError as error:
        return f"  {error}"
    return "\n".join([f"  from {first} to {second}:", *(f"    {line}" for line in lines)])


def _path_lines(coupling: Coupling, group: str, first: str, second: str) -> list[str]:
    steps = CouplingPaths(coupling).between(group, first, second)
    return [whereabouts(step.operator) for step in steps]
