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

    prints = [plan.steps[0].fingerprint for plan in (first, second) if plan.steps]
    if len(set(prints)) > 1:
        raise PlanError(f"the plans were made for different programs, {prints[0]} and {prints[1]}")
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("weight", overflow="fold")
    for title in ("dimension", *names, "both"):
        table.add_column(Text(title), justify="right")
    one, other = first.removed, second.removed
    rows: dict[tuple[str, ...], list[str]] = {}
    for weight in dict.fromkeys((*one, *other)):
        here, there = one.get(weight, {}), other.get(weight, {})
        for dim in sorted({*here, *there}):
            left, right = set(here.get(dim, ())), set(there.get(dim, ()))
            cells = [f"{len(each):,} go" for each in (left, right, left & right)]
            rows.setdefault((layer_pattern(weight), str(dim), *cells), []).append(weight)
    for (_, *cells), weights in rows.items():
        table.add_row(*map(Text, (collapse_names(weights), *cells)))
    merged = [_merged(plan) for plan in (first, second)]
    for group in dict.fromkeys((*merged[0], *merged[1])):
        table.add_row(*map(Text, (group, "", *(each.get(group, "") for each in merged), "")))
    return table


def _merged(plan: Plan) -> dict[str, str]:
    """Group of KV heads -> how many of them become how many."""
    merges = (merge for step in plan.steps for merge in step.merges)
    return {merge.group: f"{merge.size} to {merge.groups}" for merge in merges}
