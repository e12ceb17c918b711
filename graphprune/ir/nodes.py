"""Reading the arguments of graph nodes, and making new nodes in place of old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, in the order of its schema, with defaults filled in.

    Empty where `node` calls no operator of torch.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    found = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def copy_of(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of `graph`, and the copy of every node."""
    copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, copies))
    return copy, copies


def made_from(origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call at the graph's insertion point that stands for (a part of) `origin`.

    It has the provenance of `origin` and no value: `rebuild` derives one, as does `valued`.
    """
    made = origin.graph.call_function(target, args, kwargs)
    made.meta = {key: value for key, value in origin.meta.items() if key != "val"}
    return made


def valued(node: fx.Node, mode: FakeTensorMode | None = None) -> fx.Node:
    """`node`, with the value that it has on those of its arguments.

    `mode` is what makes the value where no argument is a tensor.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
    tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor))
    with mode or next(tensors).fake_mode, torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return node


def size_of(size: Any, sizes: Mapping[str, int]) -> int:
    """A dimension's size, where its symbols have the `sizes` by their names."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols}))
