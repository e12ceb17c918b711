"""Verbs that write a smaller model: `run`, `apply`."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune import ranks
from graphprune.cli.console import note, show
from graphprune.cli.inputs import (
    in_form,
    read_calibration,
    read_pipeline,
    read_plan,
    refuse_uncalibrated,
    require_text,
    resolve,
)
from graphprune.cli.options import (
    CALIBRATION,
    RESULT,
    AsJson,
    CalibrationOptions,
    Checkpoint,
    Form,
    LoadOptions,
    LoadToWriteOptions,
    Output,
    Overwrite,
    PlainForm,
    PlanFile,
    Seed,
    ShardSize,
    StoredType,
)
from graphprune.cli.session import Session, verb
from graphprune.cli.writing import (
    KINDS,
    REPORT,
    compared,
    destination,
    form_of,
    note_large_edits,
    note_other_sizes,
    plan_files,
    write,
)
from graphprune.errors import CalibrationError
from graphprune.io import reference
from graphprune.pipeline.instruments import Instrument, PassPosition

if TYPE_CHECKING:
    from graphprune.backends.huggingface.save import CheckpointForm
    from graphprune.calibration.data import Calibration
    from graphprune.evaluation.summary import Summary
    from graphprune.ir.program import Program
    from graphprune.pipeline.pass_base import Context, Outcome
    from graphprune.pipeline.pass_manager import Result
    from graphprune.plan.plan import Plan

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
        program, smaller = _written_by(
            session, program, result.program, directory, loading, result.plan
        )
        result = dataclasses.replace(result, program=smaller)
        note_other_sizes(result.report)
        found = form_of(session, result.program, form)
        if output is None:
            _show_plan(session, result, found, as_json)
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


@verb("graphprune apply DIR OUT/plan.json -o COPY")
def apply(
    session: Session,
    directory: Checkpoint,
    plan: PlanFile,
    output: Output,
    overwrite: Overwrite = False,
    form: PlainForm = Form.any,
    dtype: StoredType = None,
    shard_size: ShardSize = None,
    *,
    loading: LoadToWriteOptions,
    as_json: AsJson = False,
) -> None:
    """Apply a plan to a fresh copy of the model that it was made for.

    Weights are read, cut and written one at a time. After a kill the same command goes on where it
    ended.
    """
    from graphprune.plan.drawn import drawn_text
    from graphprune.transforms.apply import apply_plan

    chosen = read_plan(plan)
    key = _work_key(directory, chosen, dtype, shard_size)
    with destination(output, directory, overwrite=overwrite, key=key) as folder:
        program = session.load_to_write(directory, loading, runs=False)
        with session.working("applying the plan"):
            smaller = apply_plan(program, chosen)
        program, smaller = _written_by(session, program, smaller, directory, loading, chosen)
        found = form_of(session, smaller, form)
        written = write(session, smaller, chosen, folder, found, dtype, shard_size)
        files = [*written, *plan_files(folder)]
    if session.quiet:
        return
    counts = program.parameter_count(), smaller.parameter_count()
    if as_json:
        parameters = dict(zip(("before", "after"), counts, strict=True))
        data = {"parameters": parameters, "form": found.kind, "written": files}
        print(json.dumps({**data, "calibration": chosen.calibration}))
        return
    if chosen.calibration:
        print(f"planned on {drawn_text(chosen.calibration)}")
    print(f"parameters {counts[0]:,} -> {counts[1]:,}")
    print(f"{output}: {KINDS[found.kind]}: {', '.join(files)}")


def _written_by(
    session: Session,
    program: Program,
    smaller: Program,
    directory: str,
    loading: LoadOptions,
    plan: Plan,
) -> tuple[Program, Program]:
    """Return a program and what `plan` makes of it, such as can be written.

    A graph that is not to be run takes a fraction of the time and memory, and shows for most
    models that a config gives the result. Where it does not, the program is loaded to be run.
    """
    from graphprune.backends.huggingface.save import checkpoint_form
    from graphprune.transforms.apply import apply_plan

    if not program.stand_ins:
        return program, smaller
    with session.working("looking for a config"):
        kind = checkpoint_form(smaller).kind
    if kind != "none":
        return program, smaller
    program = session.load(directory, loading)
    with session.working("applying the plan"):
        return program, apply_plan(program, plan)


def _work_key(directory: str, plan: Plan, *options: object) -> str:
    """Return what tells one piece of work from another, by the files that it reads."""
    import hashlib

    files = sorted(Path(resolve(directory)).glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((stats, plan.to_json(), options)).encode()).hexdigest()[:12]


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


def summary_of(
    session: Session,
    program: Program,
    result: Result,
    folder: Path,
    form: CheckpointForm,
    data: Calibration | None,
    fitted: Calibration | None,
    files: list[str],
) -> Summary:
    """Sum up what the run comes to, of which `files` are the checkpoint."""
    from graphprune.evaluation.summary import Footprint, Summary, verified_error

    predictions, why_not = compared(session, program, result.program, data)
    source = None if program.source is None else program.source.directory
    plan = plan_files(folder)
    others = {path.name for path in folder.iterdir()} - {*files, *plan}
    return Summary(
        Footprint.of(program, source),
        Footprint.of(result.program, folder),
        predictions,
        why_not,
        verified_error(result.report.passes),
        0 if fitted is None else fitted.tokens,
        0 if fitted is None else fitted.samples,
        form.kind,
        form.reason,
        {
            "checkpoint": files,
            "by passes": sorted(others),
            "plan": plan,
            "report": [REPORT],
        },
    )


def _show_plan(session: Session, result: Result, form: CheckpointForm, as_json: bool) -> None:
    """Show what a dry run found."""
    if as_json:
        data = json.loads(result.report.to_json())
        print(json.dumps({**data, "plan": json.loads(result.plan.to_json()), "form": form.kind}))
        return
    print(result.plan)
    show(result.report)
    print(f"nothing is written; it would become {KINDS[form.kind]}")
