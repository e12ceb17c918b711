"""Every attention of a graph, as the nodes that it is made of.

`recognize` says of each what it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.analysis.axes import Atom, Axis
from graphprune.analysis.types import Types
from graphprune.ir.aten import PRODUCTS, name_of
from graphprune.ir.nodes import arguments_of
from graphprune.ir.provenance import module_path

FUSED = torch.ops.aten.scaled_dot_product_attention.default

_PARTING = frozenset({"slice", "narrow", "split_with_sizes", "split"})
_JOINTS = ("cat", "constant_pad_nd", "pad")
ALL_PRODUCTS = PRODUCTS | {"baddbmm", "einsum"}
"""Operators that multiply matrices which may both be computed."""


@dataclass(frozen=True, eq=False)
class Attention:
    """One softmax attention of a graph, fused or spelled out: which nodes it is made of.

    Parameters
    ----------
    softmax
        The node that makes probabilities of scores.
    products
        The nodes that multiply queries with keys, and probabilities with values. One fused node is
        all three.
    operands
        Queries, keys and values, as the products take them.
    """

    softmax: fx.Node
    products: tuple[fx.Node, fx.Node]
    operands: tuple[fx.Node, fx.Node, fx.Node]

    @property
    def node(self) -> fx.Node:
        """The node that returns the attended values."""
        return self.products[1]

    @property
    def module(self) -> str:
        """The dotted path of the module that attends."""
        return module_path(self.node)

    def head_axes(self, types: Types) -> tuple[Axis, ...]:
        """Return the batch axes of the products: those of heads are among them."""
        return types.axes_of[self.softmax][:-2]

    def key_axis(self, types: Types) -> Axis:
        """Return the axis that is summed over in the product of queries and keys."""
        return types.axes_of[self.operands[0]][-1]

    def value_axis(self, types: Types) -> Axis:
        """Return the last axis of the attended values."""
        return types.axes_of[self.node][-1]


def attentions(types: Types) -> tuple[Attention, ...]:
    """Return every attention of a typed graph, in the order of its softmaxes."""
    chosen = {use.node for use in types.facts.uses if use.kind == "softmax"}
    found: list[Attention] = []
    for node in types.program.graph.nodes:
        if node.target is FUSED:
            given = arguments_of(node)
            operands = (given["query"], given["key"], given["value"])
            found.append(Attention(node, (node, node), operands))
        elif node in chosen:
            found += _spelled_out(types, node)
    return tuple(found)


def attentions_of(types: Types, atom: Atom) -> list[Attention]:
    """Return the attentions whose heads `atom` counts."""
    return [
        each
        for each in attentions(types)
        if any(atom in set(types.axes.atoms(axis)) for axis in each.head_axes(types))
    ]


def _spelled_out(types: Types, softmax: fx.Node) -> Iterator[Attention]:
    """Attention spelled out: a product, a softmax over its last axis, and a product again.

    Where one softmax runs over the scores of several products that are joined, and its parts weigh
    several values, there is one for each.
    """
    before, after = _back_to_products(types, softmax), _on_to_products(softmax)
    for at in range(max(len(before), len(after)) if before and after else 0):
        scores, context = before[min(at, len(before) - 1)], after[min(at, len(after) - 1)]
        query, key = (*scores.all_input_nodes, *scores.all_input_nodes)[-2:]
        yield Attention(softmax, (scores, context), (query, key, context.all_input_nodes[-1]))


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
        users = [user for user in users if name_of(user) in _PARTING | ALL_PRODUCTS]
    found: list[fx.Node] = []
    for user in users:
        if name_of(user) in ALL_PRODUCTS:
            found += [user] if user.all_input_nodes[0] is node else []
        elif steps:
            found += _on_to_products(user, steps - 1)
    return list(dict.fromkeys(found))
