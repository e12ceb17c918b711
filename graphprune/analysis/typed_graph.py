"""A graph whose dimensions have axes: what the operator rules said about every node."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
from torch import fx

from graphprune.analysis.axes import Atom, Axes, Axis
from graphprune.analysis.operators.facts import Facts, Type, ZeroPropagation
from graphprune.ir.aten import MOVES, PRODUCTS, is_view, plain_name
from graphprune.ir.program import Program


@dataclass(frozen=True)
class Length:
    """The parameter `name` that a weight has for its norm over the dimensions `dims`."""

    name: str
    dims: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class NormalizedWeight:
    """A weight that a graph divides by a norm of itself, or centers, before it uses it.

    Parameters
    ----------
    name, weight
        The parameter and its node.
    result
        The normalized weight.
    inside
        `weight` and all that is computed from it and other weights alone.
    atoms
        What the norm runs over: without some of their units the others would be scaled otherwise.
    foldable
        Whether `result` can take the place of `weight`: then the norm is that of all units.
    length
        What `result` has for its norm where that is a parameter, as in weight normalization
        (Salimans and Kingma, 2016, equation 2): it can take over what the norm loses instead.
    """

    name: str
    weight: fx.Node
    result: fx.Node
    inside: frozenset[fx.Node]
    atoms: frozenset[Atom]
    foldable: bool
    length: Length | None = None


@dataclass(frozen=True, eq=False)
class TypedGraph:
    """All that the rules said about the graph of a program.

    Parameters
    ----------
    program
        The program.
    axes
        The store of axes.
    axes_of
        Every tensor node -> its axes (a list of them for several results).
    facts
        Literals, reasons to freeze and uses of axes, as the rules said them.
    zero_rules
        Where each result is zero when the weights of a unit are zeroed.
    written
        Nodes that write one of their operands in place.
    dynamic
        The integers that stand for dynamic sizes -> the expressions that they stand for.
    """

    program: Program
    axes: Axes
    axes_of: dict[fx.Node, Any]
    facts: Facts
    zero_rules: dict[fx.Node, ZeroPropagation]
    written: frozenset[fx.Node]
    dynamic: Mapping[int, sympy.Expr]

    def weight(self, name: str) -> Type:
        """Return the axes of the weight called `name` (which may be a tied name)."""
        node = self._weight_nodes[self.program.aliases.get(name, name)]
        found: Type = self.axes_of[node]
        return found

    @cached_property
    def _weight_nodes(self) -> dict[str, fx.Node]:
        return dict(self.program.weight_nodes())

    def is_dynamic(self, axis: Axis) -> bool:
        """Return whether the size of `axis` is not known before the program runs."""
        size = axis.size
        return size in self.dynamic or any(size % symbol == 0 for symbol in self._symbol_sizes)

    @cached_property
    def _symbol_sizes(self) -> list[int]:
        """The primes that stand for single symbols: what they divide is made of them."""
        return [size for size, expression in self.dynamic.items() if expression.is_Symbol]

    @cached_property
    def atoms_of(self) -> dict[fx.Node, frozenset[Atom]]:
        """Every tensor node -> the atoms in its axes."""
        nothing: frozenset[Atom] = frozenset()
        found = {}
        for node, type_ in self.axes_of.items():
            if type_ is None:
                continue
            flat = (
                itertools.chain.from_iterable(t or () for t in type_)
                if isinstance(type_, list)
                else type_
            )
            found[node] = nothing.union(*map(self.atoms_in, flat))
        return found

    def atoms_in(self, axis: Axis) -> frozenset[Atom]:
        """Return the atoms inside `axis`."""
        if axis not in self._atoms:
            self._atoms[axis] = frozenset(self.axes.atoms(axis))
        return self._atoms[axis]

    @cached_property
    def _atoms(self) -> dict[Axis, frozenset[Atom]]:
        return {}

    def base(self, node: fx.Node) -> fx.Node:
        """Return the tensor whose memory `node` may share: views are followed to their source."""
        while _may_share(node) and node.args[0] in self.atoms_of:
            node = node.args[0]  # type: ignore[assignment]
        return node

    # -- weights that are normalized ------------------------------------------------------------

    @cached_property
    def normalized_weights(self) -> tuple[NormalizedWeight, ...]:
        """Weights of which the graph takes a norm, and scales what the norm was taken over."""
        found = []
        for name, weight in self.program.weight_nodes():
            if self.program.kinds[name] != "parameter":
                continue
            inside = self._made_of_weights(weight)
            ends = [n for n in inside if any(user not in self._of_weights for user in n.users)]
            if len(inside) == 1 or not ends:
                continue
            itself, values = self._scaled_over(inside)
            if itself or values:
                alone = len(ends) == 1 and self._could_replace(weight, ends[0]) and not values
                inner, atoms = frozenset(inside), itself | values
                length = self._length(weight, ends[-1]) if alone else None
                found.append(NormalizedWeight(name, weight, ends[-1], inner, atoms, alone, length))
        return tuple(found)

    def _length(self, weight: fx.Node, result: fx.Node) -> Length | None:
        """Return the length of `result`, where that is ``weight * (length / norm(weight))``."""
        names = {node: name for name, node in self.program.weight_nodes()}
        if plain_name(result) != "mul" or result.args[0] is not weight:
            return None
        scale: Any = result.args[1]
        if not isinstance(scale, fx.Node) or plain_name(scale) != "div":
            return None
        length, norm = scale.args
        if length not in names or len(length.users) > 1 or not isinstance(norm, fx.Node):  # type: ignore[union-attr]
            return None
        if plain_name(norm) != "linalg_vector_norm" or norm.args[:2] != (weight, 2):
            return None
        return Length(names[length], tuple(norm.args[2]))  # type: ignore[index,arg-type]

    @cached_property
    def _of_weights(self) -> dict[fx.Node, set[fx.Node]]:
        """Nodes that are computed from weights alone -> the parameters that they depend on."""
        kinds = self.program.kinds
        found = {
            node: {node} if kinds[name] == "parameter" else set[fx.Node]()
            for name, node in self.program.weight_nodes()
        }
        for node in self.program.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "call_function" and inputs and all(other in found for other in inputs):
                found[node] = set[fx.Node]().union(*(found[other] for other in inputs))
        return found

    def _made_of_weights(self, weight: fx.Node) -> list[fx.Node]:
        """Return `weight` and what is computed from it and other weights alone, in order."""
        inside, pending = {weight}, [weight]
        while pending:
            for user in pending.pop().users:
                if user in self._of_weights and user not in inside:
                    inside.add(user)
                    pending.append(user)
        if len(inside) == 1:
            return [weight]
        return [node for node in self._of_weights if node in inside]

    def _scaled_over(self, inside: Sequence[fx.Node]) -> tuple[frozenset[Atom], frozenset[Atom]]:
        """Return the atoms that something of `inside` is reduced over, to scale others by it.

        The first are of what is joined again with a weight that has them, the second of norms that
        values of the program are multiplied with or divided by.
        """
        nothing: frozenset[Atom] = frozenset()
        reduced: dict[fx.Node, frozenset[Atom]] = {}
        facts = self.facts
        sums = [(entry.node, entry.axis) for entry in facts.contractions]
        sums += [(entry.node, entry.axis) for entry in facts.means]
        sums += [(entry.node, entry.axis) for entry in facts.statistics]
        for node, axis in sums:
            factors = [n for n in node.all_input_nodes if self._of_weights.get(n)]
            if node in inside and len(factors) == 1:  # a product of two parameters is no norm
                reduced[node] = reduced.get(node, nothing) | self.atoms_in(axis)
        norms = {node: atoms for node, atoms in reduced.items() if not _is_linear(node)}
        itself: set[Atom] = set()
        values: set[Atom] = set()
        for node in inside:
            inputs = node.all_input_nodes
            for other in inputs:
                over = reduced.get(other, nothing)
                rest = [self.atoms_of.get(n, nothing) for n in inputs if n is not other]
                itself |= over.intersection(nothing.union(*rest))
                reduced[node] = reduced.get(node, nothing) | over
                norms[node] = norms.get(node, nothing) | norms.get(other, nothing)
            outside = [user for user in node.users if user not in self._of_weights]
            if any(plain_name(user) in ("mul", "div") for user in outside):
                values |= norms.get(node, nothing) - self.atoms_of.get(node, nothing)
        return frozenset(itself), frozenset(values)

    def _could_replace(self, weight: fx.Node, result: fx.Node) -> bool:
        """Return whether `result` has the form of `weight`."""
        ours, theirs = self.axes_of[weight], self.axes_of.get(result)
        if not isinstance(theirs, tuple) or weight.meta["val"].dtype != result.meta["val"].dtype:
            return False
        return len(ours) == len(theirs) and all(map(self.axes.same, ours, theirs))


def _is_linear(node: fx.Node) -> bool:
    """Return whether a reduction of a weight is a sum or mean of its elements as they are."""
    source = node.all_input_nodes[0]
    while plain_name(source) in MOVES:
        source = source.all_input_nodes[0]
    return plain_name(node) in {"sum", "mean"} | PRODUCTS and source.op == "placeholder"


def _may_share(node: fx.Node) -> bool:
    return node.target is operator.getitem or is_view(node)
