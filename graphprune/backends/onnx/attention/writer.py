"""Nodes that stand for operators of ONNX, written into a graph at one place after the other."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add, getitem
from typing import Any

import torch
from torch import fx

from graphprune.ir.nodes import made_from, valued

_ATEN = torch.ops.aten
_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
"""Numbers of element types in ONNX."""


class Writer:
    """Writes nodes that take the place of `at`.

    Attributes
    ----------
    graph
        The graph.
    at
        The node whose provenance new nodes have.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.at: fx.Node = next(iter(graph.nodes))

    def operator(
        self,
        name: str,
        inputs: Sequence[fx.Node | None],
        attributes: dict[str, int | float],
        shapes: Sequence[Sequence[Any]],
        version: int | None = None,
    ) -> list[fx.Node]:
        """Return an ONNX operator's results, as `torch.onnx.ops.symbolic_multi_out` has them."""
        domain, _, kind = name.rpartition("::")
        whole = {k: v for k, v in attributes.items() if isinstance(v, int)}
        real = {k: v for k, v in attributes.items() if k not in whole}
        positions = [[i, i + 1] for group in (whole, real) for i in range(len(group))]
        dtype = _TYPES[next(node for node in inputs if node is not None).meta["val"].dtype]
        made = self.call(
            torch.ops.onnx_symbolic._symbolic_multi_out.default,
            list(inputs),
            kind,
            [dtype] * len(shapes),
            shapes=[list(shape) for shape in shapes],
            attr_keys=[*whole, *real],
            attr_types=["i"] * len(whole) + ["f"] * len(real),
            attr_pos=positions,
            attr_ints=list(whole.values()),
            attr_floats=[float(number) for number in real.values()],
            attr_strs=[],
            metadata_props_keys=[],
            metadata_props_values=[],
            domain=domain,
            version=version,
        )
        return [self.call(getitem, made, index) for index in range(len(shapes))]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a call of an operator of torch."""
        made = made_from(self.at, target, *args, **kwargs)
        return valued(made, self.at.meta["val"].fake_mode)

    def size(self, node: fx.Node, dim: int) -> Any:
        """Return a size of a tensor: a number, or the node that reads it."""
        size = node.meta["val"].shape[dim]
        return size if type(size) is int else self.call(_ATEN.sym_size.int, node, dim)

    def sum(self, left: Any, right: Any) -> Any:
        """Return the sum of two sizes."""
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            return left + right
        return self.call(add, left, right)
