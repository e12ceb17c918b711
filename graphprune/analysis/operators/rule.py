"""What an operator rule sees and says: the node being typed, its axes and its literals.

A rule is one function. It reads the axes of the operands, says which axes must be the same,
returns the axes of the result, and says in the same breath which literals of the node follow from
which axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, TypeVar

from torch import fx

from graphprune.analysis.axes import UNIT, Atom, Axes, Axis, Conflict
from graphprune.ir.nodes import get_argument

Type = tuple[Axis, ...]
"""The axes of one tensor, one for each dimension."""


class Zero(Enum):
    """Where a result vanishes when the weights of a unit are zeroed, told from its operands."""

    KEEP = "where its first operand does (f(0) = 0)"
    ANY = "where any operand does (products, contractions)"
    ALL = "where all operands do (sums of operands)"
    JOIN = "where all operands that hold the axis do (concatenation)"
    NEVER = "nowhere (f(0) is not 0)"
    ALWAYS = "everywhere (a tensor of zeros)"


@dataclass(frozen=True)
class SizeLiteral:
    """An argument of `node` (or one element of it) that is the size of `axis`.

    `index` is the element of a list argument, or None for the argument itself.
    """

    node: fx.Node
    argument: str
    index: int | None
    axis: Axis


@dataclass(frozen=True)
class MeanLiteral:
    """`node` averages over `axis`: its divisor must stay the old size.

    `form` says what to repair: a plain mean is multiplied by new/old; the root mean square of
    `rms_norm` takes a scaled epsilon and output.
    """

    node: fx.Node
    axis: Axis
    form: Literal["mean", "rms_norm"]


@dataclass(frozen=True)
class Statistic:
    """`node` centres or scales by statistics over `axis` that no rescaling makes exact.

    They are taken over what stays, as if nothing else had ever been there.

    Parameters
    ----------
    node, axis
        The operator and what its statistics run over.
    dim
        The dimension of its first operand that holds `axis`.
    clears
        Whether the result keeps that dimension; it is zero there at units that do not stay.
    least
        How many units must be left for the statistics to be finite.
    """

    node: fx.Node
    axis: Axis
    dim: int
    clears: bool = False
    least: int = 1


@dataclass(frozen=True)
class Frozen:
    """`axis` must keep all its units, because of `why`, found at `node`."""

    axis: Axis
    why: str
    node: fx.Node


@dataclass(frozen=True)
class Choice:
    """`node` chooses among the units of `axis`, which is dimension `dim` of its first operand.

    That freezes the axis because of `why`, unless what is chosen picks units of weights: a unit is
    then removed by never being chosen, as with a logit of minus infinity.

    Parameters
    ----------
    node, axis, dim
        The operator and what it chooses from.
    why
        The reason to freeze.
    least
        How many units must be left to choose from.
    """

    node: fx.Node
    axis: Axis
    dim: int
    why: str
    least: int = 1


@dataclass(frozen=True)
class Weighing:
    """The result of `node` is zero at units of `axis` that are never chosen."""

    node: fx.Node
    axis: Axis


@dataclass(frozen=True)
class Reading:
    """`node` takes what belongs to one place of `axis`, and nothing of the others.

    Parameters
    ----------
    node, literals
        The operator and its arguments that say which place, with what they are past it: they follow
        when places before it go.
    axis, index
        The axis and the place.
    source
        The operand that holds the axis, for which the result is a part of it; None where the
        operand holds places of the axis, which are compared with `index`.
    """

    node: fx.Node
    literals: tuple[tuple[str, int], ...]
    axis: Axis
    index: int
    source: fx.Node | None = None


@dataclass(frozen=True)
class Gathering:
    """Each tensor in the list that `node` takes is a place of `axis`."""

    node: fx.Node
    axis: Axis


@dataclass(frozen=True)
class Contraction:
    """`node` sums over `axis`: that is exact only where one of `operands` vanishes."""

    node: fx.Node
    axis: Axis
    operands: tuple[fx.Node, ...]


Use = Literal["rotary", "convolved", "picked", "chosen", "spread", "linear", "softmax"]


@dataclass(frozen=True)
class Mark:
    """`node` uses `axis` in the way `kind` says; roles of groups are read from it."""

    kind: Use
    axis: Axis
    node: fx.Node


@dataclass(frozen=True)
class Attention:
    """A softmax attention.

    Parameters
    ----------
    products
        The nodes that multiply queries with keys, and probabilities with values (one fused node
        may be both).
    heads
        Batch axes of the products.
    key, value
        The axis that queries and keys share, and that of the values.
    operands
        Queries, keys and values.
    """

    products: tuple[fx.Node, fx.Node]
    heads: tuple[Axis, ...]
    key: Axis
    value: Axis
    operands: tuple[fx.Node, fx.Node, fx.Node]

    @property
    def node(self) -> fx.Node:
        """The node that returns the attended values."""
        return self.products[1]


@dataclass
class Facts:
    """All that the rules said about one graph, in the order of its nodes."""

    sizes: list[SizeLiteral] = field(default_factory=list)
    means: list[MeanLiteral] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    weighings: list[Weighing] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    gatherings: list[Gathering] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    unruled: list[fx.Node] = field(default_factory=list)


Result = Type | list[Type | None] | None

Law = Zero | tuple[tuple[fx.Node, ...], ...]
"""Where a result vanishes: a law of its operands, or a sum of products of nodes."""

Content = tuple[fx.Node, int]
"""A node that holds places of an axis, and which of its results they are (0 for the only one)."""


@dataclass(frozen=True)
class Rule:
    """How an operator is typed, where its result vanishes, and a line that says so."""

    names: tuple[str, ...]
    apply: Callable[[Op], Result]
    zero: Zero
    summary: str


class Op:
    """A node being typed: its arguments by name, and what can be said about them."""

    __slots__ = (
        "apart",
        "axes",
        "contents",
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
        zero: Zero,
        contents: dict[Content, Axis],
        apart: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self.node = node
        self.contents = contents
        self.picked: set[fx.Node] = set()
        self.apart = node in apart
        self.axes = axes
        self.facts = facts
        self.types = types
        self.shapes = shapes
        self.zero = zero
        self.terms: tuple[tuple[fx.Node, ...], ...] | None = None

    # -- arguments ------------------------------------------------------------------------------

    def arg(self, name: str) -> Any:
        """The argument called `name` in the operator's schema, or its default."""
        return get_argument(self.node, name)

    def type(self, name: str) -> Type:
        """The axes of the tensor argument called `name`."""
        found: Type = self.types[self.arg(name)]
        return found

    def shape(self, node: fx.Node | None = None) -> tuple[int, ...]:
        """Generic sizes of `node` (the result by default); dynamic ones are large primes."""
        found: tuple[int, ...] = self.shapes(node or self.node)
        return found

    def operands(self) -> list[fx.Node]:
        """The tensor arguments, in order, those inside lists among them."""
        return [node for node in self.node.all_input_nodes if self.types.get(node) is not None]

    def dim(self, name: str, rank: int) -> int:
        """The dimension argument called `name`, counted from the front."""
        dim: int = self.arg(name)
        return dim + rank if dim < 0 else dim

    def dims(self, name: str, rank: int) -> list[int]:
        """A dimension list (or single dimension); all of them when it is empty or None."""
        given = self.arg(name)
        if given is None or given == []:
            return list(range(rank))
        given = [given] if isinstance(given, int) else given
        return [dim + rank if dim < 0 else dim for dim in given]

    # -- axes -----------------------------------------------------------------------------------

    def fresh(self, size: int) -> Axis:
        """A new axis that nothing is known about."""
        return self.axes.atom(size)

    def fixed(self, size: int, why: str) -> Axis:
        """A new axis that must keep all its units."""
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

    def choose(self, dim: int, why: str, *, least: int = 1) -> None:
        """Say that the node chooses among the units of dimension `dim` of its first operand."""
        source = self.operands()[0]
        axis = self.types[source][dim]
        if not source.meta["val"].is_floating_point():  # minus infinity cannot be put there
            self.freeze(axis, why)
        self.facts.choices.append(Choice(self.node, axis, dim, why, least))

    def weigh(self, axis: Axis) -> None:
        """Say that the result is zero at units of `axis` that are never chosen."""
        self.facts.weighings.append(Weighing(self.node, axis))

    def is_chosen_from(self, axis: Axis) -> bool:
        """Whether a node before this one chooses among the units of `axis`."""
        atoms = set(self.axes.atoms(axis))
        return any(
            not atoms.isdisjoint(self.axes.atoms(choice.axis))
            for choice in reversed(self.facts.choices)
        )

    def read(
        self, axis: Axis, index: int, *literals: tuple[str, int], source: fx.Node | None = None
    ) -> None:
        """Say that the node reads one place of `axis`; see `Reading`."""
        self.facts.readings.append(Reading(self.node, literals, axis, index, source))
        self.mark("chosen", axis)

    def gather(self, axis: Axis) -> None:
        """Say that each tensor in the node's list is a place of `axis`."""
        self.facts.gatherings.append(Gathering(self.node, axis))

    def holds_places(self, axis: Axis, result: int = 0) -> None:
        """Say that the values of a result are places of `axis`."""
        self.contents[self.node, result] = axis

    def pick(self, axis: Axis, index: fx.Node, what: str = "places") -> None:
        """Say that places of `axis` are picked by the values of `index`.

        Where those are places of another axis, the two are one; otherwise `axis` is frozen.
        """
        self.mark("picked", axis)
        self.picked.add(index)
        content = self.contents.get((index, 0))
        if content is None:
            self.freeze(axis, f"its {what} are picked by index")
        else:
            self.unify(content, axis)
            self.mark("chosen", axis)

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

    def vanishes_as(self, *terms: Iterable[fx.Node | None]) -> None:
        """Say that the result is a sum of products of nodes (None and empty terms left out).

        It vanishes where a factor of every term does; this overrides the rule's own law.
        """
        found = (tuple(node for node in term if node is not None) for term in terms)
        self.terms = tuple(term for term in found if term)

    def contract(self, axis: Axis, *operands: fx.Node) -> None:
        """Say that the node sums over `axis` of the product of `operands`."""
        if axis is not UNIT:
            self.facts.contractions.append(Contraction(self.node, axis, operands))

    def statistic(self, axis: Axis, dim: int, *, clears: bool = False, least: int = 1) -> None:
        """Say that the node takes statistics over `axis`, in dimension `dim` of its operand."""
        if axis is not UNIT:
            self.facts.statistics.append(Statistic(self.node, axis, dim, clears, least))

    def mark(self, kind: Use, axis: Axis) -> None:
        """Say how the node uses `axis`."""
        if axis is not UNIT:
            self.facts.marks.append(Mark(kind, axis, self.node))


RULES: dict[str, Rule] = {}
"""Operator name without its namespace, such as ``view.default`` -> its rule."""


Typing = TypeVar("Typing", bound=Callable[[Op], Result])


def rule(*names: str, zero: Zero) -> Callable[[Typing], Typing]:
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


def atoms_of(axes: Axes, type_: Iterable[Axis]) -> set[Atom]:
    """The unbound atoms anywhere in `type_`."""
    return {atom for axis in type_ for atom in axes.atoms(axis)}
