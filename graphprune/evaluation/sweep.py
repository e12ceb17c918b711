"""Sweeps: what is lost against size, for several pipelines over several ratios and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError, EvaluationError, GraphPruneError
from graphprune.evaluation.held_out import HeldOutData, Yardstick
from graphprune.evaluation.journal import Journal
from graphprune.evaluation.sweep_result import MeasuredProgram, Sweep, SweepPoint
from graphprune.evaluation.template import PipelineTemplate
from graphprune.io.atomic import staged_file
from graphprune.io.progress import DisplayFactory, progress_bar
from graphprune.io.version import __version__
from graphprune.ir.program import Program
from graphprune.pipeline.pass_manager import uncalibrated
from graphprune.pipeline.pipeline import Pipeline
from graphprune.weights.tensors import digest

RESULT, PICTURE = "sweep.json", "sweep.png"
"""The files of a sweep beside its journal: all that was asked for, and the curves."""


def sweep(
    program: Program,
    recipes: Sequence[PipelineTemplate],
    ratios: Sequence[float],
    heldout: HeldOutData,
    folder: str | PathLike[str],
    *,
    draws: Sequence[Calibration | None] = (None,),
    progress: DisplayFactory | None = None,
) -> Sweep:
    """Run every recipe at every ratio and seed, and measure what comes out.

    Parameters
    ----------
    program
        What to start from.
    recipes, ratios
        What to run.
    heldout
        What to measure on: text for language models, samples for all others.
    folder
        Where the files of the sweep go: a directory that is empty, absent, or of a sweep. Points
        that lie there already, of the same program, texts and pipeline, are not measured again,
        but for those that failed. Passes that write do so in a directory ``1-0.25-0`` in it, of
        recipe, ratio and seed.
    draws
        Calibration data for each seed, beginning with 0; all recipes share it.
    progress
        What makes a progress bar.

    Raises
    ------
    PipelineError
        Before any work, when a recipe cannot be read.
    CalibrationError
        Before any work, when a recipe needs calibration data and there is none.
    OutputError
        When `folder` holds something else, or cannot be written.
    EvaluationError
        When the program cannot be measured.
    """
    jobs = [
        (recipe, ratio, seed, recipe.at(ratio), Path(folder) / f"{number}-{ratio:g}-{seed}")
        for number, recipe in enumerate(recipes, 1)
        for ratio in ratios
        for seed in range(len(draws))
    ]
    for recipe, _, seed, pipeline, _ in jobs:
        lacking = [each for each in pipeline.passes if each.requires_calibration]
        if lacking and draws[seed] is None:
            raise CalibrationError(f"recipe {recipe.name!r}: {uncalibrated(lacking[0])}")
    journal = Journal(Path(folder), "sweep", MeasuredProgram.from_json)
    yardstick = heldout.yardstick(program, progress)
    dense = MeasuredProgram.measured(program, *yardstick.dense)
    weights, points = digest([program.weights]), list[SweepPoint]()
    with progress_bar(progress, "sweeping", total=len(jobs)) as advance:
        for recipe, ratio, seed, pipeline, output in jobs:
            draw = draws[seed]
            identity = {
                "graphprune": __version__,
                "weights": weights,
                "text": yardstick.sha256,
                "length": yardstick.length,
                "calibration": draw.sha256 if draw is not None else None,
                "pipeline": str(pipeline),
                "seed": seed,
            }
            size, reason = journal.find(identity), ""
            if size is None:
                try:
                    size = _measure(program, pipeline, draw, seed, output, yardstick, progress)
                except (GraphPruneError, RuntimeError, MemoryError) as error:
                    reason = " ".join(str(error).split()) or type(error).__name__
                journal.add(identity, size, reason)
            points.append(SweepPoint(recipe.name, ratio, seed, size, reason))
            advance(1)
    result = Sweep(dense, yardstick.count, yardstick.sha256, tuple(points), yardstick.name)
    with staged_file(journal.folder / RESULT, overwrite=True) as file:
        file.write_text(result.to_json() + "\n", encoding="utf-8")
    with staged_file(journal.folder / PICTURE, overwrite=True) as file:
        result.picture(file)
    return result


def _measure(
    program: Program,
    pipeline: Pipeline,
    draw: Calibration | None,
    seed: int,
    output: Path,
    yardstick: Yardstick,
    progress: DisplayFactory | None,
) -> MeasuredProgram:
    result = pipeline.run(
        program, calibration=draw, seed=seed, output=output, quiet=progress is None
    )
    loss, perplexity = yardstick.measure(result.program)
    if math.isnan(loss):
        raise EvaluationError(f"the {yardstick.name} on the held-out data is not a number")
    return MeasuredProgram.measured(result.program, loss, perplexity)
