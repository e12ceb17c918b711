"""Verbs that write a smaller model: `run`, `apply`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.console import note, show
from graphprune.cli.inputs import read_calibration, read_pipeline, read_plan
from graphprune.cli.options import (
    CALIBRATION,
    CalibrationLength,
    CalibrationText,
    Checkpoint,
    Output,
    PlanFile,
    Samples,
    Seed,
    TokenizerDirectory,
)
from graphprune.cli.session import Session, verb
from graphprune.pipeline.instruments import Instrument, PassPosition

if TYPE_CHECKING:
    from graphprune.ir.program import Program
    from graphprune.pipeline.pass_base import Context, Outcome
    from graphprune.plan.plan import Plan

_WATCHING = "Watching the passes"

_KINDS = {
    "plain": "a Hugging Face checkpoint",
    "remote-code": "a Hugging Face checkpoint that needs trust_remote_code=True",
    "none": "an archive that graphprune.load reads, since no Hugging Face checkpoint can hold it",
}
"""How the result of a pipeline is written, by `CheckpointForm.kind`."""


@verb
def run(
    session: Session,
    directory: Checkpoint,
    passes: Annotated[
        str,
        typer.Option(
            help="A pipeline such as 'prune{target=ffn ratio=0.25},verify', or a .yaml file."
        ),
    ],
    output: Output,
    calibration: CalibrationText = None,
    samples: Samples = 10,
    calibration_length: CalibrationLength = 64,
    length: Annotated[
        int | None,
        typer.Option(
            help="The old name of --calibration-length.",
            min=1,
            hidden=True,
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    tokenizer: TokenizerDirectory = None,
    seed: Seed = 0,
    verify_each: Annotated[
        bool,
        typer.Option(
            "--verify-each",
            help="Verify after every pass that changes sizes.",
            rich_help_panel=_WATCHING,
        ),
    ] = False,
    print_after: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS",
            help="Print the graph after these passes; may be repeated.",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
    stop_after: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Run only the first N passes that change.",
            min=0,
            rich_help_panel=_WATCHING,
        ),
    ] = None,
) -> None:
    """Run a pipeline: write a smaller checkpoint, its plan and a report."""
    from graphprune.io.atomic import staged_directory

    if length is not None:
        note("--length of calibration text is called --calibration-length")
        calibration_length = length
    pipeline = read_pipeline(passes)
    with staged_directory(output) as folder, ExitStack() as stack:
        program = session.load(directory)
        result = pipeline.run(
            program,
            calibration=read_calibration(
                [pipeline], directory, calibration, tokenizer, samples, calibration_length, seed
            ),
            output=folder,
            seed=seed,
            verify_each=verify_each,
            print_after=tuple(print_after or ()),
            stop_after=stop_after,
            instruments=[_Spinner(session, stack)],
            quiet=session.progress is None,
        )
        kind = _write(session, result.program, result.plan, folder)
        report = result.report.to_json().replace(f"{folder}{os.sep}", "")
        (folder / "report.json").write_text(report, encoding="utf-8")
    if not session.quiet:
        show(result.report)
        print(f"{output}: {kind}")


@verb
def apply(session: Session, directory: Checkpoint, plan: PlanFile, output: Output) -> None:
    """Apply a plan to a fresh copy of the model that it was made for."""
    from graphprune.io.atomic import staged_directory
    from graphprune.transforms.apply import apply_plan

    chosen = read_plan(plan)
    with staged_directory(output) as folder:
        program = session.load(directory)
        with session.working("applying the plan"):
            smaller = apply_plan(program, chosen)
        kind = _write(session, smaller, chosen, folder)
    if not session.quiet:
        print(f"{output}: {kind}")


class _Spinner(Instrument):
    """Shows which pass runs; an interrupt ends that with `stack`."""

    def __init__(self, session: Session, stack: ExitStack) -> None:
        self.session = session
        self.stack = stack

    def before_pass(self, position: PassPosition, program: Program, context: Context) -> None:
        self.stack.enter_context(self.session.working(str(position)))

    def after_pass(self, position: PassPosition, outcome: Outcome, context: Context) -> None:
        self.stack.close()

    def on_error(self, position: PassPosition, error: Exception) -> None:
        self.stack.close()


def _write(session: Session, program: Program, plan: Plan, folder: Path) -> str:
    """Write checkpoint and plan into `folder`; return what kind of checkpoint it became."""
    from graphprune.backends.huggingface.save import checkpoint_form

    with session.working("looking for a config"):
        found = checkpoint_form(program)
    kind = _KINDS[found.kind]
    if found.kind != "plain":
        note(f"writing {kind}: {found.reason}")
    # In a directory of its own first, since passes may have written into `folder` already.
    inner = folder / ".checkpoint"
    with session.working("writing the checkpoint"):
        program.save(inner) if found.kind == "none" else program.save_pretrained(inner)
    for path in sorted(inner.iterdir()):
        path.rename(folder / path.name)
    inner.rmdir()
    plan.save(folder / "plan.json")
    return kind
