"""Charts that `inspect` draws: the sizes of layers around a plan, and the scores of groups."""

from __future__ import annotations

from pathlib import Path

from graphprune.calibration.cache import read_cache
from graphprune.io.atomic import staged_file
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of
from graphprune.plan.plan import Plan
from graphprune.report.plots import bars, check_format, histograms
from graphprune.transforms.apply import apply_plan

_MOST = 64
"""Histograms in one picture: the first so many groups."""


def draw_sizes(path: Path, program: Program, plan: Plan) -> None:
    """Draw the parameters of every layer before and after `plan`.

    Raises
    ------
    PlanError
        When the plan was made for another program.
    OutputError
        When the file exists, cannot be written, or its name says no format.
    """
    check_format(path)
    plan.check(program)
    sizes = [_sizes(each) for each in (program, apply_plan(program, plan.without_edits()))]
    pairs = {layer: (size, sizes[1].get(layer, 0)) for layer, size in sizes[0].items()}
    with staged_file(path) as staged:
        bars(staged, pairs, labels=("parameters", "layer"))


def draw_scores(path: Path, scores: Path, program: Program) -> None:
    """Draw a histogram of the scores of every group in a file that ``prune{scores=}`` wrote.

    Raises
    ------
    CalibrationError
        When it is no such file, or of another program.
    OutputError
        When the picture exists, cannot be written, or its name says no format.
    """
    check_format(path)
    found = read_cache(scores, "scores", program, None)
    values = {name: each.flatten().tolist() for name, each in list(found.items())[:_MOST]}
    with staged_file(path) as staged:
        histograms(staged, values, label="score of a unit")


def _sizes(program: Program) -> dict[str, float]:
    """Layer, or module outside of layers -> its parameters."""
    sizes: dict[str, float] = {}
    for name, weight in program.weights.items():
        if program.kinds[name] == "parameter":
            module = name.rpartition(".")[0]
            layer = layer_of(module) or module or name
            sizes[layer] = sizes.get(layer, 0) + weight.numel()
    return sizes
