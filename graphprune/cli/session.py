"""What all verbs share: `--plugin`, `--quiet`, `--traceback`, progress, loading a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune import ranks
from graphprune.cli.console import TRACEBACK, ask_traceback, note
from graphprune.cli.inputs import resolve
from graphprune.cli.options import LoadOptions
from graphprune.errors import UsageError

if TYPE_CHECKING:
    from graphprune.io.progress import DisplayFactory
    from graphprune.ir.program import Program

_NAMED = inspect.Parameter.KEYWORD_ONLY
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

    def load(self, directory: str, options: LoadOptions | None = None) -> Program:
        """Load what the command line calls `directory`."""
        given = options or LoadOptions()
        with self.working(f"loading {directory}"):
            from graphprune.backends.load import load

            program = load(
                resolve(directory),
                dtype=str(given.compute_dtype),
                device=given.device,
                memory=given.memory,
            )
        self._warn(directory, program)
        return program

    def load_to_write(self, directory: str, options: LoadOptions, *, runs: bool) -> Program:
        """Load what is to be changed and written, to be run as well where `runs` is said.

        Raises
        ------
        CheckpointError
            When what lies beside its weights, and goes along, cannot be read.
        """
        from graphprune.io.companions import check_companions

        check_companions(Path(resolve(directory)))
        if not runs and options.device is None and options.compute_dtype == "auto":
            with self.working(f"looking into {directory}"):
                from graphprune.backends.load import load_unrun

                unrun = load_unrun(resolve(directory), memory=options.memory)
            if unrun is not None:
                self._warn(directory, unrun)
                return unrun
        return self.load(directory, options)

    def _warn(self, directory: str, program: Program) -> None:
        """Say what of a directory is not used."""
        for each in program.notes:
            if each.kind == "unread-weights":
                note(f"{directory}: {each}")

    def writing(self, total: int) -> Callable[[int], object]:
        """Show a bar for so many bytes to write; returns what is told of those that are written.

        The bar counts megabytes, and is gone when all are written.
        """
        from graphprune.io.progress import progress_bar

        stack = ExitStack()
        bar = progress_bar(self.progress, "writing megabytes", max(total // 10**6, 1))
        tell = stack.enter_context(bar)
        left = total

        def advance(count: int) -> None:
            nonlocal left
            left -= count
            tell(count / 10**6)
            if left <= 0:
                stack.close()

        return advance


def verb(
    example: str, *, divided: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a verb of a function; `example` is a command line that its help shows.

    One that is not `divided` refuses to be done by several processes.

    The function takes a `Session`, then its arguments and options. A parameter whose class is a
    dataclass, such as `CalibrationOptions`, stands for the options that its fields are; two such
    classes may have options in common.
    """
    return lambda function: _command(function, example, divided)


def _command(function: Callable[..., None], example: str, divided: bool) -> Callable[..., None]:
    """Return what typer reads: a function of single options, with the flags that verbs share."""
    _, *taken = _parameters(function).values()
    records: dict[str, type] = {
        each.name: each.annotation
        for each in taken
        if isinstance(each.annotation, type) and is_dataclass(each.annotation)
    }
    fields = {name: _parameters(record) for name, record in records.items()}
    options: dict[str, inspect.Parameter] = {}
    for each in taken:
        options |= fields.get(each.name, {each.name: each})
    flags = [
        inspect.Parameter(name, _NAMED, default=default, annotation=option)
        for name, default, option in (
            ("plugin", None, _Plugin),
            ("quiet", False, _Quiet),
            ("traceback", False, _Traceback),
        )
    ]

    parameters = [*(each.replace(kind=_NAMED) for each in options.values()), *flags]
    single = {each.name for each in taken} - set(records)

    @wraps(function)
    def command(*, quiet: bool, traceback: bool, plugin: list[Path] | None, **values: Any) -> None:
        if ranks.size() > 1 and not divided:
            raise UsageError(f"{function.__name__} is not divided: start it without torchrun")
        if plugin:
            from graphprune.pipeline.plugins import load_plugin

            for file in plugin:
                load_plugin(file)
        given = {name: value for name, value in values.items() if name in single}
        for name, record in records.items():
            given[name] = record(**{field: values[field] for field in fields[name]})
        function(Session.start(quiet), **given)

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__dict__["example"] = example
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function, eval_str=True).parameters)
