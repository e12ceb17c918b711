"""Two plans side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import PlanError
from graphprune.report.overview import collapse_names, layer_pattern

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

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
    edited: dict[tuple[str, ...], list[str]] = {}
    for weight, one, other, same in _edited(first, second):
        told = "" if same is None else "the same values" if same else "other values"
        edited.setdefault((layer_pattern(weight), one, other, told), []).append(weight)
    for (_, one, other, told), weights in edited.items():
        table.add_row(*map(Text, (collapse_names(weights), "values", one, other, told)))
    return table


def difference_json(first: Plan, second: Plan) -> dict[str, Any]:
    """Return the same as plain data.

    Raises
    ------
    PlanError
        When they were made for different programs.
    """
    removed = ("weight", "dimension", "first", "second", "both")
    merged = ("group", "first", "second")
    edited = ("weight", "first", "second", "same")
    return {
        "removed": [dict(zip(removed, row, strict=True)) for row in _removed(first, second)],
        "merged": [dict(zip(merged, row, strict=True)) for row in _merges(first, second)],
        "edited": [dict(zip(edited, row, strict=True)) for row in _edited(first, second)],
        "calibration": [first.calibration, second.calibration],
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


def _edited(first: Plan, second: Plan) -> list[tuple[str, str, str, bool | None]]:
    """Weight, the passes that gave it other values in either plan, and whether these are the same.

    The last is None where one plan alone edits it, or the values are not at hand.
    """
    one, other = _editors(first), _editors(second)
    common = one.keys() & other.keys()
    here, there = (_values(plan) if common else {} for plan in (first, second))
    rows = []
    for weight in dict.fromkeys((*one, *other)):
        same = None
        if weight in here and weight in there:
            left, right = here[weight], there[weight]
            same = left.shape == right.shape and bool((left == right).all())
        rows.append((weight, one.get(weight, ""), other.get(weight, ""), same))
    return rows


def _editors(plan: Plan) -> dict[str, str]:
    """Weight -> the passes that gave it other values than the steps leave."""
    found: dict[str, list[str]] = {}
    for edit in plan.edits.made if plan.edits else ():
        for weight in edit.weights:
            found.setdefault(weight, []).append(edit.by.partition("{")[0])
    return {weight: ", ".join(dict.fromkeys(by)) for weight, by in sorted(found.items())}


def _values(plan: Plan) -> Mapping[str, Tensor]:
    """Return the values that a plan brings along; none where they are not at hand."""
    if plan.edits is None or plan.edits.values is None or plan.edits.changed_graph:
        return {}
    if isinstance(plan.edits.values, Path) and not plan.edits.values.is_file():
        return {}
    return plan.edits.read()
