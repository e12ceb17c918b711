"""A program as text: its weights, its inputs, and one line per operator with types and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from graphprune.ir.aten import printed_name
from graphprune.weights.tensors import type_name

if TYPE_CHECKING:
    from torch import fx

    from graphprune.ir.program import Program


def program_text(program: Program) -> str:
    """Return the program as people read and compare it; the same for equal graphs.

    Examples
    --------
    >>> import torch
    >>> from graphprune.frontend.capture import capture
    >>> module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    >>> print(program_text(capture(module, example_inputs=(torch.zeros(2, 8),))))
    weight 0.weight: f32[4, 8]
    weight 0.bias: f32[4]
    input input: f32[s..., 8]
    %linear: f32[s..., 4] = aten.linear.default(input, 0.weight, 0.bias)
    %relu: f32[s..., 4] = aten.relu.default(%linear)
    return output=%relu
    """
    return "\n".join(_lines(program))


def _lines(program: Program) -> Iterator[str]:
    names: dict[fx.Node, str] = {}
    seen: Counter[str] = Counter()
    for name, node in program.weight_nodes():
        names[node] = name
        yield f"weight {name}: {_type(program.weights[name])}"
    for value, node in program.input_nodes():
        names[node] = value.name
        yield f"input {value.name}: {_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "output"):
            names[node] = _numbered(node, seen)
            yield f"{names[node]}: {_type(node.meta.get('val'))} = {_call(node, names)}"
    outputs = [f"{value.name}={names[node]}" for value, node in program.output_nodes()]
    yield f"return {', '.join(outputs)}"


def _numbered(node: fx.Node, seen: Counter[str]) -> str:
    """Name a result by its operator and order, whatever torch called its node."""
    printed = printed_name(node.target)
    name = printed.split(".")[1] if printed.count(".") == 2 else printed
    seen[name] += 1
    return f"%{name}" if seen[name] == 1 else f"%{name}_{seen[name] - 1}"


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    args = [_operand(arg, names) for arg in node.args]
    args += [f"{key}={_operand(arg, names)}" for key, arg in node.kwargs.items()]
    return f"{printed_name(node.target)}({', '.join(args)})"


def _operand(arg: Any, names: dict[fx.Node, str]) -> str:
    from torch.fx import Node

    if isinstance(arg, Node):
        return names[arg]
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(_operand(each, names) for each in arg)}]"
    if isinstance(arg, slice):
        return f"{arg.start}:{arg.stop}:{arg.step}"
    return str(arg)


def _type(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_type, value))})"
    if hasattr(value, "shape"):
        return f"{_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__ if isinstance(value, (bool, int, float)) else str(value)


def _dtype(dtype: Any) -> str:
    """``f32`` for ``torch.float32``, and likewise."""
    name = type_name(dtype)
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name
