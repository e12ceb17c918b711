"""Where text comes from: files, JSON lines, and data sets of the package ``datasets``.

A source is written as one of

- ``FILE``: a UTF-8 text, or JSON lines (``.jsonl``, ``.ndjson``, ``.json``) with a field ``text``;
  either may be compressed (``.gz``);
- ``FILE.jsonl:FIELD``: JSON lines with the text in another field;
- ``NAME:SPLIT:COLUMN`` or ``NAME:CONFIG:SPLIT:COLUMN``: a data set, where ``datasets`` is
  installed.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, cast

from graphprune.errors import CalibrationError, GraphPruneError, first_line

FIELD = "text"
"""The field of JSON lines that is read where none is named."""

_LINES = (".jsonl", ".ndjson", ".json")

Refusal = type[GraphPruneError]


def read_documents(
    source: str | PathLike[str], refuse: Refusal = CalibrationError, most: int | None = None
) -> list[str]:
    """The documents of a source of text, in its order: one, or one for each line or row.

    Parameters
    ----------
    source
        As the module says.
    refuse
        The class of errors to raise.
    most
        Read no further once there are so many characters; the last document is cut.

    Raises
    ------
    GraphPruneError
        Of the class `refuse`, when the source is missing, empty or not what its name says.
    """
    text = str(source)
    if not Path(source).exists():
        file, colon, field = text.rpartition(":")
        if colon and _is_lines(Path(file)):
            return _taken(_records(Path(file), field, refuse), text, most, refuse)
        if text.count(":") in (2, 3):
            return _taken(_rows(text, refuse), text, most, refuse)
    path = Path(source)
    if _is_lines(path):
        return _taken(_records(path, FIELD, refuse), text, most, refuse)
    return _taken(_whole(path, most, refuse), text, most, refuse)


def _taken(documents: Iterable[str], source: str, most: int | None, refuse: Refusal) -> list[str]:
    taken: list[str] = []
    left = most
    for document in documents:
        taken.append(document if left is None else document[:left])
        if left is not None and (left := left - len(document)) <= 0:
            break
    if not any(document.strip() for document in taken):
        raise refuse(f"{source} is empty")
    return taken


# -- files ----------------------------------------------------------------------------------------


def _is_lines(path: Path) -> bool:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return name.suffix in _LINES


def _whole(path: Path, most: int | None, refuse: Refusal) -> Iterator[str]:
    pieces: list[str] = []
    left = most
    for line in _decoded(path, refuse):
        pieces.append(line)
        if left is not None and (left := left - len(line)) <= 0:
            break
    yield "".join(pieces)


def _records(path: Path, field: str, refuse: Refusal) -> Iterator[str]:
    for number, line in enumerate(_decoded(path, refuse), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise refuse(f"{path}:{number} is not JSON: {error.msg}") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise refuse(f"{path}:{number} has no field {field!r} that holds a text")
        yield str(record[field])


def _decoded(path: Path, refuse: Refusal) -> Iterator[str]:
    """The lines of a file, with every failure in one line."""
    at = 0
    try:
        if not path.is_file():
            raise refuse(f"{path} is a directory" if path.is_dir() else f"{path} does not exist")
        with cast("BinaryIO", gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            for line in file:
                yield line.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
                at += len(line)
    except UnicodeDecodeError as error:
        byte = at + error.start
        raise refuse(f"{path} is not UTF-8: byte {byte} cannot be decoded") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise refuse(f"{path} cannot be read: {reason}") from error


# -- data sets ------------------------------------------------------------------------------------


def _rows(source: str, refuse: Refusal) -> Iterator[str]:
    """The column of a data set, row by row; it is streamed, not downloaded whole."""
    name, *config, split, column = source.split(":")
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise refuse(
            f"{source} is no file, and to read a data set the package 'datasets' is needed"
        ) from error
    try:
        rows = iter(datasets.load_dataset(name, *config, split=split, streaming=True))
        first = next(rows, None)
    except Exception as error:
        raise refuse(f"{source}: the data set cannot be read: {first_line(error)}") from error
    if first is not None and not isinstance(first.get(column), str):
        raise refuse(f"{source}: no column {column!r} holds texts; there are {', '.join(first)}")
    for row in () if first is None else itertools.chain([first], rows):
        yield row[column] or ""  # a row may lack a text
