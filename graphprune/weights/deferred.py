"""Tensors whose values are made where they are used: read from a file, cut, or converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Make = Callable[[], Tensor]

_CPU = torch.device("cpu")


class Deferred(Tensor):
    """A tensor of which shape, type and device are known, and whose values are made when needed.

    Whatever computes with it has its values made, which nothing keeps; what only looks at its shape
    costs nothing.

    Parameters
    ----------
    make
        Makes the values, of the type and shape that are said.
    shape, dtype, device
        What is known of them.

    Examples
    --------
    >>> squares = Deferred(lambda: torch.arange(4) ** 2, (4,), torch.int64)
    >>> squares.shape
    torch.Size([4])
    >>> squares + 1
    tensor([ 1,  2,  5, 10])
    """

    _make: Make

    @staticmethod
    def __new__(
        cls,
        make: Make,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device = _CPU,
    ) -> Self:
        """Make one; see the class."""
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made._make = make
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.detach:
            return args[0]
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # What C++ calls by itself does not pass __torch_function__.
        return func(*tree_map(made, args), **tree_map(made, kwargs or {}))

    def made(self) -> Tensor:
        """Make the values; a later call makes them anew."""
        found = self._make()
        assert found.shape == self.shape and found.dtype == self.dtype
        return found


def made(value: Any) -> Any:
    """Return `value`, or what a deferred tensor stands for."""
    return value.made() if isinstance(value, Deferred) else value


def deferred(weight: Tensor) -> Deferred:
    """Return `weight` as a deferred tensor, so that what is made of it is made where it is used."""
    if isinstance(weight, Deferred):
        return weight
    return Deferred(lambda: weight.detach(), weight.shape, weight.dtype, weight.device)


def later(
    change: Callable[[Tensor], Tensor], weight: Tensor, shape: Sequence[int] | None = None
) -> Tensor:
    """Return what `change` makes of `weight`; of a deferred one it is made when it is used.

    Parameters
    ----------
    change
        Makes a tensor of the same type on the same device.
    weight
        What it is made of.
    shape
        The shape of what it makes; that of `weight` by default.
    """
    if not isinstance(weight, Deferred):
        return change(weight.detach())
    shape = weight.shape if shape is None else shape
    return Deferred(lambda: change(weight.made()), shape, weight.dtype, weight.device)


def cut(weight: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Return the indices `kept` of `weight` along `dim`; of a deferred one when it is used."""
    shape = [*weight.shape[:dim], len(kept), *weight.shape[dim + 1 :]]
    return later(lambda old: old.index_select(dim, kept.to(old.device)), weight, shape)


def converted(weight: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `weight` in a type and on a device, made where it is used if it is not so already."""
    if weight.dtype is dtype and weight.device == device:
        return weight
    return Deferred(
        lambda: _moved(made(weight.detach()), dtype, device), weight.shape, dtype, device
    )


def _moved(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `tensor` in a type and on a device, to which it goes as it is, from pinned memory."""
    if tensor.device.type == "cpu" and device.type != "cpu" and torch.accelerator.is_available():
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


# fmt: off
_ATTRIBUTES = (
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "is_meta",
    "is_cuda", "is_sparse", "is_leaf", "grad", "grad_fn",
)
# fmt: on

LOOKS = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.numel, Tensor.nelement, Tensor.dim, Tensor.stride, Tensor.__len__),
    *(Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
"""What is known without the values."""
