"""Models that accelerate has spread over devices, memory and disk, as `device_map` asks for.

Modules of such a model are called through hooks, which bring weights and inputs to where a module
computes and take weights away afterwards. What the model computes is in its modules; where is a
program's own business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import CaptureError
from graphprune.weights.deferred import Deferred, made
from graphprune.weights.models import named_tensors, zeros_lent

_HOOK, _FORWARD = "_hf_hook", "_old_forward"

_MOVES = {"AlignDevicesHook", "CpuOffload"}
"""Hooks that move what a module computes with, and do nothing else."""


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[torch.device | None]:
    """Take the hooks of accelerate off `model` for a while.

    Where its weights lie in several places, zeros on the CPU that take no memory are in the place
    of those elsewhere: see `graphprune.weights.models.stored_weights`.

    Yields
    ------
    torch.device or None
        Where the model computes, if it was spread over several places.

    Raises
    ------
    CaptureError
        When a hook does more than to move what a module computes with.
    """
    hooked = {path: module for path, module in model.named_modules() if _HOOK in vars(module)}
    hooks = {path: _hooks(path, module) for path, module in hooked.items()}
    offloaded = {
        name: tensor
        for path, each in hooks.items()
        for hook in each
        for name, tensor in _offloaded(path, hooked[path], hook)
    }
    tensors = named_tensors(model)
    places = {tensor.device for tensor in tensors.values()}
    stored = {}
    if hooked and (offloaded or len(places) > 1):
        stored = {n: _copied(t) for n, t in tensors.items() if t.device.type not in ("cpu", "meta")}
    stored |= offloaded
    ties = dict(_lost_ties(model, offloaded))
    with _unhooked(list(hooked.values())), zeros_lent(model, stored, ties):
        yield _computes(hooks) if stored else None


@contextlib.contextmanager
def _unhooked(modules: Collection[nn.Module]) -> Iterator[None]:
    """Let modules be called as their classes say, or as they were called before the hooks came."""
    called = [vars(module).pop("forward", None) for module in modules]
    for module in modules:
        before = getattr(module, _FORWARD)
        if getattr(before, "__func__", None) is not type(module).forward:
            module.forward = before
    try:
        yield
    finally:
        for module, forward in zip(modules, called, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _hooks(path: str, module: nn.Module) -> list[Any]:
    """Return the hooks of a module; refuse one that does more than to move."""
    found = getattr(module, _HOOK)
    hooks = list(getattr(found, "hooks", [found]))
    for hook in hooks:
        if type(hook).__name__ not in _MOVES:
            raise CaptureError(
                f"{path or type(module).__name__} is called through a hook of accelerate "
                f"({type(hook).__name__}) that may change what it computes: take it off first, "
                "accelerate.hooks.remove_hook_from_submodules(model)"
            )
    return hooks


def _offloaded(path: str, module: nn.Module, hook: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a hook brings from memory or disk, by the names in the model."""
    if not getattr(hook, "offload", False):
        return
    for name, tensor in named_tensors(module, recurse=hook.place_submodules).items():
        if tensor.is_meta and name in hook.weights_map:
            read = partial(_read, hook.weights_map, name, tensor.dtype)
            whole = f"{path}.{name}" if path else name
            yield whole, Deferred(read, tensor.shape, tensor.dtype)


def _lost_ties(model: nn.Module, offloaded: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield (name, first name) of tied weights that were offloaded one by one."""
    known: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, first in known.items():
        both = offloaded.get(name), offloaded.get(first)
        if both[0] is not None and both[1] is not None and torch.equal(*map(made, both)):
            yield name, first


def _read(weights: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return weights[name].detach().to("cpu", dtype)


def _copied(tensor: Tensor) -> Tensor:
    """Return what is copied to the CPU where it is used."""
    return Deferred(lambda: tensor.detach().cpu(), tensor.shape, tensor.dtype)


def _computes(hooks: Mapping[str, Sequence[Any]]) -> torch.device | None:
    """Return the first device that a hook brings weights and inputs to."""
    devices = (getattr(hook, "execution_device", None) for each in hooks.values() for hook in each)
    first = next((device for device in devices if device is not None), None)
    return None if first is None else torch.device(first)
