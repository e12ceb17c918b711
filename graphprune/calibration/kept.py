"""Values of batches that are needed again later; past a limit of memory they lie on disk."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from graphprune.ir.interpreter import Memory
from graphprune.weights.deferred import Deferred
from graphprune.weights.scratch import spill
from graphprune.weights.tensors import own_storage


class Kept(MutableMapping[Hashable, Any]):
    """A mapping whose tensors are moved to scratch files, the oldest first, past a limit.

    Parameters
    ----------
    limit
        Bytes that its tensors may take; None for any number.
    memory
        Counts what they take.
    """

    def __init__(self, limit: int | None = None, memory: Memory | None = None) -> None:
        self.limit, self.memory = limit, memory or Memory()
        self._held: dict[Hashable, Any] = {}
        self._devices: dict[Hashable, torch.device] = {}

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self.pop(key, None)
        if isinstance(value, Tensor):
            value = _compact(value.detach())
            self.memory.hold(value)
        self._held[key] = value
        if self.limit is not None and self.memory.bytes > self.limit:
            self._spill(self.limit // 2)

    def __getitem__(self, key: Hashable) -> Any:
        value = self._held[key]
        return value.made().to(self._devices[key]) if isinstance(value, Deferred) else value

    def __delitem__(self, key: Hashable) -> None:
        value = self._held.pop(key)
        if self._devices.pop(key, None) is None:
            self.memory.release(value)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(list(self._held))

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def _spill(self, limit: int) -> None:
        """Move tensors to a file until those in memory take no more than `limit`."""
        moved: dict[str, Hashable] = {}
        tensors: dict[str, Tensor] = {}
        for key, value in self._held.items():
            if self.memory.bytes <= limit:
                break
            if isinstance(value, Tensor) and key not in self._devices:
                moved[str(len(moved))] = key
                tensors[str(len(tensors))] = value
                self.memory.release(value)
        for name, found in spill(own_storage(tensors)).items():
            self._devices[moved[name]] = tensors[name].device
            self._held[moved[name]] = found


def _compact(value: Tensor) -> Tensor:
    """Return `value` without memory that it does not show, of which it may be a small part."""
    whole = value.untyped_storage().nbytes()
    return value.clone() if whole > 2 * value.numel() * value.itemsize else value
