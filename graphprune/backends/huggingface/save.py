"""Hugging Face directories: a program becomes a checkpoint that transformers loads by itself.

A checkpoint is a config and weights; the code that makes a model of a config is transformers' own.
So a program can be written where some config gives a model of exactly its sizes that computes the
same. That config is searched for (`config_search`) and proven with the program's
own weights (`graphprune.backends.huggingface.choose_form`), before anything is written.
"""

from __future__ import annotations

from os import PathLike

import torch

from graphprune.backends.huggingface.choose_form import CheckpointForm, choose_form
from graphprune.backends.huggingface.files import write
from graphprune.errors import BackendError, UsageError
from graphprune.io.atomic import staged_directory
from graphprune.ir.program import Program

__all__ = ["CheckpointForm", "checkpoint_form", "save_pretrained"]


def checkpoint_form(program: Program) -> CheckpointForm:
    """Say how `program` can be written as a Hugging Face directory; nothing is written.

    The answer is proven: a model built from the new config and the program's weights (shared, not
    copied) gives the program's outputs on random inputs. Without weights (on the meta device) only
    the sizes are compared, and a note says so.
    """
    return choose_form(program).form


def save_pretrained(
    program: Program, directory: str | PathLike[str], *, dtype: str | torch.dtype | None = None
) -> None:
    """Write `program` as a Hugging Face directory.

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

    Raises
    ------
    BackendError
        When no config of the model's class gives such a model, saying which size or buffer is to
        blame; or when a value is too large for `dtype`.
    OutputError
        When the directory is not empty or cannot be written. Nothing is left behind.
    UsageError
        When `dtype` names no floating type.
    """
    cast = _floating(dtype)
    with staged_directory(directory) as staged, torch.no_grad():
        chosen = choose_form(program)
        if chosen.form.kind == "none":
            reason = chosen.form.reason
            raise BackendError(f"no Hugging Face checkpoint can hold this program: {reason}")
        if chosen.model is None:
            raise BackendError("the program has no weights to write: it was captured on meta")
        write(chosen.program, chosen.model, staged, cast)


def _floating(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype is {dtype!r}, which names no floating type of torch")
    return found
