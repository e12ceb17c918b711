"""Reading the arguments of graph nodes, and making new nodes in place of old ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree


class _Argument(NamedTuple):
    """The way in which an operator takes an argument; `position` is where among positional ones."""

    position: int
    default: Any
    is_required: bool


@cache
def _signature(target: Any) -> dict[str, _Argument]:
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    return {
        argument.name: _Argument(
            sys.maxsize if argument.kwarg_only else position,
            argument.default_value if argument.has_default_value() else None,
            not argument.has_default_value(),
        )
        for position, argument in enumerate(target._schema.arguments)
    }


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name, in the order of its schema, with defaults filled in.

    Empty where `node` calls no operator of torch.
    """
    return {
        name: get_argument(node, name)
        for name, argument in _signature(node.target).items()
        if not argument.is_required or argument.position < len(node.args) or name in node.kwargs
    }


def argument_names(node: fx.Node) -> list[str]:
    """Return the names of all that the operator of `node` takes, in order."""
    return list(_signature(node.target))


def get_argument(node: fx.Node, name: str, index: int | None = None) -> Any:
    """Return the argument called `name` of a call, or its default; of a list the entry `index`.

    None where the operator takes no such argument.
    """
    argument = _signature(node.target).get(name)
    if argument is None:
        return None
    if argument.position < len(node.args):
        value = node.args[argument.position]
    else:
        value = node.kwargs.get(name, argument.default)
    return value if index is None else value[index]  # type: ignore[index]


def set_argument(node: fx.Node, name: str, index: int | None, value: Any) -> None:
    """Set the argument called `name` of a call, or the entry `index` of it when it is a list."""
    if index is not None:
        entries = list(get_argument(node, name))
        entries[index] = value
        value = entries
    if (position := _signature(node.target)[name].position) < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def copy_of(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a copy of `graph`, and the copy of every node."""
    copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, copies))
    return copy, copies


def made_from(origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Return a call at the graph's insertion point that stands for (a part of) `origin`.

    It has the provenance of `origin` and no value: `with_graph` derives one, as does `valued`.
    """
    made = origin.graph.call_function(target, args, kwargs)
    made.meta = {key: value for key, value in origin.meta.items() if key != "val"}
    return made


def valued(node: fx.Node, mode: FakeTensorMode | None = None) -> fx.Node:
    """`node`, with the value that it has on those of its arguments.

    `mode` is what makes the value where no argument is a tensor.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
    leaves = pytree.tree_leaves((args, kwargs))
    modes = (leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    with mode or next(modes, nullcontext()), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return node


def new_size(mode: FakeTensorMode, name: str, example: int) -> torch.SymInt:
    """Return a new dynamic size of `mode`, called `name`, that is `example` where one is needed."""
    # Only a few exports need them, and they take a while.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    held: Any = mode.from_tensor(
        torch.empty(example), symbolic_context=context, source=ConstantSource(name)
    )
    size: torch.SymInt = held.shape[0]
    return size


def size_of(size: Any, sizes: Mapping[str, int]) -> int:
    """Return a dimension's size, where its symbols have the `sizes` by their names."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols}))


def dynamic_sizes(node: fx.Node) -> list[Any]:
    """Return the expressions of dynamic sizes in the shape of a tensor, or of several."""
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    sizes = (size for part in parts for size in getattr(part, "shape", ()))
    return [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]


def symbols_of(*nodes: fx.Node) -> set[Any]:
    """Return the symbols in the shapes of tensors."""
    found = (expression for node in nodes for expression in dynamic_sizes(node))
    return {symbol for expression in found for symbol in expression.free_symbols}


def size_environment(graph: fx.Graph) -> Any:
    """Return what knows the dynamic sizes of `graph`; None where no value has any."""
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in graph.nodes)
    known = (mode.shape_env for mode in modes if mode is not None)
    return next((environment for environment in known if environment is not None), None)
