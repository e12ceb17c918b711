"""Records of what operator rules say of a graph, each with the node that it was said of."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from torch import fx

from graphprune.analysis.axes import Axis

Type = tuple[Axis, ...]
"""The axes of one tensor, one for each dimension."""


class ZeroRule(Enum):
    """Rules for where a result is zero when the weights of a unit are zeroed, by its operands."""

    AS_FIRST = "where its first operand does (f(0) = 0)"
    ANY_OPERAND = "where any operand does (products, contractions)"
    ALL_OPERANDS = "where all operands do (sums of operands)"
    ALL_HOLDERS = "where all operands that hold the axis do (concatenation)"
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
    """`node` centers or scales by statistics over `axis` that no rescaling makes exact.

    They are taken over what stays, as if nothing else had ever been there.

    Parameters
    ----------
    node, axis
        The operator and what its statistics run over.
    dim
        The dimension of its first operand that holds `axis`.
    clears
        Whether the result keeps that dimension; it is zero there at units that do not stay.
    min_units
        How many units must be left for the statistics to be finite.
    """

    node: fx.Node
    axis: Axis
    dim: int
    clears: bool = False
    min_units: int = 1


@dataclass(frozen=True)
class Frozen:
    """`axis` must keep all its units, because of `why`, found at `node`."""

    axis: Axis
    why: str
    node: fx.Node


@dataclass(frozen=True)
class Routing:
    """`node` chooses among the units of `axis`, which is dimension `dim` of its first operand.

    That freezes the axis because of `why`, unless what is chosen picks units of weights: a unit is
    then removed by never being chosen, as with a logit of minus infinity.

    Parameters
    ----------
    node, axis, dim
        The operator and what it chooses from.
    why
        The reason to freeze.
    min_units
        How many units must be left to choose from.
    """

    node: fx.Node
    axis: Axis
    dim: int
    why: str
    min_units: int = 1


@dataclass(frozen=True)
class RoutingWeight:
    """The result of `node` is zero at units of `axis` that are never chosen."""

    node: fx.Node
    axis: Axis


@dataclass(frozen=True)
class UnitSelect:
    """`node` takes what belongs to one index of `axis`, and nothing of the others.

    Parameters
    ----------
    node, literals
        The operator and its arguments that say which index, with what they are past it: they follow
        when indices before it go.
    axis, index
        The axis and the index.
    source
        The operand that holds the axis, for which the result is a part of it; None where the
        operand holds indices of the axis, which are compared with `index`.
    """

    node: fx.Node
    literals: tuple[tuple[str, int], ...]
    axis: Axis
    index: int
    source: fx.Node | None = None


@dataclass(frozen=True)
class UnitStack:
    """Each tensor in the list that `node` takes belongs to one index of `axis`."""

    node: fx.Node
    axis: Axis


@dataclass(frozen=True)
class Contraction:
    """`node` sums over `axis`: that is exact only where one of `operands` is zero."""

    node: fx.Node
    axis: Axis
    operands: tuple[fx.Node, ...]


UseKind = Literal["rotary", "convolved", "picked", "chosen", "spread", "linear", "softmax"]


@dataclass(frozen=True)
class AxisUse:
    """`node` uses `axis` in the way `kind` says; roles of groups are read from it."""

    kind: UseKind
    axis: Axis
    node: fx.Node


@dataclass
class Facts:
    """All that the rules said about one graph, in the order of its nodes."""

    sizes: list[SizeLiteral] = field(default_factory=list)
    means: list[MeanLiteral] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)
    routing_weights: list[RoutingWeight] = field(default_factory=list)
    unit_selects: list[UnitSelect] = field(default_factory=list)
    unit_stacks: list[UnitStack] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    uses: list[AxisUse] = field(default_factory=list)
    unruled: list[fx.Node] = field(default_factory=list)


ZeroPropagation = ZeroRule | tuple[tuple[fx.Node, ...], ...]
"""Where a result is zero: a rule on its operands, or a sum of products of nodes."""

UnitNumbers = tuple[fx.Node, int]
"""A node that holds indices of an axis, and which of its results they are (0 for the only one)."""
