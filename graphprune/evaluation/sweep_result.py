"""The result of a sweep: every point, their means over seeds, a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from graphprune.evaluation.held_out import PERPLEXITY
from graphprune.io.atomic import as_json
from graphprune.ir.program import Program
from graphprune.pipeline.report import ProgramSize
from graphprune.report import plots

if TYPE_CHECKING:
    from rich.console import Group as Shown

_Loss = TypeVar("_Loss", float, float | None)


@dataclass(frozen=True)
class MeasuredProgram(ProgramSize):
    """The size of a program, and how well it does on the held-out data.

    Parameters
    ----------
    parameters, kv_bytes_per_token
        As in `ProgramSize`.
    nonzero
        How many parameters are not zero.
    loss
        The mean of what is measured on the held-out data, the next-token loss of a language model.
    perplexity
        Of a language model; infinite where it is too large for a number, None for other models.
    """

    nonzero: int
    loss: float
    perplexity: float | None

    @classmethod
    def measured(cls, program: Program, loss: float, perplexity: float | None) -> MeasuredProgram:
        """Count the parameters of `program`, whose loss is known."""
        kinds = program.kinds
        parameters = [w for name, w in program.weights.items() if kinds[name] == "parameter"]
        nonzero = sum(int(weight.count_nonzero()) for weight in parameters)
        size = ProgramSize.of(program)
        return cls(**vars(size), nonzero=nonzero, loss=loss, perplexity=perplexity)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MeasuredProgram:
        """Read what JSON kept of one: null for what is infinite, and nothing for None."""
        kept: dict[str, Any] = {"perplexity": None}
        kept |= {name: math.inf if value is None else value for name, value in data.items()}
        return cls(**kept)


@dataclass(frozen=True)
class SweepPoint:
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
    size: MeasuredProgram | None
    reason: str = ""


@dataclass(frozen=True)
class RecipeSummary:
    """The points of a recipe at a ratio.

    Parameters
    ----------
    recipe, ratio
        Which.
    parameters, nonzero
        Means over the points that did not fail; None where all did.
    perplexity, loss
        Means over them; no perplexity where none is measured.
    spread
        The standard deviation of the perplexity, or of what else is measured, over seeds; None for
        fewer than two.
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
        How many tokens were predicted, or samples measured, and a digest of them.
    points
        In the order of recipes, ratios and seeds.
    measure
        What is measured.
    """

    dense: MeasuredProgram
    tokens: int
    text_sha256: str
    points: tuple[SweepPoint, ...]
    measure: str = PERPLEXITY

    def summaries(self) -> list[RecipeSummary]:
        """Summarize the points of each recipe and ratio."""
        together: dict[tuple[str, float], list[SweepPoint]] = {}
        for point in self.points:
            together.setdefault((point.recipe, point.ratio), []).append(point)
        return [_summary(*key, points) for key, points in together.items()]

    def to_json(self) -> str:
        """Return everything as JSON text.

        A number that is not finite is null; a perplexity that is not measured is left out.
        """
        document = {
            "format": 1,
            **asdict(self, dict_factory=_fields),
            "summary": [asdict(each, dict_factory=_fields) for each in self.summaries()],
        }
        return as_json(document, indent=1)

    def picture(self, path: Path) -> None:
        """Draw what is measured against parameters, a curve for each recipe.

        Raises
        ------
        OutputError
            When the name of the file says no format.
        """
        series: dict[str, list[plots.Point]] = {}
        for each in self.summaries():
            figure = _shown(each.loss, each.perplexity)
            if each.nonzero and figure is not None and math.isfinite(figure):
                point = plots.Point(each.nonzero, figure, each.spread or 0.0)
                series.setdefault(each.recipe, []).append(point)
        plots.curves(
            path,
            series,
            marks={"unpruned": plots.Point(self.dense.nonzero, self._dense_figure)},
            labels=("parameters that are not zero", self.measure),
        )

    def __rich__(self) -> Shown:
        """Lay out the table for a terminal, and what failed."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group as Shown
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("recipe", overflow="fold")
        for title in ("ratio", "parameters", "not zero"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column(self.measure, justify="right")
        dense = self.dense
        whole = f"{dense.parameters:,}", f"{dense.nonzero / dense.parameters:.1%}"
        table.add_row("(unpruned)", "", *whole, self._number(self._dense_figure), end_section=True)
        summaries = self.summaries()
        for at, each in enumerate(summaries):
            first = not at or summaries[at - 1].recipe != each.recipe
            last = at + 1 == len(summaries) or summaries[at + 1].recipe != each.recipe
            cells = (each.recipe if first else "", f"{each.ratio:g}", *self._cells(each))
            table.add_row(*map(Text, cells), end_section=last)
        failed: dict[tuple[str, str], list[str]] = {}
        for point in self.points:
            if point.reason:
                where = f"{point.ratio:g} (seed {point.seed})"
                failed.setdefault((point.recipe, point.reason), []).append(where)
        lines = [
            Text(f"failed: {recipe} at {', '.join(points)}: {reason}")
            for (recipe, reason), points in failed.items()
        ]
        return Shown(table, *lines)

    def _cells(self, summary: RecipeSummary) -> tuple[str, str, str]:
        figure = _shown(summary.loss, summary.perplexity)
        if summary.parameters is None or summary.nonzero is None or figure is None:
            return "", "", "failed"
        dense = self.dense.parameters
        spread = "" if summary.spread is None else f" ± {self._number(summary.spread)}"
        return (
            f"{summary.parameters:,.0f} ({summary.parameters / dense - 1:+.1%})",
            f"{summary.nonzero / dense:.1%}",
            f"{self._number(figure)}{spread}",
        )

    @property
    def _dense_figure(self) -> float:
        return _shown(self.dense.loss, self.dense.perplexity)

    def _number(self, figure: float) -> str:
        return f"{figure:.2f}" if self.measure == PERPLEXITY else f"{figure:.4g}"


def _shown(loss: _Loss, perplexity: float | None) -> _Loss | float:
    """Return the perplexity, or what is measured where there is none."""
    return loss if perplexity is None else perplexity


def _fields(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return fields by name, without a perplexity that is not measured."""
    return {name: value for name, value in pairs if (name, value) != ("perplexity", None)}


def _summary(recipe: str, ratio: float, points: Sequence[SweepPoint]) -> RecipeSummary:
    sizes = [point.size for point in points if point.size is not None]
    reasons = tuple(dict.fromkeys(point.reason for point in points if point.reason))
    if not sizes:
        return RecipeSummary(recipe, ratio, None, None, None, None, None, 0, reasons)
    figures = [_shown(size.loss, size.perplexity) for size in sizes]
    perplexities = [size.perplexity for size in sizes if size.perplexity is not None]
    certain = len(sizes) > 1 and all(map(math.isfinite, figures))
    return RecipeSummary(
        recipe,
        ratio,
        statistics.mean(size.parameters for size in sizes),
        statistics.mean(size.nonzero for size in sizes),
        statistics.fmean(perplexities) if perplexities else None,
        statistics.fmean(size.loss for size in sizes),
        statistics.stdev(figures) if certain else None,
        len(sizes),
        reasons,
    )
