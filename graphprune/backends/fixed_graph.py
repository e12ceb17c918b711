"""Graphs whose sizes are all numbers, as plain JSON data: quick to read, without torch.export.

Decoders without weights are such graphs: dynamic sizes are stand-ins. torch's own format holds any
graph, but reading it loads torch's compiler, which takes longer than everything else does. So would
fake tensors: what comes back has tensors on the meta device in their place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.errors import BackendError
from graphprune.weights.tensors import type_name

_TYPES = (torch.dtype, torch.layout, torch.memory_format)
"""Values of torch that are known by their names."""

_BUILTIN = {"getitem": operator.getitem}
"""Functions that graphs call beside operators of torch."""


def graph_data(graph: fx.Graph) -> list[Any]:
    """Return `graph` as JSON data.

    Raises
    ------
    BackendError
        When it holds a dynamic size, or anything else that this form has no word for.
    """
    nodes = list(graph.nodes)
    write = _Writer({node: index for index, node in enumerate(nodes)})
    return [write.node(node) for node in nodes]


class _Writer:
    def __init__(self, places: Mapping[fx.Node, int]) -> None:
        self.places = places

    def node(self, node: fx.Node) -> dict[str, Any]:
        stack = node.meta.get("nn_module_stack") or {}
        value = node.meta.get("val")
        return {
            "op": node.op,
            "name": node.name,
            "target": self.target(node.target),
            "args": self.value(node.args),
            "kwargs": [[name, self.value(value)] for name, value in node.kwargs.items()],
            "val": None if value is None else self.value(value),
            "modules": [[str(key), str(path)] for key, (path, _) in stack.items()],
            "trace": node.meta.get("stack_trace") or "",
        }

    def target(self, target: Any) -> str:
        if isinstance(target, str):
            return target
        if isinstance(target, torch._ops.OpOverload):
            return str(target)
        name = getattr(target, "__name__", "")
        if _BUILTIN.get(name) is target:
            return f"operator.{name}"
        raise BackendError(f"the graph calls {target!r}, for which its plain form has no word")

    def value(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, fx.Node):
            return {"node": self.places[value]}
        if isinstance(value, tuple | list):
            return {"tuple" if isinstance(value, tuple) else "list": [*map(self.value, value)]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, _TYPES):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, Tensor):
            sizes = [*value.shape], [*value.stride()]
            if all(type(size) is int for each in sizes for size in each):
                return {"tensor": sizes, "dtype": type_name(value.dtype)}
        kind = type(value).__name__
        raise BackendError(f"the graph holds a {kind}, for which its plain form has no word")


def graph_module(data: list[Any]) -> fx.GraphModule:
    """Return the graph that `graph_data` made `data` of.

    Whatever is wrong with `data` shows as an exception of any type.
    """
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    read = _reader(nodes)
    for each in data:
        kwargs = {name: read(value) for name, value in each["kwargs"]}
        target: Any = each["target"]
        if each["op"] == "call_function":
            target = _called(target)
        elif each["op"] not in ("placeholder", "output"):
            raise ValueError(f"a node is {each['op']!r}")
        node = graph.create_node(each["op"], target, read(each["args"]), kwargs, each["name"])
        if each["val"] is not None:
            node.meta["val"] = read(each["val"])
        if each["modules"]:
            node.meta["nn_module_stack"] = {key: (path, "") for key, path in each["modules"]}
        if each["trace"]:
            node.meta["stack_trace"] = each["trace"]
        nodes.append(node)
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


def _called(name: str) -> Any:
    family, *rest = name.split(".")
    if family == "operator":
        return _BUILTIN[rest[0]]
    packet, overload = rest
    found = getattr(getattr(getattr(torch.ops, family), packet), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise TypeError(f"{name} is no operator")
    return found


def _reader(nodes: list[fx.Node]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner), *_) = value.items()
        if kind == "node":
            return nodes[inner]
        if kind == "tuple":
            return tuple(map(read, inner))
        if kind == "list":
            return [*map(read, inner)]
        if kind == "device":
            return torch.device(inner)
        if kind == "torch":
            return _named(inner)
        shape, stride = inner
        return torch.empty_strided(shape, stride, dtype=_named(value["dtype"]), device="meta")

    return read


def _named(name: str) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, _TYPES):
        raise TypeError(f"torch.{name} is no type")
    return found
