"""The attentions of a typed graph: fused ones, and those that are spelled out."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from graphprune.analysis.axes import Atom, Axis
from graphprune.analysis.operators.facts import TypedAttention
from graphprune.analysis.types import Types
from graphprune.ir.aten import PRODUCTS, name_of

_PARTING = ("slice", "narrow", "split_with_sizes", "split")
_JOINTS = ("cat", "constant_pad_nd", "pad")
ALL_PRODUCTS = PRODUCTS | {"baddbmm", "einsum"}
"""Operators that multiply matrices which may both be computed."""


def all_sites(types: Types) -> tuple[TypedAttention, ...]:
    """Return every attention of a typed graph: the fused ones, then those spelled out."""
    return (*types.facts.attentions, *_spelled_out(types))


def sites_of(types: Types, atom: Atom) -> list[TypedAttention]:
    """Return the attentions whose heads `atom` counts."""
    return [
        site
        for site in all_sites(types)
        if any(atom in set(types.axes.atoms(axis)) for axis in site.heads)
    ]


def _spelled_out(types: Types) -> Iterator[TypedAttention]:
    """Attention spelled out: a product, a softmax over its last axis, and a product again.

    Where one softmax runs over the scores of several products that are joined, and its parts weigh
    several values, there is one for each.
    """
    for node in (mark.node for mark in types.facts.uses if mark.kind == "softmax"):
        several, contexts = _back_to_products(types, node), _on_to_products(node)
        probabilities: tuple[Axis, ...] = types.axes_of[node]
        for at in range(max(len(several), len(contexts)) if several and contexts else 0):
            scores, context = (
                several[min(at, len(several) - 1)],
                contexts[min(at, len(contexts) - 1)],
            )
            query, key = (*scores.all_input_nodes, *scores.all_input_nodes)[-2:]
            operands = (query, key, context.all_input_nodes[-1])
            yield TypedAttention(
                (scores, context),
                probabilities[:-2],
                types.axes_of[query][-1],
                types.axes_of[context][-1],
                operands,
            )


def _back_to_products(types: Types, node: fx.Node) -> list[fx.Node]:
    """Return the products behind a softmax: the nearest along the axis that it runs over.

    Of what is joined each part may have one; it may also hold no scores, such as a sink.
    """
    pending, seen = [node], {node}
    while pending:
        node = pending.pop(0)
        if name_of(node) in ALL_PRODUCTS:
            return [node]
        along = types.axes_of[node][-1]
        joint = name_of(node) in _JOINTS
        inputs = []
        for other in dict.fromkeys(node.all_input_nodes):
            type_ = types.axes_of.get(other)
            if other in seen or not isinstance(type_, tuple) or not type_:
                continue
            if (joint or types.axes.same(type_[-1], along)) and (
                other.meta["val"].is_floating_point()
            ):
                inputs.append(other)
        if joint and len(inputs) > 1:
            parts = (_back_to_products(types, each) for each in inputs)
            return list(dict.fromkeys(product for found in parts for product in found))
        seen.update(inputs)
        pending += inputs
    return []


def _on_to_products(node: fx.Node, steps: int = 12) -> list[fx.Node]:
    """Return the products in which probabilities, or parts of them, weigh values."""
    users = list(node.users)
    if len(users) > 1:
        users = [user for user in users if name_of(user) in _PARTING]
    found: list[fx.Node] = []
    for user in users:
        if name_of(user) in ALL_PRODUCTS:
            found += [user] if user.all_input_nodes[0] is node else []
        elif steps:
            found += _on_to_products(user, steps - 1)
    return list(dict.fromkeys(found))
