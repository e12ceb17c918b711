"""The tables of `bench_gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def as_text(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    (first,) = (row for row in rows if row["kind"] == "machine")
    lines = ["# ONNX packages on a GPU", "", "Made by `tools/bench_gpu.py`.", ""]
    lines += [f"- {first['gpu']}, provider {first['provider']}"]
    lines += [f"- {name} {version}" for name, version in first["versions"].items()]
    with _section(lines, rows, "package", "model | MB | KV bytes per token | attention") as cells:
        cells.extend(
            f"{_name(r)} | {r['bytes'] / 1e6:.1f} | {r['kv_bytes_per_token']:,} | {r['forms']}"
            for r in rows
            if r["kind"] == "package"
        )
    with _section(lines, rows, "parity", "model | largest relative error | notes") as cells:
        cells.extend(
            f"{_name(r)} | {_number(r['error'], '.1e')} | {'; '.join(r['notes'])}"
            for r in rows
            if r["kind"] == "parity"
        )
    head = "model | nodes by provider | copies between devices | on the CPU"
    with _section(lines, rows, "placement", head) as cells:
        cells.extend(
            f"{_name(r)} | {r['nodes']} | {r['copies']} | {r['on_cpu']}"
            for r in rows
            if r["kind"] == "placement"
        )
    with _section(lines, rows, "kernel", "model | what ONNX Runtime says") as cells:
        cells.extend(
            f"{_name(r)} | {'<br>'.join(r['lines']) or 'nothing'}"
            for r in rows
            if r["kind"] == "kernel"
        )
    with _section(lines, rows, "memory", "model | peak MB") as cells:
        cells.extend(
            f"{_name(r)} | {_number(r['bytes'] and r['bytes'] / 1e6, ',.0f')}"
            for r in rows
            if r["kind"] == "memory"
        )
    head = "model | batch | past | prompt tokens/s | gain | decoded tokens/s | gain"
    with _section(lines, rows, "rate", head) as cells:
        for r in (r for r in rows if r["kind"] == "rate"):
            start = f"{_name(r)} | {r['batch']} | {r['past']} | "
            if "failure" in r:
                cells.append(f"{start}{r['failure']} | | |")
                continue
            gains = [*(f"{gain:.2f}" for gain in r["gains"]), "", ""]
            cells.append(
                f"{start}{r['prefill']:,.0f} | {gains[0]} | {r['decode']:,.0f} | {gains[1]}"
            )
    with _section(lines, rows, "sparse", "by | matrix | rows | dense ms | 2:4 ms | gain") as cells:
        for r in (r for r in rows if r["kind"] == "sparse"):
            if "what" in r:
                cells.append(f"{r['by']} | {r['what']} | | | |")
                continue
            gain = r["dense"] / r["sparse"]
            times = f"{r['dense']:.3f} | {r['sparse']:.3f} | {gain:.2f}"
            cells.append(f"{r['by']} | {r['out']} x {r['in']} | {r['rows']} | {times}")
    failures = [f"- {r['dtype']}: {r['what']}" for r in rows if r["kind"] == "failure"]
    return "\n".join([*lines, *(["", *failures] if failures else [])]) + "\n"


@contextmanager
def _section(
    lines: list[str], rows: list[dict[str, Any]], kind: str, head: str
) -> Iterator[list[str]]:
    cells: list[str] = []
    yield cells
    if any(row["kind"] == kind for row in rows):
        columns = head.count("|") + 1
        lines += ["", f"| {head} |", "|---" * columns + "|", *(f"| {cell} |" for cell in cells)]


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['dtype']}"


def _number(value: float | None, form: str) -> str:
    return "not run" if value is None else format(value, form)
