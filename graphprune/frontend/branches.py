"""Capture of models that branch on data, of which a graph holds one path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.errors import CaptureError
from graphprune.frontend.patches.torch_code import values_of_parameters
from graphprune.frontend.torch_export import Exported, export_once, place_of
from graphprune.ir.program import Note


def export_with_all_found(
    module: nn.Module, args: tuple[Any, ...], shapes: Any, error: Exception
) -> Exported:
    """Export with loops over what `nonzero` finds running over all that it might find.

    For what is not found, such as an expert that no token chose, code does nothing: that is assumed
    here, and whoever takes the graph compares its outputs with the model's.
    """
    with _AllFound() as mode:
        try:
            exported = export_once(module, args, shapes)
        except GuardOnDataDependentSymNode as again:
            refused = CaptureError("it branches on data")
            refused.at_all_sizes = not mode.looked  # no size decides what values are
            raise refused from again
    if not mode.count:
        raise error
    text = "captured with loops over what is found, such as experts, running over everything"
    return Exported(exported, Note("full-loops", text))


class _AllFound(TorchFunctionMode):
    """Makes `nonzero` find every element of a vector of fixed length."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.looked = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        finds = func in (torch.Tensor.nonzero, torch.nonzero)
        self.looked |= finds or (func is torch.where and len(args) == 1)
        if finds and not kwargs.get("as_tuple"):
            (vector,) = args
            if vector.dim() == 1 and type(vector.shape[0]) is int:
                self.count += 1
                return [_Index([index]) for index in range(vector.shape[0])]
        result = func(*args, **kwargs)
        if func is torch.where and len(args) == 1:
            # Code that goes on where nothing is found does the same for nothing.
            torch._check(result[0].shape[0] > 0)
        return result


class _Index(list[int]):
    """A row of what `nonzero` gives: a list of one index, or the index, as code takes it."""

    def item(self) -> int:
        return self[0]

    __index__ = __int__ = item


def export_along_example(
    module: nn.Module, args: tuple[Any, ...], shapes: Any, error: Exception
) -> Exported:
    """Export the path that the values of `args` take where `error` met a branch on data."""
    if not isinstance(error, GuardOnDataDependentSymNode):
        raise error
    with (
        functorch.patch(
            fake_tensor_propagate_real_tensors=True, generate_fake_kernels_from_real_mismatches=True
        ),
        values_of_parameters(),
    ):
        exported = export_once(module, args, shapes)
    for node in exported.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                value.real_tensor = None  # as large as what it stands for
                value.fake_mode.propagate_real_tensors = False
    _check_dynamic(exported, shapes)
    where = place_of(error)
    text = (
        f"captured along the path that its example takes at {where}: inputs that take another "
        "path there are computed wrongly"
    )
    return Exported(exported, Note("example-path", text))


def _check_dynamic(exported: ExportedProgram, shapes: Any) -> None:
    """Refuse a graph that took a size for a constant which was to be dynamic."""
    kinds = exported.graph_signature.input_specs
    nodes = exported.graph.find_nodes(op="placeholder")
    inputs = [
        node for node, spec in zip(nodes, kinds, strict=True) if spec.kind == InputKind.USER_INPUT
    ]
    wanted = pytree.tree_leaves(shapes, is_leaf=lambda tree: tree is None or isinstance(tree, dict))
    for node, dims in zip(inputs, wanted, strict=True):
        for dim, how in (dims or {}).items():
            size = node.meta["val"].shape[dim]
            constant = type(size) is int or size.node.maybe_as_int() is not None
            if constant and how not in (None, Dim.STATIC):
                raise CaptureError(f"dimension {dim} of {node.name} became a constant")
