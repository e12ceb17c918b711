"""Load a program from wherever one lies: an archive, a Hugging Face directory, or the hub."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path

import torch

from graphprune.backends.archive import archive
from graphprune.backends.capture_cache import cache_file, read_capture, write_capture
from graphprune.backends.huggingface.model import quiet
from graphprune.backends.huggingface.read import check_files, read, read_structure, read_unrun
from graphprune.backends.onnx.weights.held import weights_beside
from graphprune.errors import CaptureError, CheckpointError, UsageError, first_line
from graphprune.io.paths import path_of
from graphprune.ir.program import Program
from graphprune.weights.placement import Placement, device_of, memory_of


def load(
    directory_or_name: str | PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    memory: str | int | None = None,
    cache: bool | None = None,
) -> Program:
    """Load a program from a directory or the hub; nothing is written into the directory.

    They stay in their files, in the type in which they are stored, until something changes them.

    Parameters
    ----------
    directory_or_name
        A Hugging Face directory, one written by `Program.save_pretrained` or `Program.save`, or,
        where there is a network, the name of a model on the hub.
    dtype
        Element type to hold weights and to compute in, as torch's type or its name. With "auto"
        weights keep the type in which they are stored, and arithmetic is in float32 on a processor
        and in the stored type on a GPU. Archives keep their own.
    device
        Where to compute, such as "cuda"; on the processor if left out.
    memory
        The most that weights and activations may take, in bytes or as "8GB". What passes change
        goes to scratch files past it, and on a device weights are moved as they are used. A weight
        that is not finite is refused when it is used for the first time.
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
    UsageError
        When there is no such device, or `memory` is no size or less than a weight takes.
    """
    placement = Placement(device_of(device), memory_of(memory))
    path = path_of(directory_or_name, CheckpointError)
    if path.is_file():
        raise CheckpointError(f"{path} is a file: give the directory that it is in")
    if path.is_dir():
        if archive.is_archive(path):
            found = archive.load(path, weights_beside(path))
            return _within_memory(dataclasses.replace(found, placement=placement))
    else:
        path = _download(str(directory_or_name))
    return _within_memory(read(path, dtype=dtype, placement=placement, cache=cache))


def _within_memory(program: Program) -> Program:
    """Return `program`, whose limit of memory is at least what its largest weight takes."""
    limit, types = program.placement.memory, program.compute_types
    taken = {name: w.numel() * types[name].itemsize for name, w in program.weights.items()}
    most = max(taken, key=taken.__getitem__, default="")
    if limit is not None and most and taken[most] > limit:
        raise UsageError(
            f"a memory limit of {limit:,} bytes is too low: {most} alone takes {taken[most]:,}"
        )
    return program


def load_unrun(
    directory_or_name: str | PathLike[str], *, memory: str | int | None = None
) -> Program | None:
    """Load a decoder to be changed and written tensor by tensor, not run; None for all others.

    Parameters
    ----------
    directory_or_name, memory
        As `load` takes them.

    Raises
    ------
    CheckpointError, UsageError
        As `load` does.
    """
    path = path_of(directory_or_name, CheckpointError)
    if not (path / "config.json").is_file() or archive.is_archive(path):
        return None
    try:
        program = read_unrun(path, Placement(memory=memory_of(memory)))
    except CaptureError:
        return None
    return _within_memory(program) if program.stand_ins else None


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
    path = path_of(directory_or_name, CheckpointError)
    if not path.is_dir() or archive.is_archive(path) or not (path / "config.json").is_file():
        return load(directory_or_name)
    file = cache_file(path) if cache else None
    if file is not None and file.is_file():
        check_files(path)
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
