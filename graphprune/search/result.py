"""The result of a search: the smaller program, and what was tried on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphprune.calibration.data import Calibration
from graphprune.ir.program import Program
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline
from graphprune.pipeline.report import change_text
from graphprune.search.bench import Figures, Tried
from graphprune.selection.cost import TOKENS

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, repr=False)
class Compressed:
    """The result of `graphprune.search.compress.compress`.

    Parameters
    ----------
    result
        What the chosen pipeline gave, as `Pipeline.run` gives it.
    pipeline
        The chosen pipeline: run on the same program, `calibration` and seed, it gives the same
        weights.
    why
        Why it was chosen, in a sentence.
    calibration
        What it was fitted to; None where there was no data.
    measure
        What recipes were compared by, the lower the better; "" where nothing was measured.
    whole
        That measure of the original; None where nothing was measured.
    tried
        The recipes: first those that were measured on all samples, the best first.
    notes
        What else is worth knowing, in sentences.
    latency
        The seconds that the kernels of a prompt take, before and after; None where no latency was
        asked for.
    """

    result: Result
    pipeline: Pipeline
    why: str
    calibration: Calibration | None = None
    measure: str = ""
    whole: Figures | None = None
    tried: tuple[Tried, ...] = ()
    notes: tuple[str, ...] = ()
    latency: tuple[float, float] | None = None

    @property
    def program(self) -> Program:
        """The smaller program."""
        return self.result.program

    def added(self, tried: Tried) -> float:
        """Return what a recipe adds to the measure, on the samples that it was measured on.

        It is nan where nothing was measured.
        """
        if tried.figures is None or self.whole is None:
            return math.nan
        count = len(tried.figures.values)
        return tried.figures.mean - math.fsum(self.whole.values[:count]) / count

    def to_dict(self) -> dict[str, Any]:
        """Return the search as plain data, without the programs."""
        return {
            "pipeline": str(self.pipeline),
            "why": self.why,
            "measure": self.measure,
            "original": None if self.whole is None else self.whole.mean,
            "tried": [self._row(each) for each in self.tried],
            "notes": list(self.notes),
            **({"latency": list(self.latency)} if self.latency else {}),
        }

    @property
    def latency_text(self) -> str:
        """What is said of the latency before and after; "" where none was asked for."""
        if self.latency is None:
            return ""
        before, after = self.latency
        return (
            f"kernels of a prompt of {TOKENS} tokens: {1e3 * before:.4g} ms, now "
            f"{1e3 * after:.4g} ms ({after / before - 1:+.1%})"
        )

    def _row(self, tried: Tried) -> dict[str, Any]:
        found = tried.figures
        if found is None:
            return {"pipeline": str(tried.candidate), "failed": tried.reason}
        return {
            "pipeline": str(tried.candidate),
            "samples": len(found.values),
            "added": self.added(tried),
            "parameters": found.parameters,
            "kv_bytes_per_token": found.kv_bytes_per_token,
            "seconds": found.seconds,
            **({} if found.latency is None else {"latency": found.latency}),
        }

    def __rich__(self) -> Table:
        """Return what was tried as a table of rich."""
        from rich.table import Table
        from rich.text import Text

        table = Table()
        table.add_column("recipe", overflow="fold")
        for title in ("parameters", "samples", f"added to the {self.measure}"):
            table.add_column(title, justify="right")
        for tried in self.tried:
            found = tried.figures
            if found is None or self.whole is None:
                table.add_row(Text(str(tried.candidate)), "", "", Text(tried.reason))
                continue
            size = change_text(found.parameters, self.whole.parameters)
            count, added = len(found.values), self.added(tried)
            table.add_row(Text(str(tried.candidate)), size, str(count), f"{added:+.4f}")
        return table

    def __repr__(self) -> str:
        return f"{self.pipeline}\n{self.why}\n{self.result!r}"
