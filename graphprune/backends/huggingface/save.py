"""Hugging Face directories: a program becomes a checkpoint that transformers loads by itself.

A checkpoint is a config and weights; the code that makes a model of a config is transformers' own.
So a program can be written where some config gives a model of exactly its sizes that computes the
same. That config is searched for (`config_search`) and proven with the program's
own weights (`graphprune.backends.huggingface.choose_form`), before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch

from graphprune.backends.huggingface.choose_form import CheckpointForm, choose_form
from graphprune.backends.huggingface.files import write
from graphprune.errors import BackendError, UsageError
from graphprune.io.atomic import staged_directory
from graphprune.ir.program import Program
from graphprune.weights.tensors import floating_type
from graphprune.weights.writing import SHARD_SIZE, Advance

__all__ = ["CheckpointForm", "checkpoint_form", "save_pretrained"]


def checkpoint_form(program: Program) -> CheckpointForm:
    """Say how `program` can be written as a Hugging Face directory; nothing is written.

    The answer is proven: a model built from the new config and the program's weights (shared, not
    copied) gives the program's outputs on random inputs. Without weights (on the meta device) only
    the sizes are compared, and a note says so.
    """
    return choose_form(program).form


def save_pretrained(
    program: Program,
    directory: str | PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    shard_size: str | int = SHARD_SIZE,
) -> None:
    """Write `program` as a Hugging Face directory, tensor by tensor.

    Parameters
    ----------
    program
        A program captured from a transformers model.
    directory
        The directory to make; it may exist if it is empty.
    dtype
        Element type to store, such as ``float16``. By default every tensor has the type that it had
        in the checkpoint it came from, or its own where that is narrower; the config names the type
        of most of them.
    shard_size
        The most bytes of a file of weights, as a number or as "5GB".

    Raises
    ------
    BackendError
        When no config of the model's class gives such a model, saying which size or buffer is to
        blame; or when a value is too large for `dtype`.
    OutputError
        When the directory is not empty or cannot be written. Nothing is left behind.
    UsageError
        When `dtype` names no floating type, or `shard_size` is no size.
    """
    with staged_directory(directory) as staged:
        write_into(program, staged, dtype=dtype, shard_size=shard_size)


@torch.no_grad()
def write_into(
    program: Program,
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    shard_size: str | int = SHARD_SIZE,
    track: Callable[[int], Advance] | None = None,
) -> None:
    """Do what `save_pretrained` does in a folder that is there, going on where it ended.

    Files of weights that are complete are kept. `track` is told of all bytes that there are to
    write, and returns what is told of those written.
    """
    cast = _floating(dtype)
    chosen = choose_form(program)
    if chosen.form.kind == "none":
        reason = chosen.form.reason
        raise BackendError(f"no Hugging Face checkpoint can hold this program: {reason}")
    if chosen.model is None:
        raise BackendError("the program has no weights to write: it was captured on meta")
    write(chosen.program, chosen.model, folder, cast, shard_size, track)


def _floating(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    if (found := floating_type(dtype)) is None:
        raise UsageError(f"dtype is {dtype!r}, which names no floating type of torch")
    return found
