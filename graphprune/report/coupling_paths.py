"""The operators that couple two weights: how an axis gets from one to the other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphprune.analysis.axes import Atom
from graphprune.analysis.coupling import Coupling
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


def path_text(coupling: Coupling, group: str, first: str, second: str) -> str:
    """Return why two weights of a group are coupled, an operator in each line."""
    try:
        steps = CouplingPaths(coupling).between(group, first, second)
    except UsageError as error:
        return f"  {error}"
    lines = (f"    {whereabouts(step.operator)}" for step in steps)
    return "\n".join([f"  from {first} to {second}:", *lines])
