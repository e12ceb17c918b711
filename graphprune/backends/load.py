"""Load a program from wherever one lies: an archive, a Hugging Face directory, or the hub."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from graphprune.backends.archive import archive
from graphprune.backends.huggingface.model import quiet
from graphprune.backends.huggingface.read import read
from graphprune.backends.onnx.weights import weights_beside
from graphprune.errors import CheckpointError, first_line
from graphprune.ir.program import Program


def load(
    directory_or_name: str | PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    cache: bool | None = None,
) -> Program:
    """Load a program; the directory is only read.

    Parameters
    ----------
    directory_or_name
        A Hugging Face directory, one written by `Program.save_pretrained` or `Program.save`, or,
        where there is a network, the name of a model on the hub.
    dtype
        Element type to compute in, as torch's type or its name; "auto" is the type that the
        checkpoint stores. Archives keep their own.
    cache
        Whether a decoder is captured with its KV cache; by default wherever it has one.

    Returns
    -------
    Program
        Its source says where it came from and what the checkpoint stores.

    Raises
    ------
    CheckpointError
        When there is no such directory, a file is missing, cut short or malformed, a weight is
        missing or holds NaN or infinity, or transformers does not know the kind of model.
    CaptureError
        When the model cannot become a graph.
    """
    path = Path(directory_or_name)
    if path.is_file():
        raise CheckpointError(f"{path} is a file: give the directory that it is in")
    if path.is_dir():
        if archive.is_archive(path):
            return archive.load(path, weights_beside(path))
        return read(path, dtype=dtype, cache=cache)
    return read(_download(str(directory_or_name)), dtype=dtype, cache=cache)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no directory {name}")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no network, no such model, no access: all the same here
        raise CheckpointError(
            f"there is no directory {name}, and it could not be had from the hub: "
            f"{first_line(error)}"
        ) from error
