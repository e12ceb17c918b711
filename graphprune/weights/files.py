"""Tensors of safetensors files, mapped: nothing is read before it is used, and nothing copied."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import CheckpointError, first_line
from graphprune.io.whole_files import refuse_stand_in
from graphprune.weights.deferred import Deferred

TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""The types of the safetensors format that torch has."""

NAMES = {dtype: name for name, dtype in TYPES.items()}

_MOST_HEADER = 100_000_000
"""Bytes: the limit of the safetensors format itself."""


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of a file describes it; `kind` is the format's name of its type."""

    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """The type in torch; None where that has none."""
        return TYPES.get(self.kind)


def header_of(file: Path) -> dict[str, Entry]:
    """Return what a safetensors file holds, by name; its data are not read.

    Raises
    ------
    CheckpointError
        When it is missing or has no readable header, or its size is not what the header says.
    """
    try:
        size = file.stat().st_size
        refuse_stand_in(file, CheckpointError)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER):
                raise CheckpointError(f"{file} is cut short or no safetensors file: {size} bytes")
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
        found = {n: Entry(str(e["dtype"]), tuple(map(int, e["shape"]))) for n, e in tensors.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{file} has no readable safetensors header: {first_line(error)}"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{file} is cut short or damaged: {size} bytes, not {expected}")
    return found


class TensorFile:
    """A safetensors file, mapped for as long as a tensor of it is there.

    Every use of a tensor makes sure that the file is as it was when it was mapped.

    Parameters
    ----------
    path
        The file.
    finite
        Whether NaN or infinity is refused, when a tensor is used for the first time.

    Raises
    ------
    CheckpointError
        When the file is missing, cut short or damaged.
    """

    def __init__(self, path: Path, *, finite: bool = False) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.entries = header_of(path)
        self._unchecked = set(self.entries) if finite else set()
        try:
            # The file that was mapped, whatever its name means later.
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            self._mapped: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
        self._seen = self._stamp()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, to be read where they are used.

        Raises
        ------
        CheckpointError
            When torch has no such type.
        """
        return {name: self._deferred(name) for name in self.entries}

    def read(self, name: str) -> Tensor:
        """Return a tensor as a view of the mapped file.

        Raises
        ------
        CheckpointError
            When the file has changed since it was mapped, or the tensor holds NaN or infinity.
        """
        if self._stamp() != self._seen:
            raise CheckpointError(f"{self.path} has changed since it was opened")
        tensor: Tensor = self._mapped.get_tensor(name)
        if name in self._unchecked:
            if not is_finite(tensor):
                raise CheckpointError(
                    f"{self.path.parent}: the weight {name} holds NaN or infinity"
                )
            self._unchecked.discard(name)
        return tensor

    def typed(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the type of a tensor.

        Raises
        ------
        CheckpointError
            When torch has no such type.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(f"{self.path}: {name} is {entry.kind}, which torch does not know")
        return entry.shape, entry.dtype

    def _deferred(self, name: str) -> Tensor:
        return Deferred(lambda: self.read(name), *self.typed(name))

    def _stamp(self) -> tuple[int, int]:
        now = os.fstat(self._handle)
        return now.st_size, now.st_mtime_ns


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    # Unlike isfinite, the extremes need no memory of their own.
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))
