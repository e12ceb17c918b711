"""Two plans side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphprune.errors import PlanError
from graphprune.report.overview import collapse_names, layer_pattern

if TYPE_CHECKING:
    from rich.table import Table

    from graphprune.plan.plan import Plan


def difference(first: Plan, second: Plan, *names: str) -> Table:
    """Return a table of what two plans do to each group: units that go in one, the other, and both.

    Parameters
    ----------
    first, second
        Plans for the same program.
    names
        What to call them.

    Raises
    ------
    PlanError
        When they were made for different programs.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("weight", overflow="fold")
    for title in ("dimension", *names, "both"):
        table.add_column(Text(title), justify="right")
    rows: dict[tuple[str, ...], list[str]] = {}
    for weight, dim, *counts in _removed(first, second):
        cells = [f"{count:,} go" for count in counts]
        rows.setdefault((layer_pattern(weight), str(dim), *cells), []).append(weight)
    for (_, *cells), weights in rows.items():
        table.add_row(*map(Text, (collapse_names(weights), *cells)))
    for group, *merges in _merges(first, second):
        table.add_row(*map(Text, (group, "", *merges, "")))
    return table


def difference_json(first: Plan, second: Plan) -> dict[str, list[dict[str, int | str]]]:
    """Return the same as plain data.

    Raises
    ------
    PlanError
        When they were made for different programs.
    """
    removed = ("weight", "dimension", "first", "second", "both")
    merged = ("group", "first", "second")
    return {
        "removed": [dict(zip(removed, row, strict=True)) for row in _removed(first, second)],
        "merged": [dict(zip(merged, row, strict=True)) for row in _merges(first, second)],
    }


def _removed(first: Plan, second: Plan) -> list[tuple[str, int, int, int, int]]:
    """Weight, dimension, and how many of its indices go in one plan, the other, and both."""
    prints = [plan.steps[0].fingerprint for plan in (first, second) if plan.steps]
    if len(set(prints)) > 1:
        raise PlanError(f"the plans were made for different programs, {prints[0]} and {prints[1]}")
    one, other = first.removed, second.removed
    rows = []
    for weight in dict.fromkeys((*one, *other)):
        here, there = one.get(weight, {}), other.get(weight, {})
        for dim in sorted({*here, *there}):
            left, right = set(here.get(dim, ())), set(there.get(dim, ()))
            rows.append((weight, dim, len(left), len(right), len(left & right)))
    return rows


def _merges(first: Plan, second: Plan) -> list[tuple[str, str, str]]:
    """Group of KV heads, and how many become how many in either plan."""
    one, other = _merged(first), _merged(second)
    groups = dict.fromkeys((*one, *other))
    return [(group, one.get(group, ""), other.get(group, "")) for group in groups]


def _merged(plan: Plan) -> dict[str, str]:
    """Group of KV heads -> how many of them become how many."""
    merges = (merge for step in plan.steps for merge in step.merges)
    return {merge.group: f"{merge.size} to {merge.groups}" for merge in merges}
