"""Files that are what their name says: neither empty nor left as a pointer to what was not got."""

from __future__ import annotations

from pathlib import Path

from graphprune.errors import GraphPruneError

_POINTER = b"version https://git-lfs.github.com/"
"""What a file of Git LFS begins with."""


def refuse_stand_in(file: Path, error: type[GraphPruneError]) -> None:
    """Refuse an empty file, and a pointer that Git LFS left in the place of the file itself.

    Raises
    ------
    GraphPruneError
        Of the class `error`, naming the file.
    """
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER))
    if not start:
        raise error(f"{file} is empty")
    if start == _POINTER:
        raise error(f"{file} is a pointer of Git LFS, not the file itself: get it by git lfs pull")
