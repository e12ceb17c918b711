"""Pictures of tables: a heat map, curves, bars and histograms, as PNG, SVG or PDF."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from graphprune.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of the files that can be written."""

_WRITTEN = 16
"""Values are written into the cells of a heat map that has no more columns than this."""


@dataclass(frozen=True)
class Point:
    """A point of a curve: where, how high, and how far up and down that may be."""

    x: float
    y: float
    spread: float = 0.0


def check_format(path: Path) -> None:
    """Refuse a file name that says no format.

    Raises
    ------
    OutputError
        Naming the formats there are.
    """
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: a picture's name ends in {', '.join(FORMATS)}")


def heat_map(
    path: Path,
    rows: Mapping[str, Sequence[float]],
    *,
    beside: Sequence[float | None] = (),
    titles: tuple[str, str] = ("", ""),
    columns: str = "",
) -> None:
    """Draw values in color, blue below zero and red above.

    Parameters
    ----------
    path
        The file to write; its suffix is one of `FORMATS`.
    rows
        Values by name of the row, from the top; rows may differ in length.
    beside
        One more value for each row, in a column and a scale of its own; None where there is none.
    titles
        What stands above the map, and above what is beside it.
    columns
        What the columns are.

    Raises
    ------
    OutputError
        When the name says no format.
    """
    from matplotlib.figure import Figure

    check_format(path)
    width = max(map(len, rows.values()))
    figure = Figure(
        figsize=(6 + min(0.5 * width, 16) + bool(beside), 1.6 + 0.36 * len(rows)),
        layout="constrained",
    )
    if beside:
        main, side = figure.subplots(1, 2, width_ratios=(max(width, 3), 1.5), sharey=True)
        _cells(side, [[math.nan if value is None else value] for value in beside], titles[1])
        side.set_xticks([])
    else:
        main = figure.subplots()
    _cells(main, list(rows.values()), titles[0])
    main.set_yticks(range(len(rows)), [_plain(name, 48) for name in rows])
    main.set_xlabel(columns)
    main.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)


def curves(
    path: Path,
    series: Mapping[str, Sequence[Point]],
    *,
    marks: Mapping[str, Point],
    labels: tuple[str, str],
) -> None:
    """Draw curves through points, with the height on a logarithmic scale.

    Parameters
    ----------
    path
        The file to write; its suffix is one of `FORMATS`.
    series
        Points of each curve by its name.
    marks
        Single points by name.
    labels
        What the axes are.

    Raises
    ------
    OutputError
        When the name says no format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogFormatter

    check_format(path)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        placed = sorted(points, key=lambda point: point.x)
        # A bar that would reach below zero has no end on a logarithmic scale.
        below = [min(point.spread, 0.99 * point.y) for point in placed]
        axes.errorbar(
            [point.x for point in placed],
            [point.y for point in placed],
            yerr=[below, [point.spread for point in placed]],
            marker="o",
            markersize=4,
            capsize=3,
            label=_plain(name),
        )
    for name, point in marks.items():
        axes.plot(point.x, point.y, "k*", markersize=11, label=_plain(name))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=150)


def bars(path: Path, pairs: Mapping[str, tuple[float, float]], *, labels: tuple[str, str]) -> None:
    """Draw two bars for each name, the first empty and the second filled.

    Parameters
    ----------
    path
        The file to write; its suffix is one of `FORMATS`.
    pairs
        What was before and what is after, by name, from the top.
    labels
        What the bars measure, and what the names are.

    Raises
    ------
    OutputError
        When the name says no format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    check_format(path)
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(pairs))
    before, after = zip(*pairs.values(), strict=True)
    axes.barh(rows, before, 0.75, fill=False, edgecolor="0.35", hatch="///", label="before")
    axes.barh(rows, after, 0.75, color="0.3", label="after")
    axes.set_yticks(rows, list(pairs))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(True, axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def histograms(path: Path, values: Mapping[str, Sequence[float]], *, label: str) -> None:
    """Draw one histogram for each name, all on one scale.

    Parameters
    ----------
    path
        The file to write; its suffix is one of `FORMATS`.
    values
        Values by name; on a logarithmic scale where none is zero or below.
    label
        What the values are.

    Raises
    ------
    OutputError
        When the name says no format.
    """
    check_format(path)
    draw_histograms(values, label=label).savefig(path, dpi=150)


def draw_histograms(values: Mapping[str, Sequence[float]], *, label: str) -> Figure:
    """Return the figure that `histograms` writes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    columns = min(4, len(values))
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.6 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    low = min(min(each) for each in values.values())
    high = max(max(each) for each in values.values())
    log = 0 < 10 * low < high
    edges = [low + (high - low) * at / 40 for at in range(41)]
    if log:
        edges = [low * (high / low) ** (at / 40) for at in range(41)]
    for at, (axes, (name, each)) in enumerate(zip(grid.flat, values.items(), strict=False)):
        axes.hist(each, bins=edges if high > low else 1, color="0.4")
        axes.set_title(_plain(name, 44), fontsize="x-small")
        axes.tick_params(labelbottom=at + columns >= len(values), labelsize="small")
        axes.set_ylabel("units", fontsize="small")
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(
                LogLocator(subs=(1, 3) if high < 300 * low else (1,), numticks=5)
            )
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.locator_params(axis="x", nbins=4)
    for axes in list(grid.flat)[len(values) :]:
        axes.set_axis_off()
    figure.supxlabel(label, fontsize="medium")
    return figure


def _cells(axes: Axes, rows: Sequence[Sequence[float]], title: str) -> None:
    width = max(map(len, rows))
    values = [[*row, *[math.nan] * (width - len(row))] for row in rows]
    top = max((abs(v) for row in values for v in row if math.isfinite(v)), default=0.0) or 1.0
    shown = axes.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    axes.set_title(title, fontsize="medium")
    if width > _WRITTEN:
        axes.figure.colorbar(shown, ax=axes)
        return
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isfinite(value):
                color = "white" if abs(value) > 0.6 * top else "black"
                axes.text(x, y, f"{value:.3f}", ha="center", va="center", c=color, size=8)


def _plain(name: str, width: int = 90) -> str:
    """Return `name` in short lines, with nothing in it that matplotlib takes for mathematics."""
    return "\n".join(wrap(name, width)).replace("$", r"\$")
