"""The points of a sweep in a file, so that one that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graphprune.errors import OutputError
from graphprune.evaluation.sweep_result import MeasuredProgram
from graphprune.io.atomic import as_json, writing

POINTS = "points.jsonl"
"""The file: a line of JSON for each point, written as soon as it is measured."""


class Journal:
    """The points that are measured, a line of JSON for each.

    Parameters
    ----------
    folder
        Where the file is: a directory that is empty, absent, or of a sweep.

    Raises
    ------
    OutputError
        When it holds something else, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / POINTS
        with writing(folder):
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder} is a file, not a directory")
            if folder.is_dir() and not self.path.is_file() and any(folder.iterdir()):
                raise OutputError(f"{folder} is not empty, and holds no sweep: give another place")
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
            whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
            self.path.write_text(whole, encoding="utf-8")
        self.records = list(self._read(whole.splitlines()))

    def find(self, identity: Mapping[str, Any]) -> MeasuredProgram | None:
        """Return what was measured for `identity`, if it was."""
        return next(
            (
                _from_json(record["size"])
                for record in self.records
                if record["size"] is not None and record["identity"] == identity
            ),
            None,
        )

    def add(self, identity: Mapping[str, Any], size: MeasuredProgram | None, reason: str) -> None:
        """Write a point down, to the disk."""
        record = {
            "identity": dict(identity),
            "size": None if size is None else asdict(size),
            "reason": reason,
        }
        self.records.append(record)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(as_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record["size"] is not None:
                    _from_json(record["size"])
                record["identity"]["pipeline"]
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{self.path}:{number} is no point of a sweep: {error}"
                ) from error
            yield record


def _from_json(data: Mapping[str, Any]) -> MeasuredProgram:
    unbounded = {name: math.inf for name in ("loss", "perplexity") if data[name] is None}
    return MeasuredProgram(**{**data, **unbounded})
