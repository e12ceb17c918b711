"""What a run came to: quality against the original, what was written and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.cli.session import Session
from graphprune.cli.writing import REPORT, plan_files
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from graphprune.backends.huggingface.save import CheckpointForm
    from graphprune.calibration.data import Calibration
    from graphprune.evaluation.comparison import Comparison
    from graphprune.evaluation.summary import Summary
    from graphprune.ir.program import Program
    from graphprune.pipeline.pass_manager import Result


def compared(
    session: Session, original: Program, smaller: Program, data: Calibration | None
) -> tuple[Comparison | None, str]:
    """Compare on the part of `data` that is held out; return why not if that fails."""
    from graphprune.evaluation.comparison import compare

    if data is None:
        takes_text = any(value.name.endswith("input_ids") for value in original.inputs)
        kind, file = ("text", "FILE") if takes_text else ("data", "FILE.safetensors")
        return None, f"there is no {kind}: give --calibration {file}"
    if not data.held_out:
        return None, "the calibration data are too few to hold a part of them out"
    try:
        return compare(original, smaller, data.held_out, session.progress), ""
    except GraphPruneError as error:
        return None, str(error)


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
