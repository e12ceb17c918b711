"""What an operator of torch 2.13 gives is worked out once for all calls that are alike.

An export asks each operator what its result looks like: its shape and strides, of which some are
dynamic. Equal layers ask the same again and again, and norms and rotations do within one layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard
from unittest import mock

import torch
from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_ATEN = torch.ops.aten

_COMPOSITE = {
    _ATEN.linear.default,
    _ATEN.matmul.default,
    _ATEN.scaled_dot_product_attention.default,
}
"""Operators made of others whose result is always new."""

_BY_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@contextlib.contextmanager
def known_results() -> Iterator[None]:
    """Remember results without values by the operator and all that it is given.

    It halves the time of an export. Torch's own cache, which is switched off meanwhile, takes as
    long to read as operators take that are told sizes by name.
    """
    from torch._dynamo import config

    known: dict[Any, _Result] = {}
    kinds: dict[Any, _Kind | None] = {}
    work_out = FakeTensorMode.dispatch

    def dispatch(
        self: FakeTensorMode,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in kinds:
            kinds[func] = _kind(func)
        kind = kinds[func]
        key = kind and _key(self, func, args, kwargs or {})
        if kind is None or key is None:
            return work_out(self, func, types, args, kwargs or {})
        if key in known:
            return known[key].tensor(self, args)
        found = work_out(self, func, types, args, kwargs or {})
        if kind.explains(found, args):
            known[key] = _Result.of(found, kind)
        return found

    own = config.patch(fake_tensor_cache_enabled=False)
    with own, mock.patch.object(FakeTensorMode, "dispatch", dispatch):
        yield


@dataclass(frozen=True)
class _Kind:
    """An operator whose one result is a new tensor, or looks into its first argument."""

    views: bool

    def explains(self, found: Any, args: Sequence[Any]) -> TypeGuard[FakeTensor]:
        """Tell whether a result is as its operator says, and needs no more than its sizes."""
        if type(found) is not FakeTensor or found.constant is not None or not _is_plain(found):
            return False
        given = [each for each in args if isinstance(each, Tensor)]
        shared = [_storage(each) == _storage(found) for each in given]
        looks = shared[:1] == [True] if self.views else not any(shared)
        return looks and not found.requires_grad and not free_unbacked_symbols(found)


@dataclass(frozen=True)
class _Result:
    """What a result looks like; `offset` is None where it is new."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int | SymInt | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, found: FakeTensor, kind: _Kind) -> _Result:
        offset = found.storage_offset() if kind.views else None
        return cls(found.shape, found.stride(), offset, found.dtype, found.fake_device)

    def tensor(self, mode: FakeTensorMode, args: Sequence[Any]) -> FakeTensor:
        with in_kernel_invocation_manager(mode):
            if self.offset is None:
                made = torch.empty_strided(
                    self.shape, self.strides, dtype=self.dtype, device="meta"
                )
            else:
                made = torch.empty(0, dtype=self.dtype, device="meta")
                made.set_(args[0].untyped_storage(), self.offset, self.shape, self.strides)
        return FakeTensor(mode, made, self.device)


def _kind(func: Any) -> _Kind | None:
    """Return what kind of operator it is; None for one that is asked each time."""
    if not isinstance(func, OpOverload) or func.namespace not in ("aten", "prims"):
        return None
    arguments, returns = func._schema.arguments, func._schema.returns
    if len(returns) != 1 or str(returns[0].type) != "Tensor" or _BY_VALUES & set(func.tags):
        return None
    if func._can_decompose() and func not in _COMPOSITE:
        return None
    shared = [at for at, each in enumerate(arguments) if each.alias_info is not None]
    if any(each.alias_info is not None and each.alias_info.is_write for each in arguments):
        return None
    views = returns[0].alias_info is not None
    if shared != ([0] if views else []) or not any("Tensor" in str(a.type) for a in arguments):
        return None
    return _Kind(views)


def _key(
    mode: FakeTensorMode, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Return what results depend on; None where that is more than can be compared."""
    env = mode.shape_env
    if mode.propagate_real_tensors or env is None:
        return None
    try:
        given = _seen(mode, args), tuple([(key, _seen(mode, kwargs[key])) for key in kwargs])
        key = func, mode, env._suppress_guards_tls(), torch.get_default_dtype(), given
        hash(key)
    except (LookupError, TypeError):
        return None
    return key


def _seen(mode: FakeTensorMode, value: Any) -> Any:
    """Return what an operator sees of an argument.

    Raises
    ------
    LookupError
        For a tensor that has more to it than sizes: values, one number that counts as Python's, or
        another layout.
    """
    if isinstance(value, Tensor):
        if type(value) is not FakeTensor or value.fake_mode is not mode:
            raise LookupError
        if value.constant is not None or not value.ndim or not _is_plain(value):
            raise LookupError
        sizes = [_size(each) for each in (*value.shape, *value.stride(), value.storage_offset())]
        return value.dtype, value.fake_device, value.requires_grad, *sizes
    if isinstance(value, list | tuple):
        return tuple([_seen(mode, each) for each in value])
    if isinstance(value, SymInt):
        return _size(value)
    if isinstance(value, torch.SymFloat | torch.SymBool):
        raise LookupError
    return type(value), value


def _size(value: Any) -> Any:
    """Return a size; a dynamic one as it was made, whatever it is found to equal later."""
    return value.node._expr if isinstance(value, SymInt) else value


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_complex() and not tensor.is_neg()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
