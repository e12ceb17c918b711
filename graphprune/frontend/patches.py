"""Every patch of torch and transformers that capture needs: one context manager each, with why.

Each states the versions whose code it was read in; all are undone on leaving.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphprune.errors import CaptureError
from graphprune.frontend.example_inputs import configs
from graphprune.ir.aten import RECURRENT

# -- torch 2.13 ---------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep `torch.export` from printing the graph so far before it raises, and its guards.

    What operators refuse while it is tried is logged as an error, with a trace; it is raised too.
    """
    from torch.export import _trace

    levels = {
        "torch.fx.experimental.symbolic_shapes": logging.ERROR,
        "torch._export.non_strict_utils": logging.ERROR,
        "torch._subclasses.fake_tensor": logging.CRITICAL,
    }
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    _trace.print = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _trace.print  # type: ignore[attr-defined]
        for logger, level in before.items():
            logger.setLevel(level)


def no_cache_of_sizes() -> contextlib.AbstractContextManager[None]:
    """Let each operator work its sizes out by itself.

    With dynamic sizes, making and reading entries of the cache takes longer than what it saves: a
    quarter of an export, of a model with many equal layers too.
    """
    from torch._dynamo import config

    return config.patch(fake_tensor_cache_enabled=False)


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
def no_moves_in_place() -> Iterator[None]:
    """Make `Module.to` do nothing for a module that already has that type and device.

    `torch.export` refuses any move of a module while it is traced, but some code moves one to the
    type that it has each time.
    """
    move = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        held = (*self.parameters(), *self.buffers())
        there = all(
            device in (None, t.device) and (not t.is_floating_point() or dtype in (None, t.dtype))
            for t in held
        )
        return self if there and form is None else move(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def explicit_masks() -> contextlib.AbstractContextManager[Any]:
    """Let `nn.TransformerEncoder` and its kin take a mask as it is, without looking at its values.

    They compare it with a causal one to choose a kernel, which is a branch on data; the mask
    itself is applied either way.
    """
    from torch.nn.modules import transformer

    def said(mask: Tensor | None, is_causal: bool | None = None, size: Any = None) -> bool:
        return is_causal is True

    return mock.patch.object(transformer, "_detect_is_causal_mask", said)


@contextlib.contextmanager
def no_autocast_regions(device: str) -> Iterator[None]:
    """Let `torch.autocast` leave no region in the graph where it casts nothing on `device`.

    A region is a graph of its own, which cannot be read with the rest. One that casts is refused:
    capture sees operators before their casts.
    """
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def check(self: torch.autocast) -> torch.autocast:
        if self._enabled and self.device == device:
            raise CaptureError(
                f"it runs under torch.autocast({device!r}): cast the model and its inputs to one "
                "type, or switch autocast off in its code"
            )
        return self

    torch.autocast.__enter__ = check  # type: ignore[method-assign]
    torch.autocast.__exit__ = lambda self, *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


@contextlib.contextmanager
def no_grad_regions() -> Iterator[None]:
    """Let `torch.enable_grad` and `torch.set_grad_enabled` leave no region in the graph.

    Values do not depend on the mode, and a module made of a program trains all that it computes.
    """
    enable, switch = torch.enable_grad, torch.set_grad_enabled
    names = ("__init__", "__enter__", "__exit__")
    before = [(kind, name, kind.__dict__.get(name)) for kind in (enable, switch) for name in names]
    enable.__enter__ = lambda self: None  # type: ignore[method-assign]
    enable.__exit__ = lambda self, *_: None  # type: ignore[method-assign]
    switch.__init__ = lambda self, mode: None  # type: ignore[method-assign]
    switch.__enter__ = lambda self: None  # type: ignore[method-assign]
    switch.__exit__ = lambda self, *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, name, function in before:
            if function is not None:
                setattr(kind, name, function)
            elif name in kind.__dict__:
                delattr(kind, name)


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


def values_of_parameters() -> contextlib.AbstractContextManager[Any]:
    """Let an export that follows values know those of parameters, too.

    Torch copies them from plain tensors alone, and leaves what memory held for all others.
    """
    from torch._subclasses import meta_utils

    copy = meta_utils._safe_copy

    def of_parameters_too(dst: Tensor, src: Tensor | None) -> None:
        copy(dst, src.data if isinstance(src, nn.Parameter) else src)

    return mock.patch.object(meta_utils, "_safe_copy", of_parameters_too)


def plain_branches() -> contextlib.AbstractContextManager[Any]:
    """Let `torch.cond` be Python's ``if``: one branch on what is known, refused on data."""

    def branch(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
        return true_fn(*operands) if pred else false_fn(*operands)

    return mock.patch.object(torch, "cond", branch)


@contextlib.contextmanager
def lengths_followed(model: nn.Module) -> Iterator[None]:
    """Let ``len(x)`` of a tensor be a size like any other where the model's classes are defined.

    Python's own `len` makes a number of it, which fixes that dimension at the example's.
    """
    classes = {each for module in model.modules() for each in type(module).__mro__}
    names = {each.__module__ for each in classes if not each.__module__.startswith("torch.")}
    places = [vars(sys.modules[name]) for name in names - {"builtins"} if name in sys.modules]
    places = [place for place in places if "len" not in place]
    for place in places:
        place["len"] = _length
    try:
        yield
    finally:
        for place in places:
            del place["len"]


def _length(of: Any) -> Any:
    return of.shape[0] if isinstance(of, Tensor) and of.ndim else len(of)


def no_packed_sequences() -> contextlib.AbstractContextManager[Any]:
    """Refuse sequences that are packed by their lengths, which only their values know.

    `torch.export` fails where a layer looks at them, in words about its own tensors.
    """
    from torch.nn.utils import rnn

    def refuse(*_: Any) -> None:
        raise CaptureError(
            "it packs sequences by their lengths: give the layer the padded batch, and let what "
            "comes after the end of each sequence have no effect, which is the same for layers "
            "of one direction"
        )

    names = ("_pack_padded_sequence", "_pad_packed_sequence")
    return mock.patch.object(rnn, "_VF", SimpleNamespace(**dict.fromkeys(names, refuse)))


# -- transformers 5.23 ---------------------------------------------------------------------------


@contextlib.contextmanager
def broadcast_masks() -> Iterator[list[Any]]:
    """Let masks that transformers makes with `vmap` be made by broadcasting, as its others are.

    A graph cannot be read through `vmap`. A mask is a function of four indices, which may be called
    on all of them at once where each element depends on its own indices alone; capture compares
    outputs to find out whether it does. Yields the functions that were broadcast.
    """
    from transformers import masking_utils

    before = masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex
    seen: list[Any] = []

    def broadcast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mask(*indices: Tensor) -> Tensor:
            seen.append(function)
            made = function(*masking_utils._non_vmap_expansion_sdpa(*indices))
            return made.expand([index.shape[0] for index in indices])

        return mask

    masking_utils._vmap_expansion_sdpa = broadcast
    masking_utils.TransformGetItemToIndex = contextlib.nullcontext  # it serves `vmap` alone
    try:
        yield seen
    finally:
        masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex = before


@contextlib.contextmanager
def without_pad_token(config: Any) -> Iterator[None]:
    """Let no model look for padding in its ids, which it cannot on the meta device."""
    token = getattr(config, "pad_token_id", None)
    if token is not None:
        with contextlib.suppress(Exception):  # some configs insist on one
            config.pad_token_id = None
    try:
        yield
    finally:
        if token is not None:
            config.pad_token_id = token


@contextlib.contextmanager
def without_caches(model: Any) -> Iterator[None]:
    """Let no state be kept for later calls, for which convolutions pad texts below their kernel."""
    switched = [c for c in configs(model.config) if getattr(c, "use_cache", False)]
    for config in switched:
        config.use_cache = False
    try:
        yield
    finally:
        for config in switched:
            config.use_cache = True


@contextlib.contextmanager
def batched_experts(model: Any) -> Iterator[None]:
    """Let packed experts run as batched products, which every back end can express."""
    switched = [c for c in configs(model.config) if hasattr(c, "_experts_implementation")]
    before = [c._experts_implementation for c in switched]
    for config in switched:
        config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        for config, value in zip(switched, before, strict=True):
            config._experts_implementation = value
