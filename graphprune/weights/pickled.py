"""Files of tensors that `torch.save` wrote, as checkpoints held them before safetensors."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from graphprune.errors import CheckpointError
from graphprune.io.whole_files import refuse_stand_in


def pickled_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, mapped where the form of the file allows it.

    Nothing but tensors is unpickled.

    Raises
    ------
    CheckpointError
        When it is missing, cut short or damaged, or holds anything but tensors by name.
    """
    try:
        refuse_stand_in(file, CheckpointError)
        mapped = zipfile.is_zipfile(file)
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except CheckpointError:
        raise
    except Exception as error:  # what it unpickles may fail in any way
        raise CheckpointError(
            f"{file} is cut short or damaged, or holds other things than tensors: "
            f"{file.stat().st_size} bytes"
        ) from error
    if not isinstance(held, dict) or not held:
        raise CheckpointError(f"{file} holds no tensors by name, but a {type(held).__name__}")
    for name, value in held.items():
        if not isinstance(value, Tensor):
            what = type(value).__name__
            raise CheckpointError(f"{file} holds no tensors by name: {name!r} is a {what}")
    return held
