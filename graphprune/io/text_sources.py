"""Where text comes from: files, JSON lines, and data sets of the package ``datasets``.

A source is written as one of

- ``FILE``: a UTF-8 text, or JSON lines (``.jsonl``, ``.ndjson``, ``.json``) with a field ``text``,
  or with conversations in a field ``messages``; either may be compressed (``.gz``);
- ``FILE.jsonl:FIELD``: JSON lines with the text or conversation in another field;
- ``NAME:SPLIT:COLUMN`` or ``NAME:CONFIG:SPLIT:COLUMN``: a data set, where ``datasets`` is
  installed.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, cast

from graphprune.errors import CalibrationError, GraphPruneError, first_line
from graphprune.io.paths import path_of

FIELDS = ("text", "messages")
"""The fields of JSON lines that are read where none is named: the first that a line has."""

Messages = list[dict[str, Any]]
"""A conversation: messages with a ``role`` and a ``content``, as chat templates take them."""

Document = str | Messages

_LINES = (".jsonl", ".ndjson", ".json")

ErrorClass = type[GraphPruneError]


def read_documents(
    source: str | PathLike[str], error: ErrorClass = CalibrationError, most: int | None = None
) -> list[Document]:
    """Return the documents of a source of text, in its order: one, or one for each line or row.

    Parameters
    ----------
    source
        As the module says.
    error
        The class of errors to raise.
    most
        Read no further once there are so many characters; the last document is cut.

    Raises
    ------
    GraphPruneError
        Of the class `error`, when the source is missing, empty or not what its name says.
    """
    text = str(source)
    path = path_of(source, error)
    if not path.exists():
        file, colon, field = text.rpartition(":")
        if colon and _is_lines(Path(file)):
            return _taken(_records(Path(file), (field,), error), text, most, error)
        if text.count(":") in (2, 3):
            return _taken(_rows(text, error), text, most, error)
    if _is_lines(path):
        return _taken(_records(path, FIELDS, error), text, most, error)
    return _taken(_whole(path, most, error), text, most, error)


def _taken(
    documents: Iterable[Document], source: str, most: int | None, error: ErrorClass
) -> list[Document]:
    taken: list[Document] = []
    left = most
    for document in documents:
        whole = left is None or not isinstance(document, str)
        taken.append(document if whole else document[:left])
        if left is not None and (left := left - sum(map(len, _texts(document)))) <= 0:
            break
    if not any(text.strip() for document in taken for text in _texts(document)):
        raise error(f"{source} is empty")
    return taken


def _texts(document: Document) -> Iterator[str]:
    """Yield what is said in a document."""
    if isinstance(document, str):
        yield document
        return
    for message in document:
        yield str(message.get("content") or "")


# -- files ----------------------------------------------------------------------------------------


def _is_lines(path: Path) -> bool:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return name.suffix in _LINES


def _whole(path: Path, most: int | None, error: ErrorClass) -> Iterator[str]:
    pieces: list[str] = []
    left = most
    for line in _decoded(path, error):
        pieces.append(line)
        if left is not None and (left := left - len(line)) <= 0:
            break
    yield "".join(pieces)


def _records(path: Path, fields: Sequence[str], error: ErrorClass) -> Iterator[Document]:
    for number, line in enumerate(_decoded(path, error), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as cause:
            why = f"{cause.msg.removesuffix(' at')} at column {cause.colno}"
            raise error(f"{path}:{number} is not JSON: {why}; each line is a document") from cause
        held = (record.get(field) for field in fields) if isinstance(record, dict) else ()
        found = next((each for each in held if _is_document(each)), None)
        if found is None:
            others = "".join(f", and no {each!r}" for each in fields[1:])
            raise error(f"{path}:{number} has no field {fields[0]!r} that holds a text{others}")
        if any(_is_broken(text) for text in _texts(found)):
            raise error(f"{path}:{number} holds half of a character, as \\ud800 is")
        yield found


def _is_broken(text: str) -> bool:
    """Tell whether `text` has halves of surrogate pairs, which JSON can say and UTF-8 cannot."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_document(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, dict) and "role" in each for each in value)
    return isinstance(value, str)


def _decoded(path: Path, error: ErrorClass) -> Iterator[str]:
    """Yield the lines of a file, with every failure in one line."""
    at = 0
    try:
        if not path.is_file():
            raise error(f"{path} is a directory" if path.is_dir() else f"{path} does not exist")
        with cast("BinaryIO", gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            for line in file:
                text = line.decode("utf-8")
                if "\0" in text:
                    raise error(f"{path} is no text: it holds bytes of zero")
                yield text.replace("\r\n", "\n").replace("\r", "\n")
                at += len(line)
    except UnicodeDecodeError as cause:
        byte = at + cause.start
        raise error(f"{path} is not UTF-8: byte {byte} cannot be decoded") from cause
    except (OSError, EOFError, zlib.error) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{path} cannot be read: {reason}") from cause


# -- data sets ------------------------------------------------------------------------------------


def _rows(source: str, error: ErrorClass) -> Iterator[Document]:
    """Yield the column of a data set, row by row; it is streamed, not downloaded whole."""
    name, *config, split, column = source.split(":")
    try:
        datasets: Any = import_module("datasets")
    except ImportError as cause:
        raise error(
            f"{source} is no file, and to read a data set the package 'datasets' is needed"
        ) from cause
    try:
        rows = iter(datasets.load_dataset(name, *config, split=split, streaming=True))
        first = next(rows, None)
    except Exception as cause:
        raise error(f"{source}: the data set cannot be read: {first_line(cause)}") from cause
    if first is not None and not _is_document(first.get(column)):
        raise error(f"{source}: no column {column!r} holds texts; there are {', '.join(first)}")
    for row in () if first is None else itertools.chain([first], rows):
        yield row[column] or ""  # a row may lack a text
