"""The tables of what `tools/bench_quantized.py` measured, and the file that keeps them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""What is known of a model: where it lies, bytes, loss, and milliseconds of each kind of work."""

BUILT = "genai builder, int4"
WORKS: dict[str, tuple[int, int]] = {
    "512 tokens": (0, 512),
    "past 64": (64, 1),
    "past 2048": (2048, 1),
}
"""Kinds of work -> tokens that are cached, and new ones."""

_NEAR = 1.02
"""Files are as large as one another up to this ratio."""


def tables(name: str, rows: Mapping[str, Row], held: str, recipes: Sequence[str]) -> str:
    """Return everything that was measured, as Markdown."""
    found = {kind: row for kind, row in rows.items() if "loss" in row}
    lines = [f"## {name}", "", f"Loss in nats on {held}."]
    lines += [f"- {kind}: {row['why']}" for kind, row in rows.items() if "why" in row]
    parts = [_sizes(found), _times(found), _gains(found)]
    if recipes and len(found) > 2:
        parts.append(_within_bytes(found))
    return "\n\n".join(["\n".join(lines), *filter(None, parts)]) + "\n"


def _sizes(found: Mapping[str, Row]) -> str:
    head = ("", "MB", "loss", "export, s", "load, s", "anonymous MB once loaded")
    cells = []
    for kind, row in found.items():
        made = f"{row['export']:.0f}" if "export" in row else ""
        size, loss = f"{row['bytes'] / 1e6:.1f}", f"{row['loss']:.4f}"
        cells.append([kind, size, loss, made, f"{row['load']:.2f}", f"{row['anon'] / 1e3:.0f}"])
    return _table(head, cells)


def _works(rows: Mapping[str, Row]) -> list[str]:
    return [work for work in WORKS if any(work in row for row in rows.values())]


def _times(found: Mapping[str, Row]) -> str:
    works = _works(found)
    timed = {kind: row for kind, row in found.items() if all(work in row for work in works)}
    if not works:
        return ""
    built = timed.get(BUILT)
    lines = ["Milliseconds, medians over turns, process time of one thread"]
    if built is not None:
        lines[0] += f"; how many times as long as\n`{BUILT}` in the same turn, with quartiles"
    cells = []
    for kind, row in timed.items():
        cell = [f"{statistics.median(row[work]):.1f}" for work in works]
        if built is not None and row is not built and row.get("kind") != "float32":
            for at, work in enumerate(works):
                cell[at] += ": {:.2f} ({:.2f} to {:.2f})".format(*_ratio(row, built, work))
        cells.append([kind, *cell])
    return f"{lines[0]}:\n\n" + _table(("", *works), cells)


def _ratio(row: Row, other: Row, work: str) -> list[float]:
    """Return the quartiles of how many times as long `row` takes as `other`, the median first."""
    ratios = [one / two for one, two in zip(row[work], other[work], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [middle, low, high]


def _gains(found: Mapping[str, Row]) -> str:
    """Return what pruning gains, of what it could."""
    works = _works(found)
    pairs = {
        kind: (row, found[row["kind"]])
        for kind, row in found.items()
        if row.get("recipe") and row["kind"] in found and all(work in row for work in works)
    }
    if not pairs or not works:
        return ""
    cells = []
    for kind, (row, dense) in pairs.items():
        cell = [f"{1 - row['parameters'] / dense['parameters']:.1%}"]
        for work in works:
            gain, ideal = _ratio(dense, row, work)[0], _ideal(row, dense, work)
            cell.append(f"{gain:.2f} of {ideal:.2f}, {(gain - 1) / (ideal - 1):.0%}")
        cells.append([kind, *cell])
    said = (
        "How many times as fast as the same kind before pruning, at best by the ratio of bytes\n"
        "(of weights and caches, for single tokens) or of operations (for prompts), and how much\n"
        "of that gain is there:\n\n"
    )
    return said + _table(("", "parameters gone", *works), cells)


def _ideal(row: Row, other: Row, work: str) -> float:
    """Return how many times as fast `row` is than `other` by what each reads or computes."""
    past, new = WORKS[work]
    if new > 1:
        return float(other["macs"] / row["macs"])
    read = [each["bytes"] + past * each["cache"] for each in (other, row)]
    return float(read[0] / read[1])


def _within_bytes(found: Mapping[str, Row]) -> str:
    """Return which models lose least within their bytes, and what those lose that do not."""
    cells = []
    for kind, row in sorted(found.items(), key=lambda each: each[1]["bytes"]):
        rivals = {
            other: its
            for other, its in found.items()
            if its["bytes"] <= _NEAR * row["bytes"] and its["loss"] < row["loss"]
        }
        best = min(rivals, key=lambda other: float(rivals[other]["loss"]), default="")
        less = f"{best}: {rivals[best]['loss'] - row['loss']:+.4f}" if best else ""
        token = f"{statistics.median(row['past 64']):.1f}" if "past 64" in row else ""
        cells.append([kind, f"{row['bytes'] / 1e6:.1f}", f"{row['loss']:.4f}", token, less])
    said = (
        f"By bytes: what loses least within as many (up to {_NEAR - 1:.0%} more), where that is\n"
        "another model. So a row that was pruned pays where its last column is empty:\n\n"
    )
    return said + _table(("", "MB", "loss", "ms a token, past 64", "what loses less"), cells)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def keep(file: Path, name: str, report: str) -> None:
    """Put `report` in the place of what `file` holds under its name, or at the end."""
    intro = (
        "# Quantized ONNX models\n\nWritten by `python tools/bench_quantized.py`, and by `python "
        "tools/bench_encoder.py` for encoders.\n"
    )
    before = file.read_text(encoding="utf-8") if file.is_file() else intro
    parts = [
        part for part in re.split(r"(?m)^(?=## )", before) if not part.startswith(f"## {name}\n")
    ]
    file.write_text("\n".join(part.strip() + "\n" for part in (*parts, report)), encoding="utf-8")
