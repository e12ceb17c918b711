"""The command line: ``graphprune VERB``.

Exit status 0; 1 when something is refused or fails, with one line on standard error; 2 when the
command line itself makes no sense. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Annotated, NoReturn

import typer

from graphprune import ranks
from graphprune.cli.console import note, wants_traceback
from graphprune.cli.verbs import (
    apply,
    compare,
    compress,
    evaluate,
    generate,
    inspect,
    listing,
    run,
    trim_vocabulary,
)
from graphprune.errors import GraphPruneError
from graphprune.io.atomic import NO_ROOM
from graphprune.io.version import __version__

_TOLD = "told to end, perhaps because another of the processes has ended"

INTERRUPTED = 130
"""Exit status after Ctrl-C, by the custom of shells."""

app = typer.Typer(
    name="graphprune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes neural networks smaller: a checkpoint goes in, a smaller verified one comes out.",
)

for _title, _verbs in {
    "Look into a model": (inspect.inspect, inspect.explain, inspect.page, inspect.plot),
    "Make it smaller": (
        compress.compress,
        run.run,
        apply.apply,
        compare.verify,
        compare.diff,
        trim_vocabulary.trim_vocabulary,
    ),
    "Measure": (evaluate.evaluate, evaluate.sensitivity, evaluate.sweep, generate.generate),
    "List": (listing.passes, listing.operators),
}.items():
    for _verb in _verbs:
        # A dimension such as -1 is no option.
        _settings = {"ignore_unknown_options": _verb is inspect.explain}
        _example = f"Example: {vars(_verb)['example']}"
        app.command(rich_help_panel=_title, context_settings=_settings, epilog=_example)(_verb)


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        with ranks.joined(sys.argv[1:]), _first_prints():
            app(prog_name="graphprune")
    except GraphPruneError as error:
        _fail(error, str(error))
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as status:
        if status.code == INTERRUPTED:  # typer swallows the interrupt and says nothing
            _interrupted()
        if status.code == ranks.TERMINATED and ranks.speaks():
            note(_TOLD)
        raise
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is not None:
            _internal(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or what is left is written at the end
        _fail(error, f"what it prints cannot be written: {error.strerror}")
    except Exception as error:  # noqa: BLE001 - whatever else it is, a user gets one line
        _internal(error)


def _internal(error: Exception) -> NoReturn:
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    _fail(error, f"internal error, please report it: {reason} (--traceback shows where)")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"graphprune {__version__}")
        raise typer.Exit


@app.callback()
def prepare(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Make neural networks smaller: a checkpoint goes in, a smaller verified one comes out."""
    # Read when transformers and its tokenizers are imported, which a verb does later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not wants_traceback():
        logging.getLogger("torch").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


@contextmanager
def _first_prints() -> Iterator[None]:
    """Let the first of several processes print, and no other."""
    if ranks.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _fail(error: BaseException, message: str) -> NoReturn:
    if wants_traceback():
        raise error
    if ranks.speaks():
        note(_TOLD if ranks.told_to_end() else message)
    sys.exit(1)


def _interrupted() -> None:
    if ranks.speaks():
        note("interrupted")
    sys.exit(INTERRUPTED)
