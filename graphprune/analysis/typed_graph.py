"""A graph whose dimensions have axes: what the operator rules said about every node."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
from torch import fx

from graphprune.analysis.axes import Atom, Axes, Axis
from graphprune.analysis.operators.facts import Facts, Type, ZeroPropagation
from graphprune.ir.aten import is_view
from graphprune.ir.program import Program


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


def _may_share(node: fx.Node) -> bool:
    return node.target is operator.getitem or is_view(node)
