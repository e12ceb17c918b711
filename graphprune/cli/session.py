"""What all verbs share: `--plugin`, `--quiet`, `--traceback`, progress, loading a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli.console import TRACEBACK, ask_traceback
from graphprune.cli.inputs import resolve

if TYPE_CHECKING:
    from graphprune.io.progress import DisplayFactory
    from graphprune.ir.program import Program

_PANEL = "Shared by all verbs"

_Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show no progress and no summary.", rich_help_panel=_PANEL),
]
_Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback",
        callback=ask_traceback,
        help=f"Show where an error comes from; so does {TRACEBACK}=1.",
        rich_help_panel=_PANEL,
    ),
]
_Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="A Python file with passes or criteria of one's own; may be repeated.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class Session:
    """One call of a verb.

    Parameters
    ----------
    quiet
        Whether the user asked for no progress and no summary.
    progress
        Makes progress displays; None to show none.
    """

    quiet: bool
    progress: DisplayFactory | None

    @classmethod
    def start(cls, quiet: bool) -> Session:
        """Start a session; it shows no progress on a quiet run or off a terminal."""
        from graphprune.io.progress import display_factory

        return cls(quiet, display_factory(quiet=quiet))

    def working(self, what: str) -> AbstractContextManager[Callable[[float], None]]:
        """Show a bar called `what` while a ``with`` runs."""
        from graphprune.io.progress import progress_bar

        return progress_bar(self.progress, what)

    def look(self, directory: str, *, cache: bool) -> Program:
        """Load what the command line calls `directory` without its weights, to look into it."""
        with self.working(f"looking into {directory}"):
            from graphprune.backends.load import look

            return look(resolve(directory), cache=cache)

    def load(self, directory: str) -> Program:
        """Load what the command line calls `directory`."""
        with self.working(f"loading {directory}"):
            from graphprune.backends.load import load

            return load(resolve(directory))


def verb(example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a verb of a function; `example` is a command line that its help shows."""
    return lambda function: _with_shared_flags(function, example)


def _with_shared_flags(function: Callable[..., None], example: str) -> Callable[..., None]:
    """Give a verb the flags that all share, and hand it a `Session` in their place.

    The signature that typer reads is that of `function` with ``session``, its first parameter,
    replaced by the flags.
    """
    own = [*inspect.signature(function, eval_str=True).parameters.values()][1:]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)
        for name, default, option in (
            ("plugin", None, _Plugin),
            ("quiet", False, _Quiet),
            ("traceback", False, _Traceback),
        )
    ]

    @wraps(function)
    def command(*, quiet: bool, traceback: bool, plugin: list[Path] | None, **values: Any) -> None:
        if plugin:
            from graphprune.pipeline.plugins import load_plugin

            for file in plugin:
                load_plugin(file)
        function(Session.start(quiet), **values)

    command.__dict__["__signature__"] = inspect.Signature([*own, *flags])
    command.__dict__["example"] = example
    command.__annotations__ = {each.name: each.annotation for each in (*own, *flags)}
    return command
