"""Outputs that are complete or absent: written beside their place, then renamed into it.

Where several processes do one work, the first one writes; what others write is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graphprune import ranks
from graphprune.errors import GraphPruneError, OutputError
from graphprune.io.paths import path_of

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Failures of the place rather than of whoever writes to it."""

_PROBE = 1 << 16
"""Bytes that a disk has room for, unless it is full."""


@contextmanager
def staged_directory(
    path: str | os.PathLike[str], *, replaces: str | None = None, key: str = ""
) -> Iterator[Path]:
    """Make a directory to write into, which becomes `path` when the ``with`` ends well.

    Missing parents are made. After a failure, an interrupt included, nothing is left: neither what
    was written nor a parent that was made for it.

    Parameters
    ----------
    path
        The directory to make; it may exist if it is empty.
    replaces
        The name of a file by which a directory that may be replaced is known. It is replaced whole,
        when the ``with`` ends well.
    key
        Tells one piece of work from another: what a killed process left of the same work is there
        again. Without it, work starts anew.

    Yields
    ------
    Path
        The directory to write into meanwhile.

    Raises
    ------
    OutputError
        When `path` is a file, is not empty or cannot be made, or the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with staged_directory(f"{folder}/out") as staged:
    ...         _ = (staged / "report.json").write_text("{}")
    ...     print(*(entry.name for entry in Path(folder, "out").iterdir()))
    report.json
    """
    if not ranks.is_first():
        with TemporaryDirectory() as folder:
            yield Path(folder)
        return
    target = Path(os.path.realpath(path_of(path, OutputError)))
    with writing(path):
        if target.exists() and not target.is_dir():
            raise OutputError(f"{path} is a file, not a directory")
        existed = target.is_dir()
        old = sorted(target.iterdir()) if existed else []
        if old and replaces is None:
            raise OutputError(f"{path} is not empty: give another place, or empty it first")
        if old and not (target / str(replaces)).is_file():
            raise OutputError(f"{path} holds no {replaces}: what is in it is not overwritten")
    # An empty directory may be a mount point or somebody's current directory: it stays.
    with _staged(path, target if existed else target.parent, target.name, key) as staged:
        with _disk_full(path, staged):
            yield staged
        with writing(path):
            if existed:
                made = sorted(staged.iterdir())
                with _set_aside(old, staged):
                    _move_up(staged, target, made, overwrite=False)
            else:
                os.rename(staged, target)


@contextmanager
def staged_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Name a file to write, which becomes `path` when the ``with`` ends well.

    What is written beside it, such as external data that it refers to by name, goes along. Missing
    parents are made, and are gone again after a failure.

    Parameters
    ----------
    path
        The file to make.
    overwrite
        Whether it may replace a file.

    Yields
    ------
    Path
        The file to write meanwhile, of the same name and alone in its directory.

    Raises
    ------
    OutputError
        When `path` exists or cannot be made, nothing was written, or the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with staged_file(f"{folder}/plan.json") as staged:
    ...         _ = staged.write_text("{}")
    ...     print(Path(folder, "plan.json").read_text())
    {}
    """
    target = Path(os.path.realpath(path_of(path, OutputError)))
    if not ranks.is_first():
        with TemporaryDirectory() as folder:
            yield Path(folder, target.name)
        return
    with writing(path):
        if target.is_dir():
            raise OutputError(f"{path} is a directory, not a file")
        if target.exists() and not overwrite:
            raise OutputError(f"{path} exists already")
    with _staged(path, target.parent, target.name) as staged:
        with _disk_full(path, staged):
            yield staged / target.name
        with writing(path):
            if not (staged / target.name).is_file():
                raise OutputError(f"nothing was written to {path}")
            # The file itself comes last: whoever sees it finds what it refers to.
            entries = sorted(staged.iterdir(), key=lambda entry: (entry.name == target.name, entry))
            _move_up(staged, target.parent, entries, overwrite)


def as_json(data: Any, indent: int | None = None) -> str:
    """Return `data` as JSON text, with null for a number that is not finite.

    JSON has no such numbers.

    Examples
    --------
    >>> as_json({"perplexity": float("inf"), "sizes": (1, 2)})
    '{"perplexity": null, "sizes": [1, 2]}'
    """
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


@contextmanager
def _staged(path: str | os.PathLike[str], parent: Path, name: str, key: str = "") -> Iterator[Path]:
    """Make a hidden directory in `parent`, which is made where it is missing; gone afterwards.

    After a failure so are the parents that were made for it.
    """
    made: list[Path] = []
    try:
        with writing(path):
            _make_parents(parent, made)
            staged = parent / f".{name}.{key or secrets.token_hex(4)}.partial"
            staged.mkdir(exist_ok=bool(key))
        try:
            yield staged
        finally:
            with ranks.undisturbed():
                shutil.rmtree(staged, ignore_errors=True)
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make `folder` and the directories above it, noting in `made` which were missing."""
    if folder.is_dir():
        return
    _make_parents(folder.parent, made)
    folder.mkdir()
    made.append(folder)


@contextmanager
def _set_aside(entries: list[Path], staged: Path) -> Iterator[None]:
    """Move `entries` below `staged`, which is dropped later; after a failure they come back."""
    aside = staged / f".{secrets.token_hex(4)}.old"
    aside.mkdir()
    moved: list[Path] = []
    try:
        for entry in entries:
            os.replace(entry, aside / entry.name)
            moved.append(entry)
        yield
    except BaseException:
        for entry in moved:
            with contextlib.suppress(OSError):
                os.replace(aside / entry.name, entry)
        raise


def _move_up(staged: Path, parent: Path, entries: list[Path], overwrite: bool) -> None:
    """Move `entries` out of `staged` into `parent`: all of them, or none."""
    clash = [entry.name for entry in entries if os.path.lexists(parent / entry.name)]
    if clash and not overwrite:
        raise OutputError(f"{parent / clash[0]} exists already")
    moved: list[Path] = []
    try:
        for entry in entries:
            os.replace(entry, parent / entry.name)
            moved.append(parent / entry.name)
    except BaseException:
        for entry in moved:
            with contextlib.suppress(OSError):
                os.replace(entry, staged / entry.name)
        raise


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any failure of the file system within a ``with`` into one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _disk_full(path: str | os.PathLike[str], staged: Path) -> Iterator[None]:
    """Turn what befalls whoever writes, through no fault of their own, into one line.

    Writers that are not Python's own may raise anything, which need not say that a disk is full.
    """
    try:
        yield
    except GraphPruneError:
        raise
    except Exception as error:
        full = error if isinstance(error, OSError) else _failure_of_probe(staged)
        if full is None or full.errno not in NO_ROOM:
            raise
        raise OutputError(f"{path} cannot be written: {full.strerror}") from error


def _failure_of_probe(folder: Path) -> OSError | None:
    """Return why a little more cannot be written into `folder`; None where it can."""
    try:
        (folder / ".room").write_bytes(bytes(_PROBE))
    except OSError as error:
        return error
    return None
