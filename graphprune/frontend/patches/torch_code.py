"""What of torch 2.13 itself an export cannot follow, or says too much of."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from graphprune.errors import CaptureError


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
