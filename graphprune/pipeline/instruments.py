"""Instruments: objects that watch a pipeline run, pass by pass, and change nothing."""

from __future__ import annotations

import fnmatch
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.pipeline.pass_base import Context, Outcome, Pass

if TYPE_CHECKING:
    from rich.console import Console

    from graphprune.ir.program import Program


@dataclass(frozen=True)
class PassPosition:
    """The position of a pass in a pipeline.

    Parameters
    ----------
    number
        Counts from 1.
    pass_
        The pass.
    pipeline
        All passes of the pipeline.
    """

    number: int
    pass_: Pass
    pipeline: tuple[Pass, ...]

    def __str__(self) -> str:
        return f"pass {self.number} ({self.pass_.name})"


class Instrument:
    """Base of all instruments; each method does nothing unless it is overridden."""

    def before_pass(self, position: PassPosition, program: Program, context: Context) -> None:
        """Look at the program that goes into a pass."""

    def after_pass(self, position: PassPosition, outcome: Outcome, context: Context) -> None:
        """Look at what a pass made; `context.plan_so_far` includes its plan."""

    def on_error(self, position: PassPosition, error: Exception) -> None:
        """Look at the error that ends the run."""


@dataclass(frozen=True)
class VerifyEach(Instrument):
    """Verify the program against the original after every pass that changed sizes.

    Parameters
    ----------
    tolerance
        The largest relative error allowed; None for the verifier's own.
    """

    tolerance: float | None = None

    def after_pass(self, position: PassPosition, outcome: Outcome, context: Context) -> None:
        """Raise `VerificationError` when the program is not what its plan says."""
        resized = outcome.plan is not None and outcome.plan.steps
        if outcome.baseline is None and (outcome.edited or not resized):
            return  # nothing new, or new values that later passes are compared with
        from graphprune.verification.verify import verify

        with context.bar(f"verifying {position}"):
            verify(*context.since_baseline(), outcome.program, tolerance=self.tolerance)


@dataclass(frozen=True)
class PrintProgram(Instrument):
    """Print the program before and after the passes whose names match.

    Parameters
    ----------
    before, after
        Names of passes, or globs such as ``*``.
    console
        Where to; standard error by default.
    """

    before: Sequence[str] = ()
    after: Sequence[str] = ()
    console: Console | None = None

    def before_pass(self, position: PassPosition, program: Program, context: Context) -> None:
        """Print `program` if the pass is among `before`."""
        if _matches(position, self.before):
            self._print(f"before {position}", program)

    def after_pass(self, position: PassPosition, outcome: Outcome, context: Context) -> None:
        """Print the new program if the pass is among `after`."""
        if _matches(position, self.after):
            self._print(f"after {position}", outcome.program)

    def _print(self, title: str, program: Program) -> None:
        from rich.console import Console

        from graphprune.ir.printer import program_text

        console = self.console or Console(stderr=True)
        console.print(f"// {title}", program_text(program), sep="\n", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Dump(Instrument):
    """Write the program after each pass to ``003_prune.txt``, and a reproducer of a failure.

    Parameters
    ----------
    directory
        The folder; made when it is missing.
    """

    directory: Path

    def before_pass(self, position: PassPosition, program: Program, context: Context) -> None:
        """Write the original program to ``000_input.txt``."""
        if program is context.original:
            self._write_program("000_input.txt", program)

    def after_pass(self, position: PassPosition, outcome: Outcome, context: Context) -> None:
        """Write what the pass made."""
        name = f"{position.number:03d}_{position.pass_.name}.txt"
        self._write_program(name, outcome.program)

    def on_error(self, position: PassPosition, error: Exception) -> None:
        """Write the pipeline up to the failure and the traceback to ``failure.txt``."""
        upto = ",".join(map(str, position.pipeline[: position.number]))
        trace = "".join(traceback.format_exception(error))
        self._write("failure.txt", f"// {position}\n{upto}\n\n{trace}")

    def _write_program(self, name: str, program: Program) -> None:
        from graphprune.ir.printer import program_text

        self._write(name, program_text(program))

    def _write(self, name: str, text: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_text(text.rstrip() + "\n", encoding="utf-8")


def _matches(position: PassPosition, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(position.pass_.name, pattern) for pattern in patterns)
