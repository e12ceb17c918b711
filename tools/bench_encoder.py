"""ONNX models of one encoder: sentences a second and how far their embeddings move.

    python tools/bench_encoder.py DIR --text heldout.txt --calibration text.txt

An encoder is exported as it is, pruned, and quantized. Its embedding of a sentence is the mean of
the last hidden states over the tokens, as sentence-transformers makes it; what it loses is 1 -
cosine with that of the original, on windows of text that nothing was fitted to. Batches of 32 times
128 tokens take turns in one process, in another order each time, by the process time of one thread.
The ideal gain is the ratio of the operations in matrix products. The table is printed, and kept
in ``tools/ONNX_QUANTIZED.md`` under the name of the checkpoint.
"""

from __future__ import annotations

import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_quantized import TABLES
from onnx_routes import session
from quantized_table import keep

import graphprune as gp
from graphprune.backends.onnx import export as backend
from graphprune.backends.onnx.weights.quantize import Quantization
from graphprune.selection.cost import Costs

SENTENCES, LENGTH, TURNS = 32, 128, 5
KINDS = {"float32": None, "int8": Quantization("int8"), "int4": Quantization("int4")}
QUANTIZED_ACTIVATIONS = Quantization("int8", activations="int8")


def main(
    directory: Path,
    text: Annotated[Path, typer.Option(help="Text that quality is measured on.")],
    calibration: Annotated[Path, typer.Option(help="Text that pruning is planned on.")],
    passes: Annotated[
        list[str] | None, typer.Option(help="Pipelines; a quarter and a half by default.")
    ] = None,
    windows: Annotated[int, typer.Option(help="To calibrate with, of 128 tokens.")] = 64,
) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    recipe = "prune{{target=ffn,kv-heads ratio={} criterion=obs runtime=cpu}},reconstruct"
    recipes = passes or [recipe.format(ratio) for ratio in (0.25, 0.5)]
    dense = gp.load(directory)
    fitted = gp.Calibration.from_text(calibration, str(directory), samples=windows, length=LENGTH)
    held = gp.Calibration.from_text(
        text, str(directory), samples=SENTENCES, length=LENGTH, batch_size=SENTENCES
    )
    (batch,) = held.batches
    programs = {"dense": dense}
    for each in recipes:
        programs[each] = gp.Pipeline.parse(each).run(dense, calibration=fitted, quiet=True).program
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (recipe, program) in enumerate(programs.items()):
            for kind, chosen in {**KINDS, "int8, activations too": QUANTIZED_ACTIVATIONS}.items():
                path = Path(folder) / f"{number}_{re.sub(r'[^a-z0-9]+', '_', kind)}.onnx"
                made = backend.export(program, path, target="cpu", check=False, quantization=chosen)
                opened = session(path, 1)
                row = {"recipe": recipe, "kind": kind, "bytes": made.bytes, "session": opened}
                row |= {"embeddings": _embeddings(opened, batch), "macs": _macs(program)}
                rows.append(row)
                print(recipe, kind, made.bytes, file=sys.stderr, flush=True)
        _time(rows, batch)
    report = _table(directory.name, rows, windows)
    print(report)
    keep(TABLES, directory.name, report)


def _macs(program: gp.Program) -> float:
    return float(Costs(gp.analyze(program)).after("macs", {}))


def _feeds(opened: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    ids = batch["input_ids"]
    filled = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    given = {**filled, **batch}
    return {value.name: given[value.name].numpy() for value in opened.get_inputs()}


def _embeddings(opened: Any, batch: Mapping[str, torch.Tensor]) -> Any:
    """Return unit vectors, ``[sentences, hidden]``."""
    (states,) = opened.run(["last_hidden_state"], _feeds(opened, batch))
    means = states.mean(axis=1)  # every window is full
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def _time(rows: list[dict[str, Any]], batch: Mapping[str, torch.Tensor]) -> None:
    """Add seconds of a batch: a list, one for each turn."""
    for row in rows:
        row["seconds"] = []
    for turn in range(TURNS + 1):
        for row in random.Random(turn).sample(rows, len(rows)):
            feeds, start = _feeds(row["session"], batch), time.process_time()
            row["session"].run(None, feeds)
            if turn:
                row["seconds"].append(time.process_time() - start)


def _table(name: str, rows: list[dict[str, Any]], windows: int) -> str:
    first = rows[0]
    lines = [
        f"## {name}",
        "",
        f"Batches of {SENTENCES} times {LENGTH} tokens; gains over the first row, by the median",
        "ratio of turns; 1 - cosine of embeddings with those of the first row on held-out text.",
        f"Pruned on {windows} windows of {LENGTH} tokens.",
        "",
        "| | weights | MB | sentences/s | gain | ideal gain | 1 - cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [a / b for a, b in zip(first["seconds"], row["seconds"], strict=True)]
        lost = 1 - float((first["embeddings"] * row["embeddings"]).sum(-1).mean())
        cells = [
            f"{row['bytes'] / 1e6:.1f}",
            f"{SENTENCES / statistics.median(row['seconds']):.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{first['macs'] / row['macs']:.2f}",
            f"{lost:.4f}",
        ]
        lines.append(f"| {row['recipe']} | {row['kind']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
