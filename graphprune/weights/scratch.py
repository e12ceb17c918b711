"""Scratch files: what is held past a limit of memory lies on disk, mapped.

A file is unlinked as soon as it is mapped, so that its room is free once its tensors are gone,
whatever ends the process. Where a system does not unlink what is mapped, or a process ended in
between, the next one that makes a scratch file removes it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import OutputError
from graphprune.weights.files import TensorFile
from graphprune.weights.writing import data_of, write_file

FOLDER = "GRAPHPRUNE_SCRATCH"
"""The environment variable that names the folder."""

_PREFIX = "graphprune-scratch-"


def scratch_folder() -> Path:
    """Return where scratch files lie: as `FOLDER` says, or in a place for files of any size."""
    if asked := os.environ.get(FOLDER):
        return Path(asked)
    large = Path("/var/tmp")  # unlike /tmp it is never held in memory
    return large if os.access(large, os.W_OK) else Path(tempfile.gettempdir())


def spill(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move `tensors` to a scratch file; those returned are read from it where they are used.

    They lie on the CPU, whatever device they were on.

    Raises
    ------
    OutputError
        When there is no room for it.
    """
    folder = scratch_folder()
    _remove_leftovers(folder)
    path = None
    with _room_in(folder):
        try:
            handle, name = tempfile.mkstemp(".safetensors", f"{_PREFIX}{os.getpid()}-", folder)
            os.close(handle)
            path = Path(name)
            write_file(tensors, path)
            found = TensorFile(path).tensors()
        finally:
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink()
    return found


class ScratchFile:
    """A scratch file of tensors that come and go; the room of those that went is used again.

    It has no name, and its room is free when it or the process ends.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def write(self, tensor: Tensor) -> int:
        """Write a tensor, from whatever device, and return where it lies.

        Raises
        ------
        OutputError
            When there is no room for it.
        """
        data = data_of(tensor)
        folder = scratch_folder()
        free = self._free.get(len(data))
        at = free.pop() if free else self._end
        with _room_in(folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it stays open
                weakref.finalize(self, self._file.close)
            self._file.seek(at)
            self._file.write(data)
            self._file.flush()
        self._end = max(self._end, at + len(data))
        return at

    def read(self, at: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a copy of the tensor that lies at `at`, on the CPU."""
        found = torch.empty(tuple(shape), dtype=dtype)
        self._file.seek(at)
        self._file.readinto(data_of(found))
        return found

    def free(self, at: int, size: int) -> None:
        """Let others use the `size` bytes at `at`."""
        self._free.setdefault(size, []).append(at)


@contextlib.contextmanager
def _room_in(folder: Path) -> Iterator[None]:
    """Say in one line why `folder` cannot be written, where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"the scratch folder {folder} cannot be written: {why}") from error


@cache
def _remove_leftovers(folder: Path) -> None:
    """Remove the scratch files of processes that are gone."""
    for file in folder.glob(f"{_PREFIX}*"):
        process = file.name.removeprefix(_PREFIX).split("-")[0]
        if process.isdigit() and not _runs(int(process)):
            with contextlib.suppress(OSError):
                file.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
