"""The command line in this process: what a verb printed, and how it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

TEXT = "".join(f"line {number} of a text that is long enough\n" for number in range(60))
PRUNE = "prune{target=ffn ratio=0.25 criterion=magnitude}"


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


def assert_refused(done: Done, *words: str) -> None:
    assert done.status == 1, done
    assert done.err.startswith("graphprune: ")
    assert done.err.count("\n") == 1, done.err
    for word in words:
        assert word in done.err
