"""A limit of time, and how long each kind of work has taken."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from graphprune.errors import OutputError
from graphprune.io.atomic import as_json, staged_file


class Clock:
    """Says whether there is time for more work of kinds that were timed before.

    Parameters
    ----------
    limit
        Seconds from now; None for any number.
    path
        A file that keeps what kinds of work took: work whose results are found instead of done
        again takes no time, and says nothing of the work that is left.

    Raises
    ------
    OutputError
        When the file holds something else.
    """

    def __init__(self, limit: float | None, path: Path) -> None:
        self.limit = math.inf if limit is None else limit
        self._began = monotonic()
        self._path = path
        self._taken: dict[str, float] = self._read() if path.exists() else {}

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Note how long what is done takes, if that is longer than before."""
        began = monotonic()
        yield
        taken = monotonic() - began
        if taken > self.taken(kind):
            self._taken[kind] = taken
            with staged_file(self._path, overwrite=True) as file:
                file.write_text(as_json(self._taken, indent=1) + "\n", encoding="utf-8")

    def expect(self, kind: str, like: str, times: float) -> None:
        """Take one kind of work to be as long as another one, so many times."""
        self._taken[kind] = max(self.taken(kind), times * self.taken(like))

    def taken(self, kind: str) -> float:
        """Return the most seconds that a kind of work took, or is expected to take."""
        return self._taken.get(kind, 0.0)

    def has_time_for(self, *kinds: str, part: float = 1.0) -> bool:
        """Return whether each of `kinds` can be done in what is left of a part of the limit."""
        passed = monotonic() - self._began
        return passed + sum(map(self.taken, kinds)) <= part * self.limit

    def _read(self) -> dict[str, float]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(kind): float(seconds) for kind, seconds in found.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise OutputError(f"{self._path} does not say what took how long: {error}") from error
