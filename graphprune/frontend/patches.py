"""Every patch of torch and transformers that capture needs: one context manager each, with why.

Each states the versions whose code it was read in; all are undone on leaving.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import CaptureError
from graphprune.frontend.example_inputs import configs

# -- torch 2.13 ---------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep `torch.export` from printing the graph so far before it raises, and its guards."""
    from torch.export import _trace

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    _trace.print = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _trace.print  # type: ignore[attr-defined]
        logger.setLevel(level)


def no_cache_of_sizes() -> contextlib.AbstractContextManager[None]:
    """Let each operator work its sizes out by itself.

    With dynamic sizes, making and reading entries of the cache takes longer than what it saves: a
    quarter of an export, of a model with many equal layers too.
    """
    from torch._dynamo import config

    return config.patch(fake_tensor_cache_enabled=False)


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


@contextlib.contextmanager
def explicit_masks() -> Iterator[None]:
    """Let `nn.TransformerEncoder` and its kin take a mask as it is, without looking at its values.

    They compare it with a causal one to choose a kernel, which is a branch on data; the mask
    itself is applied either way.
    """
    from torch.nn.modules import transformer

    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


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
