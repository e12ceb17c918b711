"""The view that an operator rule has of a node: its arguments, its axes and its literals.

A rule is one function. It reads the axes of the operands, says which axes must be the same,
returns the axes of the result, and says in the same breath which literals of the node follow from
which axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx

from graphprune.analysis.axes import UNIT, Axes, Axis, Conflict
from graphprune.analysis.operators.facts import (
    AxisUse,
    Contraction,
    Facts,
    Frozen,
    Routing,
    RoutingWeight,
    SizeLiteral,
    Statistic,
    Type,
    UnitNumbers,
    UnitSelect,
    UnitStack,
    UseKind,
    ZeroRule,
)
from graphprune.ir.nodes import get_argument

Result = Type | list[Type | None] | None


@dataclass(frozen=True)
class Rule:
    """The typing of an operator, where its result is zero, and a line that says so."""

    names: tuple[str, ...]
    apply: Callable[[RuleContext], Result]
    zero: ZeroRule
    summary: str


class RuleContext:
    """A node being typed: its arguments by name, and what can be said about them."""

    __slots__ = (
        "untied",
        "axes",
        "unit_numbers",
        "facts",
        "node",
        "picked",
        "shapes",
        "terms",
        "types",
        "zero",
    )

    def __init__(
        self,
        node: fx.Node,
        axes: Axes,
        facts: Facts,
        types: dict[fx.Node, Any],
        shapes: Callable[[fx.Node], Any],
        zero: ZeroRule,
        unit_numbers: dict[UnitNumbers, Axis],
        untied: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self.node = node
        self.unit_numbers = unit_numbers
        self.picked: set[fx.Node] = set()
        self.untied = node in untied
        self.axes = axes
        self.facts = facts
        self.types = types
        self.shapes = shapes
        self.zero = zero
        self.terms: tuple[tuple[fx.Node, ...], ...] | None = None

    # -- arguments ------------------------------------------------------------------------------

    def arg(self, name: str) -> Any:
        """Return the argument called `name` in the operator's schema, or its default."""
        return get_argument(self.node, name)

    def type(self, name: str) -> Type:
        """Return the axes of the tensor argument called `name`."""
        found: Type = self.types[self.arg(name)]
        return found

    def shape(self, node: fx.Node | None = None) -> tuple[int, ...]:
        """Return generic sizes of `node` (the result by default); dynamic ones are large primes."""
        found: tuple[int, ...] = self.shapes(node or self.node)
        return found

    def operands(self) -> list[fx.Node]:
        """Return the tensor arguments, in order, those inside lists among them."""
        return [node for node in self.node.all_input_nodes if self.types.get(node) is not None]

    def dim(self, name: str, rank: int) -> int:
        """Return the dimension argument called `name`, counted from the front."""
        dim: int = self.arg(name)
        return dim + rank if dim < 0 else dim

    def dims(self, name: str, rank: int) -> list[int]:
        """Return a dimension list (or single dimension); all of them when it is empty or None."""
        given = self.arg(name)
        if given is None or given == []:
            return list(range(rank))
        given = [given] if isinstance(given, int) else given
        return [dim + rank if dim < 0 else dim for dim in given]

    # -- axes -----------------------------------------------------------------------------------

    def fresh(self, size: int) -> Axis:
        """Return a new axis that nothing is known about."""
        return self.axes.atom(size)

    def fixed(self, size: int, why: str) -> Axis:
        """Return a new axis that must keep all its units."""
        axis = self.axes.atom(size)
        self.freeze(axis, why)
        return axis

    def unify(self, left: Axis, right: Axis) -> None:
        """Make two axes the same; where that cannot be, freeze both."""
        if left is right:
            return
        try:
            self.axes.unify(left, right)
        except Conflict as conflict:
            for axis in (left, right):
                self.freeze(axis, f"its structure does not fit: {conflict}")

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """`axis` cut into pieces; where that cannot be, it is frozen and so are the pieces."""
        try:
            return self.axes.split(axis, sizes)
        except Conflict as conflict:
            self.freeze(axis, f"it is cut across its structure: {conflict}")
            return [
                self.fixed(size, "a piece cut across the structure of an axis") for size in sizes
            ]

    def factor(self, axis: Axis, sizes: tuple[int, ...]) -> list[Axis]:
        """`axis` as a product; where that cannot be, it is frozen and so are the factors."""
        try:
            return self.axes.factor(axis, sizes)
        except Conflict as conflict:
            self.freeze(axis, f"it is factored across its structure: {conflict}")
            return [self.fixed(size, "a factor across the structure of an axis") for size in sizes]

    def freeze(self, axis: Axis, why: str) -> None:
        """Say that `axis` must keep all its units."""
        if axis is not UNIT:
            self.facts.frozen.append(Frozen(axis, why, self.node))

    def broadcast(self, *types: Type, shape: Sequence[int] | None = None) -> Type:
        """Unify `types` aligned at their last dimension, as element-wise operators do."""
        shape = self.shape() if shape is None else shape
        result: list[Axis] = []
        for back in range(len(shape), 0, -1):
            size = shape[-back]
            found: Axis | None = None
            for type_ in types:
                axis = type_[-back] if back <= len(type_) else UNIT
                if axis.size != size or axis is UNIT:
                    continue
                if found is None:
                    found = axis
                else:
                    self.unify(found, axis)
            result.append(found if found is not None else self.fresh(size))
        return tuple(result)

    # -- choices --------------------------------------------------------------------------------

    def route(self, dim: int, why: str, *, min_units: int = 1) -> None:
        """Say that the node chooses among the units of dimension `dim` of its first operand."""
        source = self.operands()[0]
        axis = self.types[source][dim]
        if not source.meta["val"].is_floating_point():  # minus infinity cannot be put there
            self.freeze(axis, why)
        self.facts.routings.append(Routing(self.node, axis, dim, why, min_units))

    def weight_routing(self, axis: Axis) -> None:
        """Say that the result is zero at units of `axis` that are never chosen."""
        self.facts.routing_weights.append(RoutingWeight(self.node, axis))

    def is_chosen_from(self, axis: Axis) -> bool:
        """Return whether a node before this one chooses among the units of `axis`."""
        atoms = set(self.axes.atoms(axis))
        return any(
            not atoms.isdisjoint(self.axes.atoms(choice.axis))
            for choice in reversed(self.facts.routings)
        )

    def select_unit(
        self, axis: Axis, index: int, *literals: tuple[str, int], source: fx.Node | None = None
    ) -> None:
        """Say that the node reads one index of `axis`; see `UnitSelect`."""
        self.facts.unit_selects.append(UnitSelect(self.node, literals, axis, index, source))
        self.use("chosen", axis)

    def stack_units(self, axis: Axis) -> None:
        """Say that each tensor in the node's list belongs to one index of `axis`."""
        self.facts.unit_stacks.append(UnitStack(self.node, axis))

    def hold_unit_numbers(self, axis: Axis, result: int = 0) -> None:
        """Say that the values of a result are indices of `axis`."""
        self.unit_numbers[self.node, result] = axis

    def pick(self, axis: Axis, index: fx.Node, what: str = "positions") -> None:
        """Say that `axis` is indexed by the values of `index`.

        Where those are indices of another axis, the two are one; otherwise `axis` is frozen.
        """
        self.use("picked", axis)
        self.picked.add(index)
        content = self.unit_numbers.get((index, 0))
        if content is None:
            self.freeze(axis, f"its {what} are picked by index")
        else:
            self.unify(content, axis)
            self.use("chosen", axis)

    # -- literals and marks ---------------------------------------------------------------------

    def size_literal(self, argument: str, index: int | None, axis: Axis) -> None:
        """Say that an argument is the size of `axis`; -1 and dynamic sizes follow by themselves."""
        value = self.arg(argument)
        value = value if index is None else value[index]
        if axis is UNIT or (isinstance(value, int) and value == -1):
            return
        self.facts.sizes.append(SizeLiteral(self.node, argument, index, axis))

    def size_literals(self, argument: str, type_: Iterable[Axis]) -> None:
        """Say that a list argument holds the sizes of `type_`."""
        for index, axis in enumerate(type_):
            self.size_literal(argument, index, axis)

    def zero_where(self, *terms: Iterable[fx.Node | None]) -> None:
        """Say that the result is a sum of products of nodes (None and empty terms left out).

        It is zero where a factor of every term is; this overrides what the rule says.
        """
        found = (tuple(node for node in term if node is not None) for term in terms)
        self.terms = tuple(term for term in found if term)

    def contract(self, axis: Axis, *operands: fx.Node) -> None:
        """Say that the node sums over `axis` of the product of `operands`."""
        if axis is not UNIT:
            self.facts.contractions.append(Contraction(self.node, axis, operands))

    def statistic(self, axis: Axis, dim: int, *, clears: bool = False, min_units: int = 1) -> None:
        """Say that the node takes statistics over `axis`, in dimension `dim` of its operand."""
        if axis is not UNIT:
            self.facts.statistics.append(Statistic(self.node, axis, dim, clears, min_units))

    def use(self, kind: UseKind, axis: Axis) -> None:
        """Say how the node uses `axis`."""
        if axis is not UNIT:
            self.facts.uses.append(AxisUse(kind, axis, self.node))


RULES: dict[str, Rule] = {}
"""Operator name without its namespace, such as ``view.default`` -> its rule."""


Typing = TypeVar("Typing", bound=Callable[[RuleContext], Result])


def rule(*names: str, zero: ZeroRule) -> Callable[[Typing], Typing]:
    """Register a typing function for the ATen operators called `names`."""

    def register(apply: Typing) -> Typing:
        summary = (apply.__doc__ or "").strip().splitlines()[0]
        entry = Rule(names, apply, zero, summary)
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = entry
        return apply

    return register
