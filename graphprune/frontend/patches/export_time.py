"""What makes an export by torch 2.13 quicker, and its graph no other."""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from graphprune.ir.aten import RECURRENT


@contextlib.contextmanager
def cheap_records() -> Iterator[None]:
    """Record for each node only what is read: a sixth less time for an export.

    Whether a tensor is contiguous in one of three memory formats is asked of every node, which
    takes many products of dynamic sizes. A stack trace is made of all frames, and all but a few are
    left out afterwards.
    """
    from torch.fx import proxy
    from torch.fx.experimental import proxy_tensor

    extract = "_extract_tensor_metadata"
    few = partial(getattr(proxy_tensor, extract), include_contiguity=False)
    records = mock.patch.object(proxy_tensor, extract, few)
    with records, mock.patch.object(proxy, "CapturedTraceback", _Frames):
        yield


class _Frames:
    """The frames of Python code where it is made, as `torch.utils._traceback` has them.

    Only those that torch keeps: of a forward, of its own top level, and what it was told of.
    """

    def __init__(self) -> None:
        from torch.fx.proxy import _STACK_TRACE_ANCHORS

        self._frames: list[tuple[str, int, str, None]] = []
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            file, name = code.co_filename, code.co_name
            top = file.endswith("torch/__init__.py")
            if name == "forward" or top or (file, name) in _STACK_TRACE_ANCHORS:
                self._frames.append((file, frame.f_lineno, name, None))
            frame = frame.f_back

    @classmethod
    def extract(cls) -> _Frames:
        return cls()

    def summary(self) -> traceback.StackSummary:
        """Return them, the outermost first; lines of code are read when they are asked for."""
        return traceback.StackSummary.from_list(self._frames[::-1])


def no_code() -> contextlib.AbstractContextManager[Any]:
    """Leave the Python code of a graph until it is run, which an export does not: a tenth of it.

    It is made anew after each of the passes that torch sends a graph through.
    """
    make = GraphModule.recompile

    def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
        make(self)
        return self.forward(*args, **kwargs)

    def recompile(self: GraphModule) -> Any:
        if type(self.graph._codegen) is not CodeGen:
            return make(self)
        type(self).forward = forward
        return None

    return mock.patch.object(GraphModule, "recompile", recompile)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Leave garbage until the end: a sixth less time for an export, of which little is garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def sizes_compared_once() -> Iterator[None]:
    """Compare two dynamic sizes once, until more is known of them: a tenth of an export.

    Operators ask the same of one tensor after the other.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.fx.experimental.sym_node import SymNode

    def once(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        known: dict[Any, Any] = {}

        def compared(self: Any, other: Any) -> Any:
            if get_proxy_mode() is not None or not isinstance(other, SymNode):
                return compare(self, other)
            env = self.shape_env
            key = self._expr, other._expr, env, env and env._replacements_version_counter
            if key not in known:
                known[key] = compare(self, other)
            return known[key]

        return compared

    with contextlib.ExitStack() as stack:
        for name in ("_eq", "_ne", "_ge", "_gt", "_le", "_lt"):
            stack.enter_context(mock.patch.object(SymNode, name, once(getattr(SymNode, name))))
        yield


@contextlib.contextmanager
def whole_layers() -> Iterator[None]:
    """Let the sizes of linear and recurrent layers follow from their arguments.

    Torch finds them by running what a layer is made of: that of a recurrent one token by token, as
    often as the example is long. For linear ones it takes a tenth of an export.
    """
    from torch._C import DispatchKey

    aten, composite = torch.ops.aten, DispatchKey.CompositeImplicitAutograd
    linear = _by_sizes(aten.linear.default, _sizes_of_linear_layer)
    kernels: dict[Any, dict[DispatchKey, Callable[..., Any]]] = {
        aten.linear.default: {composite: linear}
    }
    for layer in (getattr(aten, name).input for name in RECURRENT):
        kernel = _by_sizes(layer, _sizes_of_recurrent_layer)
        kernels[layer] = dict.fromkeys((DispatchKey.Autograd, composite), kernel)
    before = [(layer, dict(layer.py_kernels)) for layer in kernels]
    for layer, new in kernels.items():
        layer.py_kernels.update(new)
        layer._dispatch_cache.clear()
    try:
        yield
    finally:
        for layer, known in before:
            layer.py_kernels.clear()
            layer.py_kernels.update(known)
            layer._dispatch_cache.clear()


def _by_sizes(layer: Any, sizes: Callable[..., Any]) -> Callable[..., Any]:
    """Return what gives the `sizes` of a layer's results; what it is made of where that is None.

    It is run as it is where an export follows values, which have to be right.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[0]
        alone = isinstance(given, FakeTensor) and not given.fake_mode.propagate_real_tensors
        found = sizes(*args, **kwargs) if alone else None
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        return layer._op_dk(composite, *args, **kwargs) if found is None else found

    return kernel


def _sizes_of_linear_layer(
    given: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    fits = weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    types = {each.dtype for each in (given, weight, bias) if each is not None}
    if not fits or len(types) > 1 or given.ndim < 2 or given.shape[-1] != weight.shape[1]:
        return None
    return given.new_empty((*given.shape[:-1], weight.shape[0]))


def _sizes_of_recurrent_layer(
    given: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    states = [hx] if isinstance(hx, Tensor) else hx
    width = states[0].shape[-1] * (1 + bidirectional)
    return given.new_empty((*given.shape[:-1], width)), *map(torch.empty_like, states)
