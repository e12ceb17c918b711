"""Where a graph runs: runtimes by name, and the device on which it makes what it makes by itself.

A graph holds the device that it was captured on, wherever it makes a tensor of numbers or moves
one. It may be run on another; then these literals stand for that one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from graphprune.ir.nodes import copy_of

Runtime = Literal["portable", "cpu", "cuda", "tensorrt"]
"""What a program is to run on; "portable" is any of the others."""

RUNTIMES: tuple[Runtime, ...] = ("cpu", "cuda", "tensorrt")
"""The runtimes that facts are known of."""

_CPU, _META = torch.device("cpu"), torch.device("meta")


def device_of(values: Iterable[Any]) -> torch.device:
    """Return the device of tensors that are run together: that of the first not on the CPU.

    Tensors without values stand for such on the CPU.
    """
    devices = (value.device for value in values if isinstance(value, Tensor))
    return next((device for device in devices if device not in (_CPU, _META)), _CPU)


def has_device(node: fx.Node) -> bool:
    """Return whether `node` names a device."""
    return any(isinstance(arg, torch.device) for arg in (*node.args, *node.kwargs.values()))


def placed(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with `device` in the place of every device."""
    moved = tuple(device if isinstance(arg, torch.device) else arg for arg in args)
    return moved, {k: device if isinstance(v, torch.device) else v for k, v in kwargs.items()}


_Copies = dict[torch.device, fx.GraphModule | None]

_COPIES: WeakKeyDictionary[fx.GraphModule, _Copies] = WeakKeyDictionary()
"""Graphs as they are run on devices that they were run on; None where that is no copy."""


def module_on(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Return `module`, or a copy that makes its tensors on `device` where it does so elsewhere."""
    copies = _COPIES.setdefault(module, {})
    if device not in copies:
        copies[device] = _made_on(module, device)
    return copies[device] or module


def _made_on(module: fx.GraphModule, device: torch.device) -> fx.GraphModule | None:
    """Return a copy of `module` on `device`; None where it is so already."""
    named = [node for node in module.graph.nodes if has_device(node)]
    if all(placed(node.args, node.kwargs, device) == (node.args, node.kwargs) for node in named):
        return None
    graph, copies = copy_of(module.graph)
    for node in named:
        copy = copies[node]
        copy.args, copy.kwargs = placed(copy.args, copy.kwargs, device)
    return fx.GraphModule(module, graph)
