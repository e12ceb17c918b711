"""The tables of what `tools/bench_onnx.py` measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_routes import (
    BUILDER,
    DENSE,
    EXPORTER,
    EXPORTER_CPU,
    ONE_CACHE,
    OURS,
    Facts,
    Work,
)

Row = dict[str, Any]

_KEY = ("section", "threads", "past", "new")
_CLOCKS = {1: "one thread, process time", 2: "two threads, wall clock"}
FASTER = 1.0
REALISED = 0.85
MERGED = 1.5
"""What is aimed at: against the best rival; of the ideal gain; of 4 KV heads at past 2048."""


@dataclass
class Rows:
    """What was measured: a row for each kind of work, with the times of all that took turns."""

    path: Path | None
    held: dict[tuple[Any, ...], Row] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Rows:
        """Read the rows of earlier runs, the last of each kind; none without a path."""
        found = cls(path)
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                found.held[_key(row)] = row
        return found

    def find(self, section: str, threads: int, work: Work) -> Row | None:
        """Return the row of a kind of work, if it was measured."""
        return self.held.get((section, threads, work.past, work.new))

    def add(self, row: Row) -> None:
        """Keep one."""
        self.held[_key(row)] = row
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def of(self, section: str) -> list[Row]:
        """Those of a section, prompts first."""
        rows = [row for row in self.held.values() if row["section"] == section]
        return sorted(rows, key=lambda row: (row["threads"], row["past"], row["new"]))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


@dataclass(frozen=True)
class Spread:
    """A ratio of times in the same turn: its median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Of times that are paired by their turn."""
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    def reaches(self, least: float) -> str:
        """Whether it is at least so much, as far as the spread tells."""
        if self.median >= least:
            return "yes"
        return "within the spread" if self.high >= least else "no"


def work_of(row: Row) -> Work:
    """Say what a row's runs did."""
    return Work(row["past"], row["new"])


def times_of(row: Row) -> dict[tuple[str, str], list[float]]:
    """Milliseconds by model and route."""
    return {(model, route): taken for model, route, taken in row["times"]}


def ideal(row: Row, model: str) -> float:
    """How many times as fast a model would be if only what must be read or computed counted."""
    work, facts = work_of(row), {name: Facts(**each) for name, each in row["facts"].items()}
    return facts[DENSE].least(work) / facts[model].least(work)


def share_of_gain(speedup: float, best: float) -> float:
    """Return the part of the ideal gain that is reached: 0 where nothing is, 1 where all is."""
    return (speedup - 1) / (best - 1)


def report(rows: Rows) -> str:
    """Everything, as Markdown."""
    sections = [
        ["# ONNX models on the CPU, here and by others' export", ""],
        _preface(rows),
        _targets(rows),
        _facts(rows),
        _dense(rows),
        *(_gains(rows, name, *about) for name, about in _GAINS.items()),
        _operators(rows),
        _refused(rows),
    ]
    return "\n".join(line for lines in sections for line in lines).rstrip() + "\n"


def _preface(rows: Rows) -> list[str]:
    found: dict[str, str] = {}
    for row in rows.held.values():
        found |= row["versions"]
    named = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    return [
        "Written by `python tools/bench_onnx.py --genai PYTHON`. Random Llamas in float32, a",
        "batch of one. What stands in one table under one kind of work took turns in one process;",
        "a ratio is the median over turns of the ratio within a turn, with its quartiles in",
        "brackets. Sessions were made twice, the second time in reverse order, and memory came in",
        "huge pages (with small ones, sessions on one file differ by up to a tenth). With one",
        "thread the process time counts, with two the wall clock.",
        "",
        f"Measured with {named}.",
        "All ONNX models ran in that ONNX Runtime, with inputs and outputs bound, and gave the",
        "same logits (1e-3 relative). `; one cache`: past and present are one buffer, as the",
        "runtime of onnxruntime-genai has it, so that nothing is copied. The builder had `-p fp32",
        "-e cpu`; OnnxExporter made its two graphs by `export_for_generation` from a prompt",
        "without padding, which leaves the mask out. torch.compile has a static cache.",
        "",
    ]


# -- targets --------------------------------------------------------------------------------------


def _targets(rows: Rows) -> list[str]:
    lines = [
        "## What is aimed at",
        "",
        "| aim | work | threads | found | holds |",
        "|---" * 5 + "|",
    ]
    lines += [*_against_rivals(rows), *_share_realised(rows), *_merged(rows)]
    return [*lines, ""]


def _against_rivals(rows: Rows) -> Iterator[str]:
    for row in rows.of("dense"):
        times = times_of(row)
        for suffix in ("", ONE_CACHE):
            rivals = [(DENSE, route + suffix) for route in (BUILDER, EXPORTER_CPU, EXPORTER)]
            there = [each for each in rivals if each in times]
            if not there or (DENSE, OURS + suffix) not in times:
                continue
            best = min(there, key=lambda each: statistics.median(times[each]))
            found = Spread.of(times[best], times[DENSE, OURS + suffix])
            yield _line(
                f"dense: as fast as the best rival{suffix}",
                row,
                f"{best[1].removesuffix(ONE_CACHE)} takes {found} times as long",
                found.reaches(FASTER),
            )


def _share_realised(rows: Rows) -> Iterator[str]:
    for row in rows.of("pruned"):
        for suffix in ("", ONE_CACHE):
            if found := speedup(row, "-50 %", OURS + suffix):
                best = ideal(row, "-50 %")
                parts = [share_of_gain(each, best) for each in (found.median, found.high)]
                verdict = "yes" if parts[0] >= REALISED else "no"
                if verdict == "no" and parts[1] >= REALISED:
                    verdict = "within the spread"
                said = f"{found} times as fast, ideal {best:.2f}: {parts[0]:.0%} of the gain"
                yield _line(f"-50 %: {REALISED:.0%} of the ideal gain{suffix}", row, said, verdict)


def _merged(rows: Rows) -> Iterator[str]:
    for row in rows.of("kv"):
        for suffix in ("", ONE_CACHE):
            found = speedup(row, "4 KV heads", OURS + suffix)
            if found and work_of(row) == Work(2048, 1):
                said = f"{found} times as fast, ideal {ideal(row, '4 KV heads'):.2f}"
                claim = f"16 to 4 KV heads: {MERGED} times{suffix}"
                yield _line(claim, row, said, found.reaches(MERGED))


def _line(claim: str, row: Row, said: str, verdict: str) -> str:
    return f"| {claim} | {work_of(row)} | {row['threads']} | {said} | {verdict} |"


def speedup(row: Row, model: str, route: str) -> Spread | None:
    """How many times as fast a model is as the dense one on the same route, if both ran."""
    times = times_of(row)
    if (DENSE, route) not in times or (model, route) not in times:
        return None
    return Spread.of(times[DENSE, route], times[model, route])


# -- tables ---------------------------------------------------------------------------------------


def _facts(rows: Rows) -> list[str]:
    found: dict[str, Facts] = {}
    for name in ("dense", "pruned", "kv"):
        for row in rows.of(name):
            found |= {model: Facts(**each) for model, each in row["facts"].items()}
    if not found:
        return []
    works = (Work(64, 1), Work(2048, 1), Work(4096, 1))
    lines = [
        "## What a run reads and computes",
        "",
        "Weights without the embedding, of which a token reads one row; the cache once.",
        "",
        "| | parameters | weights read, MB | cache per token, KB "
        f"| {' | '.join(f'MB per token, {work}' for work in works)} | GFLOP, 256 tokens |",
        "|---" * (5 + len(works)) + "|",
    ]
    for model, each in found.items():
        read = " | ".join(f"{each.read(work) / 1e6:.0f}" for work in works)
        lines.append(
            f"| {model} | {each.parameters:,} | {each.weight_bytes / 1e6:.0f} "
            f"| {each.cache_bytes / 1e3:.1f} | {read} | {each.flops(Work(0, 256)) / 1e9:.1f} |"
        )
    return [*lines, ""]


def _dense(rows: Rows) -> list[str]:
    lines = [
        "## The dense model on every route",
        "",
        "Milliseconds, median over turns, and how many times as long as graphprune's with target",
        "`cpu` (the row with one cache: as graphprune's with one cache).",
        "",
    ]
    for threads, clock in _CLOCKS.items():
        measured = [row for row in rows.of("dense") if row["threads"] == threads]
        if not measured:
            continue
        works = " | ".join(str(work_of(row)) for row in measured)
        lines += [f"| {clock} | {works} |", "|---" * (len(measured) + 1) + "|"]
        for route in _named(measured, 1):
            cells = " | ".join(_against_ours(times_of(row), route) for row in measured)
            lines.append(f"| {route} | {cells} |")
        lines.append("")
    return lines


def _against_ours(times: dict[tuple[str, str], list[float]], route: str) -> str:
    ours = OURS + (ONE_CACHE if route.endswith(ONE_CACHE) else "")
    taken = times.get((DENSE, route))
    if taken is None:
        return ""
    text = f"{statistics.median(taken):.1f}"
    base = times.get((DENSE, ours))
    return text if route == ours or base is None else f"{text}: {Spread.of(taken, base)}"


_GAINS = {
    "pruned": (
        "FFN units and heads pruned by 25 % and 50 % in every layer",
        "Milliseconds, and how many times as fast as the dense model on the same route; in the "
        "rows `ideal`, by the ratio of bytes (decoding) or operations (prompts). The per cent are "
        "the part of the ideal gain that is realised: (found - 1) / (ideal - 1).",
    ),
    "kv": (
        "KV heads merged from 16 to 4 and 1",
        "As above; a prompt needs hardly fewer operations, so that its ideal is close to 1.",
    ),
    "small": (
        "A small model, 16 KV heads and 4",
        "6 layers of 512, heads of 32, 19 million parameters: how the targets of the export differ "
        "where weights are not all.",
    ),
}


def _gains(rows: Rows, name: str, title: str, text: str) -> list[str]:
    lines = [f"## {title}", "", text, ""]
    for threads, clock in _CLOCKS.items():
        measured = [row for row in rows.of(name) if row["threads"] == threads]
        if not measured:
            continue
        works = " | ".join(str(work_of(row)) for row in measured)
        lines += [f"| {clock} | | {works} |", "|---" * (len(measured) + 2) + "|"]
        models = _named(measured, 0)
        for route in _named(measured, 1):
            for model in models:
                cells = " | ".join(_gain(row, model, route) for row in measured)
                lines.append(f"| {route if model == DENSE else ''} | {model} | {cells} |")
        for model in models[1:]:
            cells = " | ".join(f"{ideal(row, model):.2f}" for row in measured)
            lines.append(f"| ideal | {model} | {cells} |")
        lines.append("")
    return lines if len(lines) > 4 else []


def _gain(row: Row, model: str, route: str) -> str:
    taken = times_of(row).get((model, route))
    if taken is None:
        return ""
    text, found = f"{statistics.median(taken):.1f}", speedup(row, model, route)
    if model == DENSE or found is None:
        return text
    best = ideal(row, model)
    # Below a gain of five per cent the spread is all there is.
    part = f", {share_of_gain(found.median, best):.0%}" if best > 1.05 else ""
    return f"{text}: {found}{part}"


def _named(measured: Sequence[Row], place: int) -> list[str]:
    """Models (0) or routes (1) of some rows, in order."""
    return list(dict.fromkeys(each[place] for row in measured for each in times_of(row)))


def _operators(rows: Rows) -> list[str]:
    measured = rows.of("operators")
    lines = [
        "## Operators of the dense model",
        "",
        "As they run after ONNX Runtime's own fusions: how many, and milliseconds in all of them",
        "on one thread (a node's median over runs, each route in runs of its own).",
        "",
    ]
    for row in measured:
        found: dict[str, dict[str, list[float]]] = row["operators"]
        kinds = {kind for table in found.values() for kind in table}
        most = {kind: max(table.get(kind, (0, 0))[1] for table in found.values()) for kind in kinds}
        total = max(most.values())
        told = sorted((k for k in kinds if most[k] >= 0.002 * total), key=lambda kind: -most[kind])
        lines += [f"| {work_of(row)} | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
        for kind in told:
            lines.append(f"| {kind} | {' | '.join(_count(t, [kind]) for t in found.values())} |")
        rest = [kind for kind in kinds if kind not in told]
        lines.append(f"| others | {' | '.join(_count(t, rest) for t in found.values())} |")
        lines += [f"| all | {' | '.join(_count(t, list(t)) for t in found.values())} |", ""]
    return lines if measured else []


def _count(table: dict[str, list[float]], kinds: Sequence[str]) -> str:
    there = [table[kind] for kind in kinds if kind in table]
    if not there:
        return ""
    return f"{sum(int(n) for n, _ in there)}: {sum(ms for _, ms in there):.2f}"


def _refused(rows: Rows) -> list[str]:
    found = {
        f"- {row['section']}, {work_of(row)}, {row['threads']} threads: {model}, {route}: {why}"
        for row in rows.held.values()
        for model, route, why in row.get("refused", ())
    }
    return ["## What did not run", "", *sorted(found), ""] if found else []
