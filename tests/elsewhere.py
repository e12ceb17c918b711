"""A device that is not there: tensors that say they are on it, and refuse to be mixed with others.

They compute on the CPU, so that whatever runs on such tensors would run on the real device as far
as places go: what makes a tensor on the CPU and combines it with one of them is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

from graphprune.ir.interpreter import _tensors
from graphprune.ir.program import Program
from graphprune.weights.deferred import LOOKS, made
from graphprune.weights.placement import Placement

DEVICE = torch.device("cuda", 0)

_ATEN = torch.ops.aten
_CROSSES = {_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN.copy.default}
_INDEXES = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}


class Elsewhere(Tensor):
    """A tensor that says it is on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",
        )
        made.inner = inner.detach()
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return DEVICE
        if func == Tensor.is_cuda.__get__:
            return True
        if func == Tensor.is_cpu.__get__:
            return False
        if func is Tensor.tolist:
            return args[0].inner.tolist()
        if func is Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if func is Tensor.cuda:
            return args[0]
        if func in (Tensor.conj, torch.conj):  # what is put off is lost below
            func = torch.conj_physical
        if func is Tensor.backward:  # which may run parts again, and these ask for devices
            given = {"grad_tensors" if key == "gradient" else key: kwargs[key] for key in kwargs}
            return torch.autograd.backward(*args, **given)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        _check(func, args, kwargs)
        away = func is _ATEN._to_copy.default and kwargs.get("device") is not None
        found = func(*_mapped(_inner, args), **_mapped(_inner, kwargs))
        if func is _ATEN.copy_.default and not isinstance(args[0], Elsewhere):
            return args[0]
        if away:
            return found
        wrapped = _mapped(lambda each: Elsewhere(each) if type(each) is Tensor else each, found)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _mapped(function: Callable[[Any], Any], of: Any) -> Any:
    """Return the arguments or results of an operator with each of them mapped.

    They nest in plain containers alone, for which torch's own trees take most of a test's time.
    """
    if isinstance(of, tuple | list):
        return type(of)([_mapped(function, each) for each in of])
    if isinstance(of, dict):
        return {name: _mapped(function, each) for name, each in of.items()}
    return function(of)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return _Away.apply(tensor) if device.type == "cpu" else tensor


class _Away(torch.autograd.Function):
    """From the device to the CPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.inner.clone() if isinstance(tensor, Elsewhere) else tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Elsewhere(gradient)


class _There(torch.autograd.Function):
    """From the CPU to the device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return Elsewhere(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.inner if isinstance(gradient, Elsewhere) else gradient


def _check(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if func in _CROSSES:
        return
    tensors = list(_tensors(args[:1] if func in _INDEXES else (*args, *kwargs.values())))
    if any(isinstance(each, Elsewhere) for each in tensors):
        for each in tensors:
            if not isinstance(each, Elsewhere) and each.ndim:
                raise RuntimeError(
                    f"{func}: expected all tensors to be on the same device, but found cuda:0 and "
                    f"cpu {tuple(each.shape)}"
                )


class Present(TorchFunctionMode):
    """While it is entered, tensors can be made on `DEVICE`."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in LOOKS and func is not Tensor.detach:
            with self:  # what deferred tensors are made of is moved there, too
                args, kwargs = _mapped(made, args), _mapped(made, kwargs)
        if func in (Tensor.to, _ATEN.to.device, _ATEN.to.dtype_layout, _ATEN._to_copy.default):
            return _to(func, args, kwargs)
        flat = [*args, *kwargs.values()]
        if func is torch.device or not any(_is_there(each) for each in flat):
            return func(*args, **kwargs)
        cpu = torch.device("cpu")
        found = func(
            *(cpu if _is_there(each) else each for each in args),
            **{name: cpu if _is_there(each) else each for name, each in kwargs.items()},
        )
        return Elsewhere(found) if type(found) is Tensor else found


def _to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move a tensor, and convert it, as `Tensor.to` does."""
    tensor, *rest = args
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for each in rest:
        if isinstance(each, Tensor):
            device, dtype = each.device, each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, torch.device | str):
            device = torch.device(each)
    if dtype is not None and dtype is not tensor.dtype:
        tensor = tensor.type(dtype)
    if device is None:
        copies = kwargs.get("copy", False) and tensor is args[0]
        return tensor.clone() if copies else tensor
    if torch.device(device).type == "cuda":
        return tensor if isinstance(tensor, Elsewhere) else _There.apply(tensor)
    return _Away.apply(tensor) if isinstance(tensor, Elsewhere) else tensor


def _is_there(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


def moved(program: Program) -> Program:
    """Return `program` with its weights on the device."""
    weights = {name: Elsewhere(weight.detach()) for name, weight in program.weights.items()}
    return dataclasses.replace(program, weights=weights)


def placed(program: Program) -> Program:
    """Return `program` with its weights where they are, to be moved when they are used."""
    return dataclasses.replace(program, placement=Placement(device=DEVICE))
