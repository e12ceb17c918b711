"""Quantized ONNX models of one checkpoint: bytes, what loading takes, loss, and tokens a second.

    python tools/bench_quantized.py DIR --text heldout.txt --calibration text.txt --genai PYTHON

Models are exported, with shares of the FFN pruned or not, and quantized or not. Each is loaded in
a process of its own; loss is that of the same windows of text, and prompts and single tokens
take turns in one process, in another order each time, by the process time of one thread: ratios
are of times in the same turn. The tables are printed, and kept in ``tools/ONNX_QUANTIZED.md``
under the name of the checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
import typer
from onnx_routes import build

import graphprune as gp
from graphprune.backends.onnx import export as backend
from graphprune.backends.onnx.weights.quantize import Quantization
from graphprune.calibration.losses import next_token_loss
from graphprune.errors import first_line
from graphprune.selection.cost import Costs

TABLES = Path(__file__).with_name("ONNX_QUANTIZED.md")
KINDS: dict[str, Quantization | None] = {
    "float32": None,
    "int8": Quantization("int8", activations="int8"),
    "int4": Quantization("int4", activations="int8"),
    "int4, zeros": Quantization("int4", activations="int8", zeros=True),
    "int4, head int8": Quantization("int4", head="int8", activations="int8"),
    "int4 by k-quant": Quantization("int4", algorithm="k-quant", activations="int8"),
    "int4, blocks of 64": Quantization("int4", block=64, activations="int8"),
    "int4, blocks of 128": Quantization("int4", block=128, activations="int8"),
}
PRUNED = ("float32", "int4")
"""What of `KINDS` a pruned model is written as."""

BUILT = "genai builder, int4"
_AS_OURS = ("block_size=32", "accuracy_level=4", "windowed_kv_cache=false")
"""Blocks and activations as ours, and caches that are as long as the text in every layer."""

_RECIPE = "prune{{target=ffn ratio={} runtime=cpu}},reconstruct"

Work = tuple[int, int]
"""Tokens that are cached, and new ones."""

WORKS: dict[str, Work] = {
    "512 tokens": (0, 512),
    "past 64": (64, 1),
    "past 512": (512, 1),
    "past 2048": (2048, 1),
}
TURNS = 7


def main(
    directory: Path,
    text: Annotated[Path, typer.Option(help="Text that loss is measured on.")],
    calibration: Annotated[Path, typer.Option(help="Text that pruning is planned on.")],
    kinds: Annotated[str, typer.Option(help="Kinds, joined by semicolons.")] = ";".join(KINDS),
    ratios: Annotated[str, typer.Option(help="Of the FFN to prune, joined by commas.")] = ".25,.5",
    windows: Annotated[int, typer.Option(help="Of 64 tokens, of the text.")] = 16,
    genai: Annotated[
        Path | None, typer.Option(help="Python of an environment with onnxruntime-genai's builder.")
    ] = None,
) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(3)
    held = gp.Calibration.from_text(text, str(directory), samples=windows, length=64, batch_size=1)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as folder:
        dense = gp.load(directory)
        for kind in kinds.split(";"):
            _write(rows, Path(folder), kind, dense, KINDS[kind])
        for ratio in map(float, filter(None, ratios.split(","))):
            fitted = gp.Calibration.from_text(calibration, str(directory))
            passes = gp.Pipeline.parse(_RECIPE.format(ratio))
            pruned = passes.run(dense, calibration=fitted, quiet=True).program
            for kind in PRUNED:
                _write(rows, Path(folder), f"-{ratio:.0%} FFN, {kind}", pruned, KINDS[kind])
                rows[f"-{ratio:.0%} FFN, {kind}"] |= {"dense": kind, "macs": _macs(pruned)}
        for row in rows.values():
            row.setdefault("macs", _macs(dense))
        if genai is not None:
            rows[BUILT] = _built(genai.absolute(), directory.absolute(), Path(folder) / "built")
        for name, row in rows.items():
            if "path" in row:
                row |= _loaded(row["path"])
                row["loss"] = _loss(row["path"], held.batches)
                print(name, row, file=sys.stderr, flush=True)
        longest = dense.context_length or 2048
        works = [work for work, sizes in WORKS.items() if sum(sizes) <= longest]
        _time({name: row for name, row in rows.items() if "path" in row}, works)
        report = _table(directory.name, rows, windows, works)
    print(report)
    keep(TABLES, directory.name, report)


def _macs(program: gp.Program) -> float:
    return float(Costs(gp.analyze(program)).after("macs", {}))


def _write(
    rows: dict[str, dict[str, Any]],
    folder: Path,
    name: str,
    program: gp.Program,
    chosen: Quantization | None,
) -> None:
    path = folder / re.sub(r"\W+", "_", name) / "model.onnx"
    path.parent.mkdir()
    start = time.process_time()
    try:
        report = backend.export(
            program, path, target="cpu", check=False, quantization=chosen, external_data=True
        )
    except gp.errors.GraphPruneError as error:
        rows[name] = {"why": first_line(error)}
        return
    spent = time.process_time() - start
    rows[name] = {"path": str(path), "bytes": report.bytes, "export": spent}
    print(name, rows[name], file=sys.stderr, flush=True)


def _built(genai: Path, directory: Path, folder: Path) -> dict[str, Any]:
    """Return what onnxruntime-genai's builder makes of a checkpoint, with blocks as ours."""
    try:
        build(genai, directory, folder, "int4", *_AS_OURS)
    except RuntimeError as error:
        return {"why": first_line(error)}
    config = transformers.AutoConfig.from_pretrained(directory)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith("past_key_values"):  # their sizes are names there
            sizes = value.type.tensor_type.shape.dim
            sizes[1].dim_value, sizes[3].dim_value = config.num_key_value_heads, config.head_dim
    onnx.save(model, folder / "model.onnx")
    size = sum(path.stat().st_size for path in folder.glob("*.onnx*"))
    return {"path": str(folder / "model.onnx"), "bytes": size}


def _loaded(path: str) -> dict[str, Any]:
    """Return what a process of its own takes to load a model."""
    code = (
        "import json, sys, time, onnxruntime as o\n"
        "def kb(k): return int(open('/proc/self/status').read().split(k + ':')[1].split()[0])\n"
        "o.set_default_logger_severity(3)\n"
        "options = o.SessionOptions(); options.intra_op_num_threads = 1\n"
        "before, start = kb('RssAnon'), time.process_time()\n"
        "s = o.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        "spent = time.process_time() - start\n"
        "print(json.dumps({'load': spent, 'anon': kb('RssAnon') - before, 'peak': kb('VmHWM')}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    return dict(json.loads(ran.stdout))


def session_of(path: str) -> Any:
    """Return a session of the processor with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, ids: np.ndarray[Any, Any], past: int) -> dict[str, Any]:
    rows, new = ids.shape
    feeds = {"input_ids": ids, "attention_mask": np.ones((rows, past + new), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = (rows, value.shape[1], past, value.shape[3])
            feeds[value.name] = np.random.default_rng(0).standard_normal(shape, np.float32) * 0.1
    return feeds


def _loss(path: str, batches: Any) -> float:
    session, losses = session_of(path), []
    name = session.get_outputs()[0].name
    for batch in batches:
        (logits,) = session.run([name], _feeds(session, batch["input_ids"].numpy(), 0))
        losses.append(float(next_token_loss(torch.from_numpy(logits).float(), batch)))
    return statistics.mean(losses)


def _time(rows: dict[str, dict[str, Any]], works: list[str]) -> None:
    """Add the milliseconds of every turn of each work."""
    longest = max(new for _, new in WORKS.values())
    ids = np.random.default_rng(0).integers(3, 1000, (1, longest))
    turns: list[tuple[str, str, Callable[[], Any]]] = []
    for name, row in rows.items():
        session = session_of(row["path"])
        row["cache"] = sum(
            4 * int(v.shape[1]) * int(v.shape[3])
            for v in session.get_inputs()
            if v.name.startswith("past_key_values")
        )
        for work in works:
            past, new = WORKS[work]
            feeds = _feeds(session, ids[:, :new], past)
            turns.append((name, work, lambda s=session, f=feeds: s.run(None, f)))  # type: ignore[misc]
            row[work] = []
    for turn in range(TURNS + 1):
        random.Random(turn).shuffle(turns)
        for name, work, run in turns:
            start = time.process_time()
            run()
            if turn:
                rows[name][work].append(1e3 * (time.process_time() - start))


def _ratio(row: dict[str, Any], other: dict[str, Any], work: str) -> list[float]:
    """Return the quartiles of how many times as long `row` takes as `other`, the median first."""
    ratios = [one / two for one, two in zip(row[work], other[work], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [middle, low, high]


def _ideal(row: dict[str, Any], other: dict[str, Any], work: str) -> float:
    """Return how many times as fast `row` is than `other` by what each reads or computes."""
    past, new = WORKS[work]
    if new > 1:
        return float(other["macs"] / row["macs"])
    read = [each["bytes"] + past * each["cache"] for each in (other, row)]
    return float(read[0] / read[1])


def _table(name: str, rows: dict[str, dict[str, Any]], windows: int, works: list[str]) -> str:
    timed = {kind: row for kind, row in rows.items() if "loss" in row}
    lines = [
        f"## {name}",
        "",
        f"Loss in nats on {windows} windows of 64 tokens. Anonymous memory is that of the loaded",
        "session. Pruned by `" + _RECIPE.format("R") + "`.",
        "",
        "| | MB | export, s | load, s | anonymous MB | most MB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        if kind not in timed:
            lines.append(f"| {kind} | {row['why']} | | | | | |")
            continue
        made = f"{row['export']:.0f}" if "export" in row else ""
        memory = f"{row['anon'] / 1e3:.0f} | {row['peak'] / 1e3:.0f}"
        size, load, loss = f"{row['bytes'] / 1e6:.2f}", f"{row['load']:.2f}", f"{row['loss']:.4f}"
        lines.append(f"| {kind} | {size} | {made} | {load} | {memory} | {loss} |")
    lines += ["", f"Milliseconds, medians of {TURNS} turns" + _against(timed) + ":", ""]
    lines += ["| | " + " | ".join(works) + " |", "|---" * (len(works) + 1) + "|"]
    for kind, row in timed.items():
        cells = [f"{statistics.median(row[work]):.2f}" for work in works]
        if BUILT in timed and "int4" in kind and kind != BUILT:
            for at, work in enumerate(works):
                cells[at] += ": {:.2f} ({:.2f} to {:.2f})".format(*_ratio(row, timed[BUILT], work))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_gains(timed, works), *_equal_bytes(timed)]) + "\n"


def _against(timed: dict[str, Any]) -> str:
    return f", and how many times as long as `{BUILT}`" if BUILT in timed else ""


def _gains(timed: dict[str, dict[str, Any]], works: list[str]) -> list[str]:
    """Return the lines on what pruning gains, of what it could."""
    pairs = [(kind, row) for kind, row in timed.items() if row.get("dense") in timed]
    if not pairs:
        return []
    lines = [
        "",
        "How many times as fast as before pruning, by the ratio of bytes (single tokens) or",
        "operations (prompts) at best, and the part of that gain that is there:",
        "",
        "| | " + " | ".join(works) + " |",
        "|---" * (len(works) + 1) + "|",
    ]
    for kind, row in pairs:
        cells = []
        for work in works:
            gain = _ratio(timed[row["dense"]], row, work)[0]
            ideal = _ideal(row, timed[row["dense"]], work)
            cells.append(f"{gain:.2f} of {ideal:.2f}, {(gain - 1) / (ideal - 1):.0%}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def _equal_bytes(timed: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines on pruned and quantized models beside quantized ones as large."""
    pruned = [kind for kind, row in timed.items() if "dense" in row and "int4" in kind]
    alone = [kind for kind, row in timed.items() if "dense" not in row and kind != BUILT]
    if not pruned or len(alone) < 2:
        return []
    lines = [
        "",
        "Pruned and quantized beside what is only quantized and nearest in bytes:",
        "",
        "| | MB | loss | beside | MB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for kind in pruned:
        row = timed[kind]
        near = min(alone, key=lambda other: abs(timed[other]["bytes"] - row["bytes"]))
        cells = [f"{r['bytes'] / 1e6:.2f} | {r['loss']:.4f}" for r in (row, timed[near])]
        lines.append(f"| {kind} | {cells[0]} | {near} | {cells[1]} |")
    return lines


def keep(tables: Path, name: str, report: str) -> None:
    """Put `report` in the place of what `tables` holds under its name, or at the end."""
    intro = (
        "# Quantized ONNX models\n\nWritten by `python tools/bench_quantized.py`, and by `python "
        "tools/bench_encoder.py` for encoders.\n"
    )
    before = tables.read_text(encoding="utf-8") if tables.is_file() else intro
    parts = [
        part for part in re.split(r"(?m)^(?=## )", before) if not part.startswith(f"## {name}\n")
    ]
    tables.write_text("\n".join(part.strip() + "\n" for part in (*parts, report)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
