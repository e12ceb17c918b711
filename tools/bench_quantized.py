"""Quantized ONNX models of one checkpoint: bytes, what loading takes, loss, and tokens a second.

    python tools/bench_quantized.py DIR --text heldout.txt --calibration text.txt

Models are exported, with a share of the FFN pruned or not, and quantized or not. Each is loaded in
a process of its own; loss is that of the same windows of text, and prompts and single tokens
take turns in one process, in another order each time, by the process time of one thread. The tables
are printed, and kept in ``tools/ONNX_QUANTIZED.md`` under the name of the checkpoint.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

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

TABLES = Path(__file__).with_name("ONNX_QUANTIZED.md")
TRANSPOSED = "float32, transposed when loaded"
KINDS: dict[str, Quantization | None] = {
    "float32": None,
    "int8": Quantization("int8", activations="int8"),
    "int4": Quantization("int4", activations="int8"),
    "int4, head int8": Quantization("int4", head="int8", activations="int8"),
    "int4 by k-quant": Quantization("int4", algorithm="k-quant", activations="int8"),
}
PRUNED = ("float32", "int8", "int4")
"""What of `KINDS` a pruned model is written as."""

BUILT = "genai builder, int4"
_AS_OURS = ("int4_block_size=32", "int4_accuracy_level=4")

TURNS = 7
_PAST, _NEW = 64, 256


def main(
    directory: Path,
    text: Annotated[Path, typer.Option(help="Text that loss is measured on.")],
    calibration: Annotated[Path, typer.Option(help="Text that pruning is planned on.")],
    kinds: Annotated[str, typer.Option(help="Kinds, joined by semicolons.")] = ";".join(KINDS),
    passes: Annotated[str, typer.Option()] = "prune{target=ffn ratio=0.25 runtime=cpu},reconstruct",
    windows: Annotated[int, typer.Option(help="Of 64 tokens, of the text.")] = 16,
    genai: Annotated[
        Path | None, typer.Option(help="Python of an environment with onnxruntime-genai's builder.")
    ] = None,
) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(3)
    held = gp.Calibration.from_text(text, str(directory), samples=windows, length=64, batch_size=1)
    chosen = kinds.split(";")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as folder:
        dense = gp.load(directory)
        _write(rows, Path(folder), TRANSPOSED, dense, None)
        for kind in chosen:
            _write(rows, Path(folder), kind, dense, KINDS[kind])
        if passes:
            fitted = gp.Calibration.from_text(calibration, str(directory))
            pruned = gp.Pipeline.parse(passes).run(dense, calibration=fitted, quiet=True).program
            for kind in PRUNED:
                _write(rows, Path(folder), f"pruned, {kind}", pruned, KINDS[kind])
        if genai is not None:
            rows[BUILT] = _built(genai.absolute(), directory.absolute(), Path(folder) / "built")
        for name, row in rows.items():
            if "path" in row:
                row |= _loaded(row["path"])
                row["loss"] = _loss(row["path"], held.batches)
                print(name, row, file=sys.stderr, flush=True)
        _time({n: row for n, row in rows.items() if "path" in row and n != TRANSPOSED})
        report = _table(directory.name, rows, windows, passes)
    print(report)
    keep(TABLES, directory.name, report)


def _write(
    rows: dict[str, dict[str, Any]],
    folder: Path,
    name: str,
    program: gp.Program,
    chosen: Quantization | None,
) -> None:
    path = folder / re.sub(r"\W+", "_", name) / "model.onnx"
    path.parent.mkdir()
    as_it_was = mock.patch.object(backend, "write_as_used", lambda model: None)
    start = time.process_time()
    with as_it_was if name == TRANSPOSED else nullcontext():
        try:
            report = backend.export(
                program,
                path,
                target="cpu",
                check=False,
                quantization=chosen,
                external_data=True,
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


def _time(rows: dict[str, dict[str, Any]]) -> None:
    """Add milliseconds of a prompt and of a token, a median over turns."""
    ids = np.random.default_rng(0).integers(3, 1000, (1, _NEW))
    works: list[tuple[str, str, Callable[[], Any]]] = []
    for name, row in rows.items():
        session = session_of(row["path"])
        for what, new, past in (("prompt", _NEW, 0), ("token", 1, _PAST)):
            feeds = _feeds(session, ids[:, :new], past)
            works.append((name, what, lambda s=session, f=feeds: s.run(None, f)))  # type: ignore[misc]
    times: dict[tuple[str, str], list[float]] = {(name, what): [] for name, what, _ in works}
    for turn in range(TURNS + 1):
        random.Random(turn).shuffle(works)
        for name, what, run in works:
            start = time.process_time()
            run()
            if turn:
                times[name, what].append(1e3 * (time.process_time() - start))
    for (name, what), taken in times.items():
        rows[name][what] = statistics.median(taken)


def _table(name: str, rows: dict[str, dict[str, Any]], windows: int, passes: str) -> str:
    lines = [
        f"## {name}",
        "",
        f"Loss in nats on {windows} windows of 64 tokens. A prompt has {_NEW} tokens, a single",
        f"token {_PAST} before it. Anonymous memory is that of the loaded session."
        + (f" Pruned by `{passes}`." if passes else ""),
        "",
        "| | MB | export, s | load, s | anonymous MB | most MB | loss "
        "| tokens/s of a prompt | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        if "why" in row:
            lines.append(f"| {kind} | {row['why']} | | | | | | | |")
            continue
        cells = [
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['export']:.0f}" if "export" in row else "",
            f"{row['load']:.2f}",
            f"{row['anon'] / 1e3:.0f}",
            f"{row['peak'] / 1e3:.0f}",
            f"{row['loss']:.4f}",
            f"{1e3 * _NEW / row['prompt']:.0f}" if "prompt" in row else "",
            f"{1e3 / row['token']:.1f}" if "token" in row else "",
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
