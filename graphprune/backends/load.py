"""Load a program from wherever one lies: an archive, a Hugging Face directory, or the hub."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from graphprune.backends.archive import archive
from graphprune.backends.capture_cache import cache_file, read_capture, write_capture
from graphprune.backends.huggingface.model import quiet
from graphprune.backends.huggingface.read import read, read_structure, shapes_of
from graphprune.backends.onnx.weights import weights_beside
from graphprune.errors import CaptureError, CheckpointError, first_line
from graphprune.ir.program import Program


def load(
    directory_or_name: str | PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    cache: bool | None = None,
) -> Program:
    """Load a program from a directory or the hub; nothing is written into the directory.

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


def look(directory_or_name: str | PathLike[str], *, cache: bool = True) -> Program:
    """Load a program to look into: without its weights where that is possible.

    What a checkpoint's graph follows from is its config, so that weights are not read, and the
    graph is kept for the next look (`graphprune.backends.capture_cache`).

    Parameters
    ----------
    directory_or_name
        As `load` takes it.
    cache
        Whether to use graphs that were kept, and to keep this one.

    Raises
    ------
    CheckpointError, CaptureError
        As `load` does.
    """
    path = Path(directory_or_name)
    if not path.is_dir() or archive.is_archive(path) or not (path / "config.json").is_file():
        return load(directory_or_name)
    file = cache_file(path) if cache else None
    if file is not None and file.is_file():
        shapes_of(path)  # refuses files that are cut short
        if (kept := read_capture(file, path)) is not None:
            return kept
    try:
        program = read_structure(path)
    except CaptureError:
        # What a model does may depend on its weights, and on what is run.
        return load(path)
    if file is not None:
        write_capture(file, program)
    return program


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
