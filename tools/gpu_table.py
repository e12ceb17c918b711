"""The tables of `bench_gpu.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def as_text(rows: list[Row]) -> str:
    """Write the rows as Markdown."""
    (first,) = (row for row in rows if row["kind"] == "machine")
    lines = ["# ONNX packages on a GPU", "", "Made by `tools/bench_gpu.py`.", ""]
    lines += [f"- {first['gpu']}, provider {first['provider']}"]
    lines += [f"- {name} {version}" for name, version in first["versions"].items()]
    for kind, (head, cells) in TABLES.items():
        here = [row for row in rows if row["kind"] == kind]
        if here:
            columns = head.count("|") + 1
            lines += ["", f"| {head} |", "|---" * columns + "|"]
            lines += [f"| {cells(row)} |" for row in here]
    failures = [f"- {r['dtype']}: {r['what']}" for r in rows if r["kind"] == "failure"]
    return "\n".join([*lines, *(["", *failures] if failures else [])]) + "\n"


def _package(row: Row) -> str:
    held = f"{row['bytes'] / 1e6:.1f} | {row['kv_bytes_per_token']:,}"
    return f"{_name(row)} | {held} | {row['forms']}"


def _parity(row: Row) -> str:
    return f"{_name(row)} | {_number(row['error'], '.1e')} | {'; '.join(row['notes'])}"


def _placement(row: Row) -> str:
    return f"{_name(row)} | {row['nodes']} | {row['copies']} | {row['on_cpu']}"


def _kernel(row: Row) -> str:
    return f"{_name(row)} | {'<br>'.join(row['lines']) or 'nothing'}"


def _memory(row: Row) -> str:
    return f"{_name(row)} | {_number(row['bytes'] and row['bytes'] / 1e6, ',.0f')}"


def _rate(row: Row) -> str:
    start = f"{_name(row)} | {row['batch']} | {row['past']}"
    if "failure" in row:
        return f"{start} | {row['failure']} | | |"
    gains = [*(f"{gain:.2f}" for gain in row["gains"]), "", ""]
    return f"{start} | {row['prefill']:,.0f} | {gains[0]} | {row['decode']:,.0f} | {gains[1]}"


def _sparse(row: Row) -> str:
    if "what" in row:
        return f"{row['by']} | {row['what']} | | | |"
    times = f"{row['dense']:.3f} | {row['sparse']:.3f} | {row['dense'] / row['sparse']:.2f}"
    return f"{row['by']} | {row['out']} x {row['in']} | {row['rows']} | {times}"


def _name(row: Row) -> str:
    return f"{row['model']}, {row['dtype']}"


def _number(value: float | None, form: str) -> str:
    return "not run" if value is None else format(value, form)


TABLES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "package": ("model | MB | KV bytes per token | attention", _package),
    "parity": ("model | largest relative error | notes", _parity),
    "placement": (
        "model | nodes by provider | copies between devices | on the CPU",
        _placement,
    ),
    "kernel": ("model | what ONNX Runtime says", _kernel),
    "memory": ("model | peak MB", _memory),
    "rate": (
        "model | batch | past | prompt tokens/s | gain | decoded tokens/s | gain",
        _rate,
    ),
    "sparse": ("by | matrix | rows | dense ms | 2:4 ms | gain", _sparse),
}
"""Kind of row -> the head of its table, and the cells of a row."""
