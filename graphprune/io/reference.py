"""Where the packaged reference checkpoint and its texts lie.

A small Llama and its tokenizer come with the package, so that every command has something real to
work on without a download; the held-out text was not trained on, the calibration text was.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from graphprune.errors import CheckpointError

NAME = "reference"
"""What the command line calls the packaged checkpoint."""


def checkpoint_dir() -> Path:
    """Return the packaged checkpoint, a Hugging Face directory.

    Raises
    ------
    CheckpointError
        When this installation lacks it.
    """
    return _packaged("reference")


def heldout_text() -> Path:
    """Return text that the packaged checkpoint was not trained on.

    Raises
    ------
    CheckpointError
        When this installation lacks it.
    """
    return _packaged("heldout.txt")


def calibration_text() -> Path:
    """Return text to calibrate the packaged checkpoint with.

    Raises
    ------
    CheckpointError
        When this installation lacks it.
    """
    return _packaged("calibration.txt")


def _packaged(name: str) -> Path:
    path = Path(str(files("graphprune") / "data" / name))
    if not path.exists():
        raise CheckpointError(f"this installation of graphprune lacks {path}")
    return path
