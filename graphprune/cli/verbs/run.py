"""`run`: passes over a model, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune import ranks
from graphprune.cli.console import note, show
from graphprune.cli.inputs import (
    in_form,
    read_calibration,
    read_pipeline,
    refuse_uncalibrated,
    require_text,
)
from graphprune.cli.options import (
    CALIBRATION,
    RESULT,
    AsJson,
    CalibrationOptions,
    Checkpoint,
    Form,
    LoadToWriteOptions,
    Output,
    Overwrite,
    PlainForm,
    Seed,
    ShardSize,
    StoredType,
)
from graphprune.cli.session import Session, verb
from graphprune.cli.summary import summary_of
from graphprune.cli.writing import (
    KINDS,
    REPORT,
    destination,
    form_of,
    note_large_edits,
    note_other_sizes,
    writable,
    write,
)
from graphprune.errors import CalibrationError
from graphprune.io import reference
from graphprune.pipeline.instruments import Instrument, PassPosition

if TYPE_CHECKING:
    from graphprune.backends.huggingface.save import CheckpointForm
    from graphprune.ir.program import Program
    from graphprune.pipeline.pass_base import Context, Outcome
    from graphprune.pipeline.pass_manager import Result

_WATCHING = "Watching the passes"


@verb(
    "graphprune run DIR --passes 'prune{target=ffn ratio=0.25},verify' "
    "--calibration text.txt -o OUT",
    divided=True,
)
def run(
    session: Session,
    directory: Checkpoint,
    passes: Annotated[
        str,
        typer.Option(
            help="A pipeline such as 'prune{target=ffn ratio=0.25},verify', or a .yaml file."
        ),
    ],
    *,
    loading: LoadToWriteOptions,
    output: Output = None,
    overwrite: Overwrite = False,
    form: PlainForm = Form.any,
    dtype: StoredType = None,
    shard_size: ShardSize = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the plan and what it saves, and write nothing; passes after it are left "
            "out.",
            rich_help_panel=RESULT,
        ),
    ] = False,
    as_json: AsJson = False,
    calibration: CalibrationOptions,
    length: Annotated[
        int | None,
        typer.Option(
            help="The old name of --calibration-length.",
            min=1,
            hidden=True,
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
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
    """Run a pipeline: write a smaller checkpoint, its plan and a report.

    Several processes divide the data: torchrun --nproc-per-node=N -m graphprune run ...
    """
    if length is not None:
        note("--length of calibration text is called --calibration-length")
        calibration = dataclasses.replace(calibration, calibration_length=length)
    if output is None and not dry_run:
        raise typer.BadParameter("give --output, or --dry-run to write nothing")
    pipeline = in_form(read_pipeline(passes), form)
    require_text(calibration.calibration, CalibrationError)
    refuse_uncalibrated(pipeline, calibration, directory)
    whole = pipeline  # what is looked at before sizes are decided is as much as in a real run
    if dry_run:
        output, pipeline = None, pipeline.resizing()
    with destination(output, directory, overwrite=overwrite) as folder, ExitStack() as stack:
        runs = verify_each or calibration.calibration is not None or directory == reference.NAME
        runs = runs or any(each.runs_program for each in pipeline.passes)
        program = session.load_to_write(directory, loading, runs=runs)
        data, fitted = read_calibration(calibration, [whole], program, directory, seed)
        result = pipeline.run(
            program,
            calibration=fitted,
            output=folder,
            seed=seed,
            verify_each=verify_each,
            print_after=tuple(print_after or ()),
            stop_after=stop_after,
            instruments=[_Spinner(session, stack), _FormFirst(session, form)],
            quiet=session.progress is None,
        )
        if not ranks.is_first():
            return
        stack.enter_context(ranks.alone())
        program, smaller = writable(
            session, program, result.program, directory, loading, result.plan
        )
        result = dataclasses.replace(result, program=smaller)
        note_other_sizes(result.report)
        found = form_of(session, result.program, form)
        if output is None:
            ran = set(map(id, pipeline.passes))
            left = (str(each) for each in whole.passes if id(each) not in ran)
            skipped = (*result.report.skipped, *left)
            report = dataclasses.replace(result.report, pipeline=str(whole), skipped=skipped)
            _show_plan(session, dataclasses.replace(result, report=report), found, as_json)
            return
        files = write(session, result.program, result.plan, folder, found, dtype, shard_size)
        note_large_edits(folder, result.plan)
        summary = summary_of(session, program, result, folder, found, data, fitted, files)
        report = dataclasses.replace(result.report, summary=summary.to_dict())
        written = report.to_json().replace(f"{folder}{os.sep}", "")
        (folder / REPORT).write_text(written, encoding="utf-8")
    if session.quiet:
        return
    if as_json:
        print(written)
        return
    show(report)
    show(summary)
    for line in summary.lines():
        print(line)
    names = (name for names in summary.written.values() for name in names)
    print(f"{output}: {KINDS[found.kind]}: {', '.join(names)}")


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


class _FormFirst(Instrument):
    """Says what kind of checkpoint it will be as soon as sizes are final, if more work follows."""

    def __init__(self, session: Session, form: Form) -> None:
        self.session = session
        self.form = form

    def after_pass(self, position: PassPosition, outcome: Outcome, context: Context) -> None:
        later = [each for each in position.pipeline[position.number :] if not each.required]
        if position.pass_.resizes and later and not any(each.resizes for each in later):
            form_of(self.session, outcome.program, self.form)


def _show_plan(session: Session, result: Result, form: CheckpointForm, as_json: bool) -> None:
    """Show what a dry run found."""
    if as_json:
        data = json.loads(result.report.to_json())
        del data["summary"]  # of what is written
        print(json.dumps({**data, "plan": json.loads(result.plan.to_json()), "form": form.kind}))
        return
    print(result.plan)
    show(result.report)
    print(f"nothing is written; it would become {KINDS[form.kind]}")
