"""Gains: parameters that multiply the units of an axis one by one, as those of norms do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphprune.analysis.mixing.places import Bases
from graphprune.ir.aten import is_copy, plain_name
from graphprune.ir.nodes import get_argument


@dataclass(frozen=True)
class Gain:
    """A gain, as one operator multiplies by it.

    Parameters
    ----------
    weight
        The parameter.
    offset
        What the graph adds to it before it multiplies, such as 1.
    source
        The value that is multiplied.
    nodes
        What the graph makes of the parameter on the way, the parameter first.
    """

    weight: str
    offset: float
    source: fx.Node
    nodes: tuple[fx.Node, ...]


def find_gains(bases: Bases, nodes: Iterable[fx.Node]) -> dict[fx.Node, Gain]:
    """Return those of `nodes` that multiply by a gain of the axis, which nothing else uses."""
    names = {
        node: name
        for name, node in bases.types.program.weight_nodes()
        if bases.types.program.kinds[name] == "parameter" and bases.holds(node)
    }
    found = {}
    for node in nodes:
        if plain_name(node) == "rms_norm":
            factors = [(get_argument(node, "weight"), get_argument(node, "input"))]
        elif plain_name(node) == "mul":
            left, right = node.args[:2]
            factors = [(left, right), (right, left)]
        else:
            continue
        for factor, source in factors:
            gain = _gain(bases, names, factor, source)
            if gain is not None:
                found[node] = gain
                break
    return found


def _gain(bases: Bases, names: Mapping[fx.Node, str], factor: Any, source: Any) -> Gain | None:
    """Return the gain that `factor` is, if it is one of `source`."""
    offset, nodes = 0.0, list[fx.Node]()
    while bases.holds(factor) and bases.holds(source) and len(factor.users) == 1:
        nodes.insert(0, factor)
        if factor in names:
            one = len(factor.meta["val"].shape) == 1
            return Gain(names[factor], offset, source, tuple(nodes)) if one else None
        if plain_name(factor) == "add" and _is_plain(factor):
            offset += factor.args[1]
        elif not is_copy(factor):
            return None
        factor = factor.args[0]
    return None


def _is_plain(add: fx.Node) -> bool:
    return isinstance(add.args[1], int | float) and not add.kwargs
