"""Make a decoder return the logits of the last token alone, as generating text needs them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.errors import BackendError, RewriteError
from graphprune.ir.aten import PRODUCTS, name_of
from graphprune.ir.nodes import copy_of, made_from
from graphprune.ir.program import Program
from graphprune.ir.shape_propagation import with_graph

_ATEN = torch.ops.aten
_PRODUCTS = PRODUCTS | {"linear"}


def last_only(program: Program) -> Program:
    """`program` with the logits of each row's last token, ``[batch, 1, vocabulary]``.

    The last token is the last one that the mask does not leave out, so rows may be padded on either
    side. What is left out is the product with the embedding for all other tokens: of the work of a
    prompt, as much as the vocabulary is of the parameters.

    Raises
    ------
    BackendError
        When the program is no decoder with a cache, or its logits are no product with what is
        hidden in each token.
    """
    if not program.is_decoder:
        raise BackendError("logits of the last token alone are for a decoder with a cache")
    graph, copies = copy_of(program.graph)
    (_, logits), *_ = program.output_nodes()
    head = [copies[node] for node in _head(logits)]
    product = head[-1]
    masks = [n for v, n in program.input_nodes() if v.name.endswith("attention_mask")]
    with graph.inserting_before(product):
        hidden = product.all_input_nodes[0]
        last = _last(product, hidden, copies[masks[0]] if masks else None)
    product.replace_input_with(hidden, last)
    for node in head:
        del node.meta["val"]  # of another length now
    try:
        return with_graph(program, graph, program.weights, {})
    except RewriteError as error:
        raise BackendError(f"no logits of the last token alone: {error}") from error


def _head(logits: fx.Node) -> list[fx.Node]:
    """Return the nodes from `logits` back to the product that they come from, the product last."""
    found, node = [], logits
    while node.op == "call_function":
        found.append(node)
        like = [other for other in node.all_input_nodes if _lengths(other) == _lengths(node)]
        if len(like) != 1 or any(not _is_tensor(other) for other in node.all_input_nodes):
            break
        if name_of(node) in _PRODUCTS and node.all_input_nodes[0] is like[0]:
            return found
        (node,) = like
    raise BackendError(
        f"no logits of the last token alone: they are no product with what is hidden in each "
        f"token, at {node.target}"
    )


def _last(origin: fx.Node, hidden: fx.Node, mask: fx.Node | None) -> fx.Node:
    """Return what is hidden in the last token of each row, ``[batch, 1, hidden]``."""

    def call(target: Any, *args: Any) -> fx.Node:
        return made_from(origin, target, *args)

    if mask is None:
        return call(_ATEN.slice.Tensor, hidden, 1, -1)
    length = call(_ATEN.sym_size.int, hidden, 1)
    own = call(_ATEN.slice.Tensor, mask, 1, call(operator.neg, length))
    positions = call(_ATEN.add.Tensor, call(_ATEN.arange.default, length), 1)
    at = call(_ATEN.argmax.default, call(_ATEN.mul.Tensor, own, positions), 1, True)
    width = int(hidden.meta["val"].shape[2])
    index = call(_ATEN.expand.default, call(_ATEN.unsqueeze.default, at, 2), [-1, -1, width])
    return call(_ATEN.gather.default, hidden, 1, index)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _lengths(node: fx.Node) -> tuple[str, ...] | None:
    """Batch and length of what has three dimensions."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 3:
        return None
    return tuple(map(str, value.shape[:2]))
