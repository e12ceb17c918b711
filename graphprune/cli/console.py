"""What verbs print: results to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 100
"""Columns of what is printed where there is no terminal."""

TRACEBACK = "GRAPHPRUNE_TRACEBACK"
"""The environment variable that asks for tracebacks of errors."""


def console() -> Console:
    """Return the console of standard output.

    Where that is no terminal it has the width that ``COLUMNS`` says, or else a fixed one.
    """
    from rich.console import Console

    found = Console(highlight=False)
    known = found.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
    return found if known else Console(highlight=False, width=WIDTH)


def show(what: RenderableType) -> None:
    """Print a table, or anything else that rich can print."""
    console().print(what)


def note(text: str) -> None:
    """Print one line to standard error."""
    print(f"graphprune: {' '.join(text.split())}", file=sys.stderr)


def ask_traceback(asked: bool) -> None:
    """Ask for tracebacks of errors, in this process and those that it starts."""
    if asked:
        os.environ[TRACEBACK] = "1"


def wants_traceback() -> bool:
    """Return whether tracebacks of errors are asked for."""
    return os.environ.get(TRACEBACK, "") not in ("", "0")
