"""The command line in this process: what a verb printed, and how it is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from graphprune.backends import load as loading
from graphprune.cli import console
from graphprune.cli import main as cli

TEXT = "".join(f"line {number} of a text that is long enough\n" for number in range(60))
PRUNE = "prune{target=ffn ratio=0.25 criterion=magnitude}"

_USUAL = {"dtype": "auto", "device": None, "memory": None}
_loaded: dict[str, Any] = {}
"""Programs by directory. They are never edited, and capturing one takes most of a verb's time."""


class Done(NamedTuple):
    status: int
    out: str
    err: str
    error: BaseException | None


Run = Callable[..., Done]


def command_line(monkeypatch: pytest.MonkeyPatch, capture: Any, checkpoint: Path) -> Run:
    """Return what runs a verb as a shell would; `checkpoint` is loaded once for all tests."""
    load, fail, seen = loading.load, cli._fail, []

    def remember(directory: str, **options: Any) -> Any:
        if Path(directory) != checkpoint or options != _USUAL:
            return load(directory, **options)
        if directory not in _loaded:
            _loaded[directory] = load(directory, **options)
        return _loaded[directory]

    def note(error: BaseException, message: str) -> None:
        seen.append(error)
        fail(error, message)

    monkeypatch.setattr(loading, "load", remember)
    monkeypatch.setattr(cli, "_fail", note)
    monkeypatch.setenv(console.TRACEBACK, "")  # and back, whatever a command line sets
    for name in (
        "TRANSFORMERS_VERBOSITY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TOKENIZERS_PARALLELISM",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "1" if "HUB" in name else "error"))

    def invoke(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["graphprune", *map(str, arguments)])
        capture.readouterr()
        seen.clear()
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return Done(status, *capture.readouterr(), seen[-1] if seen else None)

    return invoke


def assert_refused(done: Done, *words: str) -> None:
    assert done.status == 1, done
    assert done.err.startswith("graphprune: ")
    assert done.err.count("\n") == 1, done.err
    for word in words:
        assert word in done.err
