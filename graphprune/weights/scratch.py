"""Scratch files: what is held past a limit of memory lies on disk, mapped.

A file is unlinked as soon as it is mapped, so that its room is free once its tensors are gone,
whatever ends the process. Where a system does not unlink what is mapped, or a process ended in
between, the next one that makes a scratch file removes it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from graphprune.errors import OutputError
from graphprune.weights.deferred import made
from graphprune.weights.files import TensorFile

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
    from safetensors.torch import save_file

    folder = scratch_folder()
    held = {name: made(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    _remove_leftovers(folder)
    path = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".safetensors", f"{_PREFIX}{os.getpid()}-", folder)
        os.close(handle)
        path = Path(name)
        save_file(held, path)
        found = TensorFile(path).tensors()
    except Exception as error:  # safetensors has its own error for a disk that is full
        why = error.strerror or error if isinstance(error, OSError) else error
        raise OutputError(f"the scratch folder {folder} cannot be written: {why}") from error
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
    return found


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
