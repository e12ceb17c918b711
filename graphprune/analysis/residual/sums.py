"""Sums of a residual stream and of what is computed from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphprune.analysis.roles import reaches
from graphprune.analysis.types import Types
from graphprune.ir.aten import plain_name, uncopied
from graphprune.ir.nodes import arguments_of


@dataclass(frozen=True, eq=False)
class ResidualSum:
    """A residual stream to which something is added that was computed from it.

    Parameters
    ----------
    stream
        The stream before.
    terms
        What is added, each by itself where it is a sum of several.
    node
        The stream after.
    """

    stream: fx.Node
    terms: tuple[fx.Node, ...]
    node: fx.Node


def residual_sums(types: Types) -> list[ResidualSum]:
    """Return the residual sums of a graph, in order.

    The longest one where several end in each other: ``(a(x) + b(x)) + x`` is one sum of two terms.
    """
    order = {node: at for at, node in enumerate(types.program.graph.nodes)}
    found: dict[fx.Node, ResidualSum] = {}
    for node in types.program.graph.nodes:
        for early, late in _ways(node, order):
            stream: fx.Node | None = early
            while stream is not None:
                terms = _terms(late, stream, order, types)
                if terms:
                    found[node] = ResidualSum(early, tuple(terms), node)
                    break
                # ``(x + a(x)) + b(x)``: the second is computed from the stream before the first.
                before = found.get(uncopied(stream))
                stream = before.stream if before else None
            if node in found:
                break
    return list(found.values())


def _ways(node: fx.Node, order: dict[fx.Node, int]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield a sum's operands as stream and term, the likelier way first."""
    if (pair := _summands(node)) is None:
        return
    early, late = sorted(pair, key=lambda each: order[uncopied(each)])
    yield early, late
    yield late, early


def _summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the operands of a sum of two tensors that are both of its form."""
    if plain_name(node) != "add":
        return None
    given = arguments_of(node)
    pair: tuple[Any, Any] = given["self"], given["other"]
    if given["alpha"] != 1 or not all(isinstance(each, fx.Node) for each in pair):
        return None
    shapes = {_form(each) for each in (*pair, node)}
    return pair if len(shapes) == 1 and None not in shapes else None


def _form(node: fx.Node) -> tuple[str, ...] | None:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) and value.ndim else None


def _terms(
    late: fx.Node, stream: fx.Node, order: dict[fx.Node, int], types: Types
) -> list[fx.Node]:
    """Return the summands of `late` where each is computed from `stream`; none where it is not."""
    early = uncopied(stream)
    if early not in order or not reaches(uncopied(late), early, order, types, None):
        return []
    pair = _summands(late) if len(late.users) == 1 else None
    if pair is None or early in map(uncopied, pair):
        return [late]
    parts = [_terms(each, stream, order, types) for each in pair]
    return [term for part in parts for term in part] if all(parts) else [late]
