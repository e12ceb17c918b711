"""Tensors that remember what is done to them, so that a loader's code can run without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from graphprune.weights.deferred import LOOKS, Deferred, Make, made
from graphprune.weights.files import TensorFile


class Recorded(Deferred):
    """A deferred tensor of which operators make deferred tensors.

    Moves and conversions of the type are not done, only kept: the values stay as they are stored.

    Parameters
    ----------
    make, shape, dtype, device
        As a deferred tensor takes them.
    wanted
        The type that it was to be converted to; its own where it was to be in none.
    """

    wanted: torch.dtype

    @staticmethod
    def __new__(
        cls,
        make: Make,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        wanted: torch.dtype | None = None,
    ) -> Self:
        """Make one; see the class."""
        found = super().__new__(cls, make, shape, dtype, device)
        found.wanted = wanted or dtype
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in LOOKS:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _AS_IT_IS:
            return args[0]
        if func is Tensor.to:
            return _asked(args[0], args[1:], kwargs)
        return _remembered(func, args, kwargs)

    def stored(self) -> Deferred:
        """Return what it stands for, to be used as any other tensor."""
        return Deferred(self._make, self.shape, self.dtype, self.device)


_AS_IT_IS = {Tensor.detach, Tensor.requires_grad_, Tensor.cpu, Tensor.contiguous}
"""What leaves values as they are."""


def _asked(tensor: Recorded, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
    dtypes = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.dtype)]
    wanted = dtypes[0] if dtypes else tensor.wanted
    return Recorded(tensor._make, tensor.shape, tensor.dtype, tensor.device, wanted)


def _remembered(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what `func` makes, of which the shapes are found without data."""
    found = func(*tree_map(_empty, args), **tree_map(_empty, kwargs))
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Recorded)]
    results, form = tree_flatten(found)

    def part(index: int) -> Tensor:
        made_of = func(*tree_map(made, args), **tree_map(made, kwargs))
        tensor: Tensor = tree_flatten(made_of)[0][index]
        return tensor

    def recorded(index: int, result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        shape, dtype = result.shape, result.dtype
        return Recorded(lambda: part(index), shape, dtype, given[0].device, given[0].wanted)

    return tree_unflatten([recorded(*each) for each in enumerate(results)], form)


def _empty(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def recorded_as(weight: Tensor) -> Recorded:
    """Return a tensor that stands for `weight` and remembers what is done to it."""
    return Recorded(lambda: made(weight.detach()), weight.shape, weight.dtype, weight.device)


class RecordedFile:
    """Does what `safetensors.safe_open` gives does, with recorded tensors of a mapped file.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: str, **_: Any) -> None:
        self._file = TensorFile(Path(path), finite=True)

    def keys(self) -> list[str]:
        """Return the names of its tensors."""
        return list(self._file.entries)

    def get_slice(self, name: str) -> Recorded:
        """Return a tensor, of which nothing is read."""
        return Recorded(lambda: self._file.read(name), *self._file.typed(name))

    def __exit__(self, *_: object) -> None:
        """Keep the file open: its tensors are read later."""
