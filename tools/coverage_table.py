"""The table of what `tools/coverage.py` measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tiny_models import TASKS

Row = dict[str, Any]

ENOUGH = 0.95
"""Share of the elements of attention and MLPs from which a type counts as prunable."""


def headline(rows: list[Row]) -> list[str]:
    """One Markdown line for each task, of the types that run in eager mode."""
    lines = [
        "| task | types | run in eager | captured | right at other sizes | verified exact "
        "| 95 % prunable | heads prunable | KV heads merged | reloaded | equal in ONNX Runtime |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        here = [row for row in rows if row["task"] == task]
        runs = [row for row in here if _done(row, "eager")]
        if not runs:
            continue
        attending = [row for row in runs if row.get("attention")]
        merging = [row for row in attending if row.get("merged", {}).get("value") != "no KV heads"]
        cells = [
            _of(runs, lambda row: _done(row, "captured")),
            _of([row for row in runs if "sizes" in row], lambda row: _done(row, "sizes")),
            _of(runs, lambda row: _done(row, "verified")),
            _of(runs, lambda row: (row.get("share") or 0) >= ENOUGH),
            _of(attending, _has_heads),
            _of(merging, lambda row: _done(row, "merged")),
            _of(runs, lambda row: _done(row, "reloaded")),
            _of(runs, lambda row: _done(row, "onnx")),
        ]
        lines.append(f"| {task} | {len(here)} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def _of(rows: list[Row], holds: Callable[[Row], bool]) -> str:
    count = sum(map(holds, rows))
    return f"{count} of {len(rows)} ({100 * count / len(rows):.0f} %)" if rows else "none"


def _done(row: Row, stage: str) -> bool:
    return stage in row and "error" not in row[stage]


def _has_heads(row: Row) -> bool:
    return bool({"kv-head", "query-slot"} & set(row.get("groups", ())))


def table(rows: list[Row]) -> str:
    """Everything that was measured, as Markdown: headline, a row for each type, every miss."""
    lines = [
        "# Coverage over the model types of transformers",
        "",
        "Made by `tools/coverage.py`: a tiny random model of each type, every group that was found",
        "cut by a quarter at once and compared with its masked original (1e-4 relative), KV heads",
        "merged, a checkpoint with one kind of group cut written and loaded by plain transformers,",
        "and the ONNX model compared in ONNX Runtime. Sizes: as eager mode at lengths of 1, 3, 17,",
        "65 and 130 and batches of 1 and 3, of which none was traced; `not` names those that the",
        "program refuses; empty was not measured.",
        "",
        *(f"- {name} {version}" for name, version in _versions().items()),
        "",
        *headline(rows),
        "",
    ]
    for task in TASKS:
        here = [row for row in rows if row["task"] == task]
        if not here:
            continue
        lines += [f"## {task}", ""]
        lines += [
            "| type | parameters | prunable | groups | sizes | error | merged | reloaded | ONNX |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [_line(row) for row in here]
        misses = [f"- `{row['type']}`: {reason}" for row in here for reason in _misses(row)]
        lines += ["", "What was missed, and why:", "", *(misses or ["- nothing"]), ""]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("graphprune", "torch", "transformers", "onnx", "onnxruntime-gpu")
    return {name: version(name) for name in names}


def _line(row: Row) -> str:
    share = "" if row.get("share") is None else f"{100 * row['share']:.0f} %"
    groups = ", ".join(sorted(row.get("groups", {})))
    cells = [row["type"], f"{row.get('parameters', 0):,}", share, groups]
    cells += [_cell(row, stage) for stage in ("sizes", "verified", "merged", "reloaded", "onnx")]
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, stage: str) -> str:
    if stage not in row:
        return ""
    value = row[stage].get("value", "no" if "error" in row[stage] else "yes")
    return f"{value:.0e}" if isinstance(value, float) else str(value)


def _misses(row: Row) -> Iterator[str]:
    """Why a type fell short, in the order of the stages."""
    for stage, found in row.items():
        if isinstance(found, dict) and "error" in found:
            yield f"not {stage}: {found['error']}"
    if row.get("share") is not None and row["share"] < ENOUGH:
        for reason, size in row["frozen"]:
            yield f"frozen, {size:,} elements: {reason}"
    if row.get("attention") and not _has_heads(row):
        yield "its heads are frozen"
    yield from row.get("paths", ())
