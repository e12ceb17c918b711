"""What was measured, in a file, so that work that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from graphprune.errors import OutputError
from graphprune.io.atomic import as_json, writing

POINTS = "points.jsonl"
"""The file: a line of JSON for each point, written as soon as it is measured."""


Measured = TypeVar("Measured")
"""A dataclass: what is known of a point."""


class Journal(Generic[Measured]):
    """The points that are measured, a line of JSON for each.

    Parameters
    ----------
    folder
        Where the file is: a directory that is empty, absent, or of the same kind of work.
    work
        What that is called, such as "sweep".
    read
        Makes what is known of a point of the fields that were written.

    Raises
    ------
    OutputError
        When it holds something else, or cannot be written.
    """

    def __init__(
        self, folder: Path, work: str, read: Callable[[Mapping[str, Any]], Measured]
    ) -> None:
        self.folder, self.path = folder, folder / POINTS
        self.work, self.read = work, read
        with writing(folder):
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder} is a file, not a directory")
            if folder.is_dir() and not self.path.is_file() and any(folder.iterdir()):
                raise OutputError(f"{folder} is not empty, and holds no {work}: give another place")
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
            whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
            self.path.write_text(whole, encoding="utf-8")
        self.records = list(self._records(whole.splitlines()))

    def find(self, identity: Mapping[str, Any]) -> Measured | None:
        """Return what was measured for `identity`, if it was."""
        return next(
            (
                self.read(record["size"])
                for record in self.records
                if record["size"] is not None and record["identity"] == identity
            ),
            None,
        )

    def add(self, identity: Mapping[str, Any], size: Measured | None, reason: str) -> None:
        """Write a point down, to the disk; a field that is None is left out."""
        record = {
            "identity": dict(identity),
            "size": None if size is None else _known(size),
            "reason": reason,
        }
        self.records.append(record)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(as_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _records(self, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record["size"] is not None:
                    self.read(record["size"])
                record["identity"]["pipeline"]
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{self.path}:{number} is no point of a {self.work}: {error}"
                ) from error
            yield record


def _known(size: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(size).items() if value is not None}
