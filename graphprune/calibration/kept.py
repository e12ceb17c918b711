"""Values of batches that are needed again later; past a limit of memory they lie on disk."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from graphprune.ir.interpreter import Memory
from graphprune.weights.scratch import ScratchFile

_Key = TypeVar("_Key", bound=Hashable)


class Kept(MutableMapping[_Key, Any], Generic[_Key]):
    """A mapping whose tensors are moved to a scratch file, the oldest first, past a limit.

    Parameters
    ----------
    limit
        Bytes that what `memory` counts may take; None for any number.
    memory
        Counts what its tensors take, and perhaps others.
    file
        Where they go; one of its own by default.
    """

    def __init__(
        self,
        limit: int | None = None,
        memory: Memory | None = None,
        file: ScratchFile | None = None,
    ) -> None:
        self.limit, self.memory = limit, memory or Memory()
        self._file = file or ScratchFile()
        self._held: dict[_Key, Any] = {}

    def __setitem__(self, key: _Key, value: Any) -> None:
        self.pop(key, None)
        if isinstance(value, Tensor):
            value = _compact(value.detach())
        self.memory.hold(value)
        self._held[key] = value
        if self.limit is not None:
            self._spill(self.limit)

    def __getitem__(self, key: _Key) -> Any:
        value = self._held[key]
        return value.read(self._file) if isinstance(value, _Spilled) else value

    def __delitem__(self, key: _Key) -> None:
        value = self._held.pop(key)
        if isinstance(value, _Spilled):
            self._file.free(value.at, value.bytes)
        else:
            self.memory.release(value)

    def __iter__(self) -> Iterator[_Key]:
        return iter(list(self._held))

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def _spill(self, limit: int) -> None:
        """Move tensors to the file until what is counted takes no more than `limit`."""
        for key, value in self._held.items():
            if self.memory.bytes <= limit:
                return
            if isinstance(value, Tensor):
                self._held[key] = _Spilled.of(value, self._file)
                self.memory.release(value)


@dataclass(frozen=True)
class _Spilled:
    """A tensor in a scratch file, and how to lay it out as it was.

    It may be read in another order of dimensions, and some along which it was expanded are of one
    index. Operators may round otherwise where values lie otherwise.
    """

    at: int
    bytes: int
    shape: torch.Size
    order: tuple[int, ...]
    whole: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor, file: ScratchFile) -> _Spilled:
        """Write a tensor."""
        strides = value.stride()
        once = value
        for dim, stride in enumerate(strides):
            once = once.narrow(dim, 0, 1) if stride == 0 and value.shape[dim] else once
        order = tuple(sorted(range(value.ndim), key=lambda dim: -strides[dim]))
        once = once.permute(order)
        return cls(
            file.write(once), once.nbytes, once.shape, order, value.shape, value.dtype, value.device
        )

    def read(self, file: ScratchFile) -> Tensor:
        """Read it."""
        found = file.read(self.at, self.shape, self.dtype).to(self.device)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return found.permute(back).expand(self.whole)


def _compact(value: Tensor) -> Tensor:
    """Return `value` without memory that it does not show, of which it may be a small part."""
    whole = value.untyped_storage().nbytes()
    return value.clone() if whole > 2 * value.numel() * value.itemsize else value
