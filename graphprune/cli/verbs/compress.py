"""The verb `compress`: a smaller model by the recipe that measures best."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.console import note, show
from graphprune.cli.inputs import read_calibration, require_text
from graphprune.cli.options import (
    AsJson,
    CalibrationOptions,
    Checkpoint,
    Form,
    LoadToWriteOptions,
    NeededOutput,
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
    write,
)
from graphprune.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from graphprune.search.result import Compressed

SEARCH = "search.json"
"""What was tried, beside the report."""

_BUDGETS = "What is to go"
_SEARCHING = "The search"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


@verb("graphprune compress DIR --params 0.25 --calibration text.txt -o OUT")
def compress(
    session: Session,
    directory: Checkpoint,
    *,
    params: Annotated[
        float | None,
        typer.Option(help="The part of the parameters, such as 0.25.", rich_help_panel=_BUDGETS),
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option(
            help="The part of the multiply-accumulates of a prompt.", rich_help_panel=_BUDGETS
        ),
    ] = None,
    kv_bytes: Annotated[
        float | None, typer.Option(help="The part of the KV cache.", rich_help_panel=_BUDGETS)
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            help="The part of the time that the kernels of a prompt take, each measured in ONNX "
            "Runtime.",
            rich_help_panel=_BUDGETS,
        ),
    ] = None,
    provider: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of --latency: what the result is to run on, a provider of ONNX Runtime, as "
            "'cuda'.",
            rich_help_panel=_BUDGETS,
        ),
    ] = "cpu",
    time: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="How long it may take, such as 90s, 30m or 2h; looked at between recipes.",
            rich_help_panel=_SEARCHING,
        ),
    ] = "30m",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="What may be pruned, as in 'prune'; whatever suits if left out. May be repeated.",
            rich_help_panel=_SEARCHING,
        ),
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            help="How units may be scored; if left out taylor, obs, wanda, l2, reap of experts. "
            "May be repeated.",
            rich_help_panel=_SEARCHING,
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where what is measured is kept, for the same command to go on after an "
            "interruption; OUT.search if left out.",
            rich_help_panel=_SEARCHING,
        ),
    ] = None,
    seed: Seed = 0,
    output: NeededOutput,
    overwrite: Overwrite = False,
    form: PlainForm = Form.any,
    dtype: StoredType = None,
    shard_size: ShardSize = None,
    as_json: AsJson = False,
    calibration: CalibrationOptions,
    loading: LoadToWriteOptions,
) -> None:
    """Make a model smaller by the recipe that measures best: targets, criterion, refit and all."""
    from graphprune.search.compress import CRITERIA
    from graphprune.search.compress import compress as search

    seconds = seconds_of(time)
    require_text(calibration.calibration, CalibrationError)
    with destination(output, directory, overwrite=overwrite) as folder:
        program = session.load_to_write(directory, loading, runs=True)
        text, _ = read_calibration(calibration, [], program, directory, seed)
        found = search(
            program,
            calibration=text,
            params=params,
            macs=macs,
            kv_bytes=kv_bytes,
            latency=latency,
            provider=provider,
            targets=target or (),
            criteria=criterion or CRITERIA,
            seconds=seconds,
            folder=work or output.with_name(f"{output.name}.search"),
            plain=form is Form.plain,
            seed=seed,
            progress=session.progress,
        )
        result = found.result
        note_other_sizes(result.report)
        kind = form_of(session, result.program, form)
        files = write(session, result.program, result.plan, folder, kind, dtype, shard_size)
        note_large_edits(folder, result.plan)
        fitted = found.calibration
        summary = summary_of(session, program, result, folder, kind, fitted, fitted, files)
        report = dataclasses.replace(result.report, summary=summary.to_dict())
        written = report.to_json().replace(f"{folder}{os.sep}", "")
        (folder / REPORT).write_text(written, encoding="utf-8")
        again = _command(directory, found, calibration, seed, dtype)
        told = {**found.to_dict(), "command": again}
        (folder / SEARCH).write_text(json.dumps(told, indent=2), encoding="utf-8")
    if session.quiet:
        return
    if as_json:
        print(json.dumps({**told, "report": json.loads(written)}))
        return
    if found.tried:
        show(found)
    print(f"{found.why}.")
    if found.latency is not None:
        print(f"{found.latency_text}.")
    for line in found.notes:
        note(line)
    show(summary)
    for line in summary.lines():
        print(line)
    print(f"again: {again}")
    print(f"{output}: {KINDS[kind.kind]}: {', '.join([*files, REPORT, SEARCH])}")


def seconds_of(text: str) -> float:
    """Return the seconds that a text such as ``90s``, ``30m`` or ``1.5h`` means.

    Raises
    ------
    UsageError
        When it means no time.

    Examples
    --------
    >>> seconds_of("1.5h"), seconds_of("90")
    (5400.0, 90.0)
    """
    found = re.fullmatch(r"(\d+\.?\d*)\s*([smh]?)", text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not seconds:
        raise UsageError(f"time {text!r} is no time to search in; say 90s, 30m or 2h")
    return seconds


def _command(
    directory: str,
    found: Compressed,
    options: CalibrationOptions,
    seed: int,
    dtype: StoredType,
) -> str:
    """Return the command line that makes the same model without a search."""
    words = ["graphprune", "run", directory, "--passes", str(found.pipeline)]
    data = found.calibration
    if options.calibration is not None:
        words += ["--calibration", str(options.calibration)]
    if data is not None:
        words += ["--samples", str(data.samples)]
    if data is not None and data.kind == "text":
        words += ["--calibration-length", str(data.length)]
    if options.tokenizer is not None:
        words += ["--tokenizer", options.tokenizer]
    if not options.first_token:
        words.append("--no-first-token")
    if dtype is not None:
        words += ["--dtype", str(dtype)]
    return shlex.join([*words, "--seed", str(seed), "-o", "OUT"])
