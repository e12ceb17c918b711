"""Sweeps: perplexity against size, for several recipes over several ratios and seeds.

A recipe is a pipeline as text (or a YAML file) with ``{ratio}`` where the ratio goes, once or more
often: ``prune{target=ffn ratio={ratio}},reconstruct``. Every point is written down as soon as it is
measured, so that a sweep that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.calibration.data import Calibration, TokenizerLike, digest
from graphprune.errors import (
    CalibrationError,
    EvaluationError,
    GraphPruneError,
    OutputError,
    PipelineError,
    UsageError,
    add_context,
)
from graphprune.evaluation.perplexity import perplexity
from graphprune.io.atomic import as_json, staged_file
from graphprune.io.progress import DisplayFactory, progress_bar
from graphprune.io.version import __version__
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline
from graphprune.report import plots as pictures

if TYPE_CHECKING:
    from rich.console import Group as Shown

MARK = "{ratio}"
"""What a recipe holds where the ratio goes."""

STEPS = 6
"""How many ratios a range ``a..b`` is, where that is not said."""

POINTS, RESULT, PICTURE = "points.jsonl", "sweep.json", "sweep.png"
"""The files of a sweep: every point as it was measured, all that was asked for, and the curves."""


# -- what is asked for ----------------------------------------------------------------------------


def read_ratios(text: str, steps: int = STEPS) -> tuple[float, ...]:
    """The ratios that a text means: numbers and ranges, with commas between.

    Parameters
    ----------
    text
        ``0.25``, ``0.1..0.6`` (`steps` ratios, both ends among them) or ``0.1..0.6..0.05`` (with
        the step between two), or several of these.
    steps
        How many ratios a range without a step is.

    Raises
    ------
    UsageError
        When it is something else, or a ratio is not in [0, 1).

    Examples
    --------
    >>> read_ratios("0.1..0.3..0.1,0.5"), read_ratios("0.2..0.6", 3)
    ((0.1, 0.2, 0.3, 0.5), (0.2, 0.4, 0.6))
    """
    found = (ratio for part in text.split(",") for ratio in _read_range(part.strip(), steps))
    ratios = tuple(dict.fromkeys(round(ratio, 9) for ratio in found))
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise UsageError(f"ratios {text!r}: {ratio:g} is not in [0, 1)")
    return ratios


def _read_range(text: str, steps: int) -> list[float]:
    try:
        numbers = [float(number) for number in text.split("..")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers
    if len(numbers) not in (2, 3) or not all(map(math.isfinite, numbers)):
        raise UsageError(f"ratios: {text!r} is no number and no range such as 0.1..0.6..0.1")
    first, last, *by = numbers
    if first >= last or (by and by[0] <= 0):
        raise UsageError(f"ratios: the range {text!r} goes nowhere")
    if not by:
        if steps < 2:
            raise UsageError(f"ratios: the range {text!r} has two ends, and {steps} steps do not")
        return [first + (last - first) * at / (steps - 1) for at in range(steps)]
    return [first + by[0] * at for at in range(math.floor((last - first) / by[0] + 1e-9) + 1)]


@dataclass(frozen=True)
class Recipe:
    """Pipelines that differ in the ratio.

    Parameters
    ----------
    name
        The text, or the name of the file.
    text
        The pipeline with `MARK` in it.
    is_yaml
        Whether the text is YAML.
    """

    name: str
    text: str
    is_yaml: bool = False

    @classmethod
    def read(cls, text: str) -> Recipe:
        """The recipe that is `text`, or in the YAML file of that name.

        Raises
        ------
        PipelineError
            When the file cannot be read, or there is no place for the ratio.
        """
        recipe = cls(text, text)
        if text.endswith((".yaml", ".yml")):
            try:
                recipe = cls(text, Path(text).read_text(encoding="utf-8"), is_yaml=True)
            except (OSError, UnicodeDecodeError) as error:
                raise PipelineError(f"cannot read the recipe {text}: {error}") from error
        if MARK not in recipe.text:
            raise PipelineError(
                f"recipe {text!r} has no {MARK}, such as in prune{{target=ffn ratio={MARK}}}"
            )
        return recipe

    def at(self, ratio: float) -> Pipeline:
        """The pipeline with this ratio.

        Raises
        ------
        PipelineError
            When it is none, naming the recipe and the ratio.
        """
        text = self.text.replace(MARK, repr(ratio))
        try:
            return Pipeline.from_yaml(f"{text}\n") if self.is_yaml else Pipeline.parse(text)
        except GraphPruneError as error:
            add_context(error, f"recipe {self.name!r} at ratio {ratio:g}")
            raise


@dataclass(frozen=True)
class HeldOut:
    """The text that programs are measured on, as `perplexity` takes it."""

    text: str | PathLike[str]
    tokenizer: TokenizerLike
    length: int = 256
    batch_size: int = 4
    max_tokens: int | None = None


# -- what was found -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What a program is like: its size, and how well it predicts the held-out text.

    Parameters
    ----------
    parameters, nonzero
        How many parameters it has, and how many of them are not zero.
    kv_bytes_per_token
        Bytes of KV cache for each token.
    loss, perplexity
        On the held-out text; infinite where it is too large for a number.
    """

    parameters: int
    nonzero: int
    kv_bytes_per_token: int
    loss: float
    perplexity: float


@dataclass(frozen=True)
class Point:
    """One pipeline that was run and measured, or failed.

    Parameters
    ----------
    recipe, ratio, seed
        Which.
    size
        What came out, or None.
    reason
        Why nothing came out.
    """

    recipe: str
    ratio: float
    seed: int
    size: Size | None
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """The points of a recipe at a ratio.

    Parameters
    ----------
    recipe, ratio
        Which.
    parameters, nonzero
        Means over the points that did not fail; None where all did.
    perplexity, loss
        Means over them.
    spread
        The standard deviation of the perplexity over seeds; None for fewer than two.
    measured
        How many points did not fail.
    reasons
        Why the others did, each reason once.
    """

    recipe: str
    ratio: float
    parameters: float | None
    nonzero: float | None
    perplexity: float | None
    loss: float | None
    spread: float | None
    measured: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """The result of `sweep`; printable by rich.

    Parameters
    ----------
    dense
        The program that all points start from.
    tokens, text_sha256
        How many tokens were predicted, and a digest of the windows.
    points
        In the order of recipes, ratios and seeds.
    """

    dense: Size
    tokens: int
    text_sha256: str
    points: tuple[Point, ...]

    def summaries(self) -> list[Summary]:
        """The points of each recipe and ratio together."""
        together: dict[tuple[str, float], list[Point]] = {}
        for point in self.points:
            together.setdefault((point.recipe, point.ratio), []).append(point)
        return [_summary(*key, points) for key, points in together.items()]

    def to_json(self) -> str:
        """Everything as JSON text; a number that is not finite is null."""
        document = {
            "format": 1,
            **asdict(self),
            "summary": [asdict(each) for each in self.summaries()],
        }
        return as_json(document, indent=1)

    def picture(self, path: Path) -> None:
        """Draw perplexity against parameters, a curve for each recipe.

        Raises
        ------
        OutputError
            When the name of the file says no format.
        """
        series: dict[str, list[pictures.Point]] = {}
        for each in self.summaries():
            if each.nonzero and each.perplexity and math.isfinite(each.perplexity):
                point = pictures.Point(each.nonzero, each.perplexity, each.spread or 0.0)
                series.setdefault(each.recipe, []).append(point)
        pictures.curves(
            path,
            series,
            marks={"unpruned": pictures.Point(self.dense.nonzero, self.dense.perplexity)},
            labels=("parameters that are not zero", "perplexity"),
        )

    def __rich__(self) -> Shown:
        """The table for a terminal, and what failed."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group as Shown
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("recipe", overflow="fold")
        for title in ("ratio", "parameters", "not zero", "perplexity"):
            table.add_column(title, justify="right", no_wrap=True)
        dense = self.dense
        whole = f"{dense.parameters:,}", f"{dense.nonzero / dense.parameters:.1%}"
        table.add_row("(unpruned)", "", *whole, f"{dense.perplexity:.2f}", end_section=True)
        summaries = self.summaries()
        for at, each in enumerate(summaries):
            first = not at or summaries[at - 1].recipe != each.recipe
            last = at + 1 == len(summaries) or summaries[at + 1].recipe != each.recipe
            cells = (each.recipe if first else "", f"{each.ratio:g}", *_cells(each, dense))
            table.add_row(*map(Text, cells), end_section=last)
        failed: dict[tuple[str, str], list[str]] = {}
        for point in self.points:
            if point.reason:
                where = f"{point.ratio:g} (seed {point.seed})"
                failed.setdefault((point.recipe, point.reason), []).append(where)
        lines = [
            Text(f"failed: {recipe} at {', '.join(places)}: {reason}")
            for (recipe, reason), places in failed.items()
        ]
        return Shown(table, *lines)


def _cells(summary: Summary, dense: Size) -> tuple[str, str, str]:
    if summary.parameters is None or summary.nonzero is None or summary.perplexity is None:
        return "", "", "failed"
    change = summary.parameters / dense.parameters - 1
    spread = "" if summary.spread is None else f" ± {summary.spread:.2f}"
    return (
        f"{summary.parameters:,.0f} ({change:+.1%})",
        f"{summary.nonzero / dense.parameters:.1%}",
        f"{summary.perplexity:.2f}{spread}",
    )


def _summary(recipe: str, ratio: float, points: Sequence[Point]) -> Summary:
    sizes = [point.size for point in points if point.size is not None]
    reasons = tuple(dict.fromkeys(point.reason for point in points if point.reason))
    if not sizes:
        return Summary(recipe, ratio, None, None, None, None, None, 0, reasons)
    perplexities = [size.perplexity for size in sizes]
    certain = len(sizes) > 1 and all(map(math.isfinite, perplexities))
    return Summary(
        recipe,
        ratio,
        statistics.mean(size.parameters for size in sizes),
        statistics.mean(size.nonzero for size in sizes),
        statistics.fmean(perplexities),
        statistics.fmean(size.loss for size in sizes),
        statistics.stdev(perplexities) if certain else None,
        len(sizes),
        reasons,
    )


# -- measuring ------------------------------------------------------------------------------------


def sweep(
    program: Program,
    recipes: Sequence[Recipe],
    ratios: Sequence[float],
    heldout: HeldOut,
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
        What to measure on.
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
        lacking = [p.name for p in pipeline.passes if p.requires_calibration]
        if lacking and draws[seed] is None:
            raise CalibrationError(
                f"recipe {recipe.name!r}: {lacking[0]} needs calibration data, and there is none"
            )
    journal = _Journal(Path(folder))
    measured = perplexity(program, **vars(heldout), progress=progress or False)
    dense = _size(program, measured.loss, measured.perplexity)
    weights, points = digest([program.weights]), []
    with progress_bar(progress, "sweeping", total=len(jobs)) as advance:
        for recipe, ratio, seed, pipeline, place in jobs:
            draw = draws[seed]
            identity = {
                "graphprune": __version__,
                "weights": weights,
                "text": measured.sha256,
                "length": measured.length,
                "calibration": draw.sha256 if draw is not None else None,
                "pipeline": str(pipeline),
                "seed": seed,
            }
            size, reason = journal.find(identity), ""
            if size is None:
                try:
                    size = _measure(program, pipeline, draw, seed, place, heldout, progress)
                except (GraphPruneError, RuntimeError, MemoryError) as error:
                    reason = " ".join(str(error).split()) or type(error).__name__
                journal.add(identity, size, reason)
            points.append(Point(recipe.name, ratio, seed, size, reason))
            advance(1)
    result = Sweep(dense, measured.tokens, measured.sha256, tuple(points))
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
    place: Path,
    heldout: HeldOut,
    progress: DisplayFactory | None,
) -> Size:
    result = pipeline.run(
        program, calibration=draw, seed=seed, output=place, quiet=progress is None
    )
    found = perplexity(result.program, **vars(heldout), progress=progress or False)
    if math.isnan(found.loss):
        raise EvaluationError("the loss on the held-out text is not a number")
    return _size(result.program, found.loss, found.perplexity)


def _size(program: Program, loss: float, perplexity: float) -> Size:
    kinds = program.kinds
    parameters = [w for name, w in program.weights.items() if kinds[name] == "parameter"]
    nonzero = sum(int(weight.count_nonzero()) for weight in parameters)
    count, cached = program.parameter_count(), program.kv_bytes_per_token()
    return Size(count, nonzero, cached, loss, perplexity)


class _Journal:
    """The points that are measured, a line of JSON for each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / POINTS
        with _refusing(folder):
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder} is a file, not a directory")
            if folder.is_dir() and not self.path.is_file() and any(folder.iterdir()):
                raise OutputError(f"{folder} is not empty, and holds no sweep: give another place")
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
            whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
            self.path.write_text(whole, encoding="utf-8")
        self.records = list(self._read(whole.splitlines()))

    def find(self, identity: Mapping[str, Any]) -> Size | None:
        """What was measured for `identity`, if it was."""
        return next(
            (
                _size_of(record["size"])
                for record in self.records
                if record["size"] is not None and record["identity"] == identity
            ),
            None,
        )

    def add(self, identity: Mapping[str, Any], size: Size | None, reason: str) -> None:
        """Write a point down, to the disk."""
        record = {
            "identity": dict(identity),
            "size": None if size is None else asdict(size),
            "reason": reason,
        }
        self.records.append(record)
        with _refusing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(as_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record["size"] is not None:
                    _size_of(record["size"])
                record["identity"]["pipeline"]
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{self.path}:{number} is no point of a sweep: {error}"
                ) from error
            yield record


def _size_of(data: Mapping[str, Any]) -> Size:
    unbounded = {name: math.inf for name in ("loss", "perplexity") if data[name] is None}
    return Size(**{**data, **unbounded})


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
