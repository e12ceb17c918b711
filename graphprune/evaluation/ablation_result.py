"""The result of an ablation: the effect of each unit, as a table, JSON and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.io.atomic import as_json
from graphprune.report import plots

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

Span = tuple[int, int]
"""The first of some units and the one after the last, counted over all parents."""

SIGNIFICANT = 0.01
"""The p below which an effect counts, as in the paper."""

FREE = 0.01
"""A unit is free if it is certain, at that p, that the loss grows by less than this part of it."""


@dataclass(frozen=True)
class Effect:
    """The change of the loss when units went, or all others did.

    Parameters
    ----------
    units
        The first of the units and the one after the last, counted over all parents.
    difference
        How much larger the loss became.
    error
        Standard error of the difference, from the samples' paired differences; None for one sample.
    p
        How probable so large a difference would be, either way, if there were none (Student's t of
        the paired differences; nothing is corrected for the number of units).
    most
        The largest difference that is not improbable (at p < `SIGNIFICANT`, one-sided); None where
        nothing can be said, as for one sample.
    """

    units: Span
    difference: float
    error: float | None
    p: float | None
    most: float | None = None

    @property
    def significant(self) -> bool:
        """Return whether the difference is more than chance."""
        return self.p is not None and self.p < SIGNIFICANT

    @property
    def text(self) -> str:
        """The units as text: ``3``, or ``0-6``."""
        first, end = self.units
        return str(first) if end - first == 1 else f"{first}-{end - 1}"


@dataclass(frozen=True)
class GroupEffects:
    """The effects in one group.

    Parameters
    ----------
    group, role
        The group, or the weight that reads the heads of one attention of several that share them.
    shape
        Sizes of its parents, and its own; units are counted row-major.
    removed
        What the removal of each unit, or of each run of units, does.
    kept
        What the removal of all others does, for the best to keep. It is chosen on every other
        sample, and its effect is that on the rest. None where it was not asked for, or fewer units
        would be left than are chosen at once.
    """

    group: str
    role: str
    shape: tuple[int, ...]
    removed: tuple[Effect, ...]
    kept: Effect | None


@dataclass(frozen=True)
class Sensitivity:
    """The result of `sensitivity`; printable by rich.

    Parameters
    ----------
    measure
        What the loss is.
    loss
        That of the whole program.
    samples
        How many samples it is a mean over.
    rows
        One for every group.
    """

    measure: str
    loss: float
    samples: int
    rows: tuple[GroupEffects, ...]

    def to_json(self) -> str:
        """Return the effects as JSON text; what is not finite is null."""
        return as_json({"format": 1, **asdict(self)}, indent=1)

    def picture(self, path: Path) -> None:
        """Draw the effects as a heat map, a row for each group.

        Raises
        ------
        OutputError
            When the name of the file says no format.
        """
        names = [row.group for row in self.rows]
        values = ([effect.difference for effect in row.removed] for row in self.rows)
        alone = [row.kept.difference if row.kept else None for row in self.rows]
        single = all(math.prod(row.shape) == len(row.removed) for row in self.rows)
        plots.heat_map(
            path,
            dict(zip(names, values, strict=True)),
            beside=alone if any(row.kept for row in self.rows) else (),
            titles=(f"change of the {self.measure}\nwithout it", "without\nall others"),
            columns="unit" if single else "run of units",
        )

    def _names(self) -> tuple[str, list[str]]:
        """Return the names of all groups with ``*`` for what differs, and that of each."""
        names = [row.group for row in self.rows]
        if len(names) == 1:
            return names[0], [""]
        start, end = commonprefix(names), commonprefix([name[::-1] for name in names])[::-1]
        start = start[: max(start.rfind("."), start.rfind(":")) + 1]
        marks = [at for at in (end.find("."), end.find(":")) if at >= 0]
        end = end[min(marks) :] if marks else ""
        return f"{start}*{end}", [name.removeprefix(start).removesuffix(end) for name in names]

    @property
    def margin(self) -> float:
        """The most that the loss may grow without a unit that is free."""
        return FREE * self.loss if self.loss > 0 else FREE

    def verdicts(self, row: GroupEffects) -> tuple[int, int]:
        """Count the units of a row that are free, and those of which that cannot be told.

        A unit is free where a growth of the loss by `margin` would be improbable, whatever was
        measured; it is not where that much is certain. Few samples leave the most unclear.
        """
        free = sum(effect.most is not None and effect.most < self.margin for effect in row.removed)
        worse = sum(
            effect.significant and effect.difference > 0 and not (effect.most or 0) < self.margin
            for effect in row.removed
        )
        return free, len(row.removed) - free - worse

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out the table for a terminal: every effect where they fit, else a summary."""
        from rich.text import Text

        title, names = self._names()
        table = self._table(names, every=True)
        if table.__rich_measure__(console, options.update(width=1000)).maximum > options.max_width:
            table = self._table(names, every=False)
        yield Text(
            f"{self.measure} {self.loss:.4f} over {self.samples} samples; how much it grows "
            f"without each unit of {title}:"
        )
        yield table
        yield Text(
            f"* differs from no change at p < {SIGNIFICANT:g} (paired over samples)\n"
            f"free: at that p it grows by less than {self.margin:.3g}, each unit by itself; "
            "?: units of which the samples do not tell"
        )

    def _table(self, names: Sequence[str], *, every: bool) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        wide = max(len(row.removed) for row in self.rows)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("", overflow="fold", min_width=min(12, max(map(len, names))))
        titles = map(str, range(wide)) if every else ("runs", "least", "median", "most")
        alone = ["best alone"] if any(row.kept for row in self.rows) else []
        for each in (*titles, "free", "?", *alone):
            table.add_column(each, justify="right", no_wrap=True)
        for name, row in zip(names, self.rows, strict=True):
            cells = [*map(_cell, row.removed)] if every else _summary(row)
            cells += [""] * (wide - len(cells)) if every else []
            free, unclear = map(str, self.verdicts(row))
            kept = [f"{row.kept.text}: {_cell(row.kept)}"] if row.kept else []
            table.add_row(*map(Text, (name, *cells, free, unclear, *kept)))
        return table


def _cell(effect: Effect) -> str:
    return f"{effect.difference:+.3f}{'*' if effect.significant else ' '}"


def _summary(row: GroupEffects) -> list[str]:
    """Return how many effects there are, the least, the median and the largest, with units."""
    ordered = sorted(row.removed, key=lambda effect: effect.difference)
    median = statistics.median(effect.difference for effect in ordered)
    least, most = (f"{effect.text}: {_cell(effect)}" for effect in (ordered[0], ordered[-1]))
    return [f"{len(ordered)}", least, f"{median:+.3f}", most]
