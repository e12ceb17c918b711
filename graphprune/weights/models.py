"""Models whose weights were left where they are stored, and are zeros until they are run."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.weights.deferred import Deferred, converted, made
from graphprune.weights.recorded import Recorded

_STORED = "_graphprune_stored"
_MEMORY = "_graphprune_memory"


def leave_zeros(model: nn.Module, memory: int | None = None) -> None:
    """Put zeros that take no memory in the place of what a loader left in files.

    Parameters
    ----------
    model
        As the loader gave it.
    memory
        Bytes that values of its weights may take later on; None for no limit.
    """
    stored: dict[str, Tensor] = {}
    zeros: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for held, wrap in ((module._parameters, nn.Parameter), (module._buffers, Tensor.detach)):
            for name, tensor in held.items():
                if isinstance(tensor, Recorded):
                    stored[f"{path}.{name}" if path else name] = tensor.stored()
                    if id(tensor) not in zeros:  # a tied weight is one
                        zeros[id(tensor)] = wrap(light_zeros(tensor.shape, tensor.wanted))
    for name in stored:
        held, own = _place(model, name)
        if isinstance(held[own], Recorded):
            held[own] = zeros[id(held[own])]
    stand_for(model, stored)
    model.__dict__[_MEMORY] = memory


def stand_for(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Say that weights of `model`, by all of their names, are zeros in the place of `stored`."""
    model.__dict__[_STORED] = dict(stored)


def stored_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights that `model` has zeros in the place of, by all of their names."""
    found: Mapping[str, Tensor] = model.__dict__.get(_STORED, {})
    return found


@contextlib.contextmanager
def zeros_lent(
    model: nn.Module, stored: Mapping[str, Tensor], ties: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Put zeros that take no memory in the place of what stands for `stored`, for a while.

    The names of one tensor stay one weight, and so do names that `ties` maps to others.
    """
    ties = ties or {}
    taken = {name: _place(model, name) for name in stored}
    olds = {name: held[own] for name, (held, own) in taken.items()}
    zeros: dict[int, Tensor] = {}
    for name, (held, own) in taken.items():
        first = olds[ties.get(name, name)]
        if id(first) not in zeros:
            made = light_zeros(first.shape, first.dtype)
            zeros[id(first)] = nn.Parameter(made) if isinstance(first, nn.Parameter) else made
        held[own] = zeros[id(first)]
    if stored:
        stand_for(model, stored)
    try:
        yield
    finally:
        for name, (held, own) in taken.items():
            held[own] = olds[name]
        if stored:
            model.__dict__.pop(_STORED, None)


@contextlib.contextmanager
def values_lent(model: nn.Module) -> Iterator[None]:
    """Let `model` compute with the values of its weights, each read where it is used."""
    stored = stored_weights(model)
    zeros = named_tensors(model) if stored else {}
    with lent(model, {n: converted(w, zeros[n].dtype, zeros[n].device) for n, w in stored.items()}):
        yield


@contextlib.contextmanager
def values_held(model: nn.Module, names: Mapping[str, str]) -> Iterator[Mapping[str, Tensor]]:
    """Let `model` compute with the values of some of its weights, made once, for a while.

    Those that do not fit into its memory are made each time they are used.

    Parameters
    ----------
    model
        Has zeros in the place of weights.
    names
        Name of such a weight -> that of the weight whose values it has for now.

    Yields
    ------
    Mapping
        These weights by name, in the types in which the model computes with them.
    """
    stored, zeros = stored_weights(model), named_tensors(model)
    memory = model.__dict__.get(_MEMORY)
    room = math.inf if memory is None else memory - max(zeros[name].nbytes for name in names)
    made_of: dict[str, Tensor] = {}
    for first in dict.fromkeys(names.values()):
        weight, size = stored[first], zeros[first].nbytes
        weight = converted(weight, zeros[first].dtype, zeros[first].device)
        fits = size <= room
        room -= size if fits else 0
        made_of[first] = _made_once(weight) if fits else weight
    weights = {name: made_of[first] for name, first in names.items()}
    stand_for(model, {**stored, **weights})
    try:
        yield weights
    finally:
        stand_for(model, stored)


def _made_once(weight: Tensor) -> Tensor:
    """Return `weight`, of which the values are held once they were made."""
    if not isinstance(weight, Deferred):
        return weight
    return Deferred(functools.cache(weight.made), weight.shape, weight.dtype, weight.device)


@contextlib.contextmanager
def lent(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put `weights` in the place of those of `model` that have their names, for a while."""
    taken: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, weight in weights.items():
        held, own = _place(model, name)
        taken.append((held, own, held[own]))
        held[own] = weight
    try:
        yield
    finally:
        for held, own, before in taken:
            held[own] = before


@contextlib.contextmanager
def tensors_kept(model: nn.Module, parameters: Iterable[str]) -> Iterator[None]:
    """Put back what `model` writes to its buffers and to `parameters`, or puts in their place."""
    places = [_place(model, name) for name in parameters]
    places += [(module._buffers, name) for module in model.modules() for name in module._buffers]
    before = [
        (held, name, tensor, tensor.clone())
        for held, name in places
        if (tensor := held[name]) is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for held, name, tensor, value in before:
                held[name] = tensor
                tensor.copy_(value)


def fill(module: nn.Module) -> None:
    """Give the models in `module` the values of their weights for good."""
    for model in module.modules():
        for name, weight in stored_weights(model).items():
            held, own = _place(model, name)
            with torch.no_grad():
                held[own].copy_(made(weight))
        model.__dict__.pop(_STORED, None)


def named_tensors(model: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Return the parameters and buffers of `model`, tied ones by all of their names."""
    return {
        **dict(model.named_parameters(recurse=recurse, remove_duplicate=False)),
        **dict(model.named_buffers(recurse=recurse, remove_duplicate=False)),
    }


def light_zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros in memory that the system has not made yet, and does not unless it is written.

    Tensors of zeros by torch are written.
    """
    count = shape.numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape)


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary of a module that holds a weight, and its name there."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if own in module._parameters else module._buffers), own
