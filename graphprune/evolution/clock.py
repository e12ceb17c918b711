"""A limit of time, and how long each kind of work has taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic


class Clock:
    """Says whether there is time for more work of kinds that were timed before.

    Parameters
    ----------
    limit
        Seconds from now; None for any number.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = math.inf if limit is None else limit
        self._began = monotonic()
        self._taken: dict[str, float] = {}

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Note how long what is done takes, if that is longer than before."""
        began = monotonic()
        yield
        self._taken[kind] = max(self._taken.get(kind, 0.0), monotonic() - began)

    def expect(self, kind: str, like: str, times: float) -> None:
        """Take one kind of work to be as long as another one, so many times."""
        self._taken[kind] = max(self._taken.get(kind, 0.0), times * self._taken[like])

    def taken(self, kind: str) -> float:
        """Return the most seconds that a kind of work took, or is expected to take."""
        return self._taken.get(kind, 0.0)

    def has_time_for(self, *kinds: str, part: float = 1.0) -> bool:
        """Return whether each of `kinds` can be done in what is left of a part of the limit."""
        passed = monotonic() - self._began
        return passed + sum(map(self.taken, kinds)) <= part * self.limit
