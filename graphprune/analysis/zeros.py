"""Where values become zero when the weights of a unit are zeroed.

Summing over an axis is exact after removal only where what is summed is zero at the removed units.
Each operator rule says where its result is zero, given its operands; this follows them through a
graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from torch import fx

from graphprune.analysis.axes import Atom, Axis, Product, Sum
from graphprune.analysis.operators.facts import ZeroPropagation, ZeroRule
from graphprune.analysis.typed_graph import TypedGraph
from graphprune.ir.program import PAST, PRESENT

NodeAtoms = Mapping[fx.Node, frozenset[Atom]]

_NOTHING: frozenset[Atom] = frozenset()


class Zeros:
    """Every node -> the atoms at whose units it is zero when their weights are zeroed.

    Parameters
    ----------
    graph
        The graph.
    chosen
        Atoms whose units are chosen at run time: what weights them is zero where none is.
    """

    def __init__(self, graph: TypedGraph, chosen: frozenset[Atom]) -> None:
        self.graph, self.chosen = graph, chosen
        self.axes, self.facts, self.atoms_of = graph.axes, graph.facts, graph.atoms_of

    def leaks(self) -> Iterator[tuple[Atom, fx.Node]]:
        """Atoms that are summed over where no operand is zero when their weights are zeroed."""
        for entry in self.facts.contractions:
            zero = _NOTHING.union(*(self.atoms[node] for node in entry.operands))
            for atom in self.axes.atoms(entry.axis):
                if atom not in zero:
                    yield atom, entry.node

    @cached_property
    def atoms(self) -> dict[fx.Node, frozenset[Atom]]:
        """Every node -> the atoms at whose units it is zero.

        A cache that comes in is one that went out before: it is zero where that is. So all of it
        is taken to be zero at first, and what goes out then says what is.
        """
        program = self.graph.program
        outputs = {value.name: node for value, node in program.output_nodes()}
        caches = {
            node: outputs[PRESENT + value.name.removeprefix(PAST)]
            for value, node in program.input_nodes()
            if value.name.startswith(PAST)
        }
        given = {node: self.atoms_of[node] for node in caches}
        while True:
            zeros = self._spread(given)
            found = {node: given[node] & zeros[output] for node, output in caches.items()}
            if found == given:
                return zeros
            given = found

    def _spread(self, given: NodeAtoms) -> dict[fx.Node, frozenset[Atom]]:
        """`atoms`, when inputs are zero as `given` says (and nowhere, where it says nothing)."""
        graph, atoms_of = self.graph, self.atoms_of
        weights = {node for _, node in graph.program.weight_nodes()}
        normalized = {each.result for each in graph.normalized_weights if each.foldable}
        zeros: dict[fx.Node, frozenset[Atom]] = {}
        for node in graph.program.graph.nodes:
            if graph.axes_of.get(node) is None:
                continue
            if node.op == "placeholder":
                zeros[node] = atoms_of[node] if node in weights else given.get(node, _NOTHING)
                continue
            if node in normalized:  # it becomes a weight where something of its norm would go
                zeros[node] = atoms_of[node]
                continue
            rule = graph.zero_rules.get(node, ZeroRule.NEVER)
            zeros[node] = _propagated(rule, node, self._cover(node, zeros), atoms_of)
            for cleared in (self._weighted, self._cleared):
                if node in cleared:
                    zeros[node] |= (atoms_of[node] & cleared[node]) - self._repeated[node]
            if node in graph.written:
                for other in zeros:
                    if graph.base(other) is graph.base(node):
                        zeros[other] = zeros[other] & zeros[node]
        return zeros

    @cached_property
    def _weighted(self) -> dict[fx.Node, frozenset[Atom]]:
        """Weights of what is chosen -> the atoms at whose units they are zero, never chosen."""
        return {
            entry.node: self.chosen.intersection(self.axes.atoms(entry.axis))
            for entry in self.facts.routing_weights
        }

    @cached_property
    def _cleared(self) -> dict[fx.Node, frozenset[Atom]]:
        """Nodes that center or scale by statistics of what stays -> the atoms that these run over.

        It is zero at their units that do not stay, whatever comes in there.
        """
        found: dict[fx.Node, frozenset[Atom]] = {}
        for entry in self.facts.statistics:
            if entry.clears:
                before = found.get(entry.node, _NOTHING)
                found[entry.node] = before.union(self.axes.atoms(entry.axis))
        return found

    def _cover(self, node: fx.Node, zeros: NodeAtoms) -> dict[fx.Node, frozenset[Atom]]:
        """Return what `zeros` of its operands says about the elements of `node`.

        Where ``x[:, None] * y[None]`` holds an atom in both dimensions, it is not zero wherever
        `x` is: at a unit of the second dimension it is `y` that counts. Nor is ``x @ y`` where
        `x` holds an atom that is summed over, if `y` brings it into the result.
        """
        several = self._repeated
        return {
            other: zeros[other]
            - (
                (several[node] | self._summed.get((node, other), _NOTHING))
                - several.get(other, _NOTHING)
            )
            for other in node.all_input_nodes
            if other in zeros
        }

    @cached_property
    def _summed(self) -> dict[tuple[fx.Node, fx.Node], frozenset[Atom]]:
        """(contraction of several, operand) -> the atoms of the operand that are summed over."""
        found: dict[tuple[fx.Node, fx.Node], frozenset[Atom]] = {}
        for entry in self.facts.contractions:
            for other in entry.operands if len(entry.node.all_input_nodes) > 1 else ():
                before = found.get((entry.node, other), _NOTHING)
                found[entry.node, other] = before | self.graph.atoms_in(entry.axis)
        return found

    @cached_property
    def _repeated(self) -> dict[fx.Node, frozenset[Atom]]:
        """Every tensor node -> the atoms that several coordinates of one element run over."""
        found = {}
        for node, type_ in self.graph.axes_of.items():
            if type_ is not None:
                several = type_ if isinstance(type_, list) else [type_]
                found[node] = _NOTHING.union(*(self._twice(t) for t in several if t))
        return found

    def _twice(self, axes: Iterable[Axis]) -> frozenset[Atom]:
        """Atoms that stand in several of `axes`, or several times in the factors of one."""
        seen: set[Atom] = set()
        again: set[Atom] = set()
        for axis in axes:
            inside = self.graph.atoms_in(axis)
            again |= seen & inside
            seen |= inside
            axis = self.axes.head(axis)
            if isinstance(axis, Product):
                again |= self._twice(axis.factors)
            elif isinstance(axis, Sum):
                again |= _NOTHING.union(*(self._twice((term,)) for term in axis.terms))
        return frozenset(again)


def _propagated(
    rule: ZeroPropagation, node: fx.Node, zeros: NodeAtoms, atoms_of: NodeAtoms
) -> frozenset[Atom]:
    here = atoms_of[node]
    if isinstance(rule, tuple):
        terms = (_NOTHING.union(*(zeros[factor] for factor in term)) for term in rule)
        return frozenset.intersection(here, *terms)
    operands = [other for other in node.all_input_nodes if other in zeros]
    if rule is ZeroRule.ALWAYS:
        return here
    if rule is ZeroRule.NEVER or not operands:
        return _NOTHING
    if rule is ZeroRule.AS_FIRST:
        return zeros[operands[0]] & here
    if rule is ZeroRule.ANY_OPERAND:
        return here.intersection(_NOTHING.union(*(zeros[other] for other in operands)))
    if rule is ZeroRule.ALL_OPERANDS:
        return frozenset.intersection(here, *(zeros[other] for other in operands))
    return frozenset(
        atom for atom in here if all(atom in zeros[o] for o in operands if atom in atoms_of[o])
    )
