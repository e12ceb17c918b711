"""Quantized ONNX models of one checkpoint: bytes, what loading takes, loss, and tokens a second.

    python tools/bench_quantized.py DIR FOLDER --text heldout.txt --calibration text.txt
        --genai PYTHON --recipe 'prune{target=ffn ratio=0.25 runtime=cpu},reconstruct'

A model is exported as it is and pruned by each recipe, and each of these quantized or not; PYTHON
is an environment with onnxruntime-genai, whose builder makes one more. Each is loaded in a process
of its own; loss is that of the same windows of text. Prompts and single tokens take turns in one
process, in another order each time, by the process time of one thread: ratios are of times in the
same turn. Pruned programs, models and whatever was measured stay in FOLDER, so that the same
command goes on where it stopped. The tables are printed, and kept in ``tools/ONNX_QUANTIZED.md``
under the name of the checkpoint.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
import typer
from bench_onnx import ask_for_huge_pages
from onnx_routes import build, session
from quantized_table import BUILT, WORKS, Row, keep, tables

import graphprune as gp
from graphprune.backends.onnx import export as backend
from graphprune.backends.onnx.weights.quantize import Quantization
from graphprune.calibration.losses import next_token_loss
from graphprune.errors import first_line
from graphprune.selection.cost import Costs

TABLES = Path(__file__).with_name("ONNX_QUANTIZED.md")
KINDS: dict[str, Quantization | None] = {
    "float32": None,
    "int8": Quantization("int8"),
    "int4": Quantization("int4"),
    "int4, no zeros": Quantization("int4", zeros=False),
    "int4, k-quant": Quantization("int4", algorithm="k-quant"),
    "int4, head int8": Quantization("int4", head="int8"),
    "int4, blocks of 64": Quantization("int4", block=64),
    "int4, blocks of 128": Quantization("int4", block=128),
    "int4, activations float": Quantization("int4", activations="float"),
    "int8, blocks of 128": Quantization("int8", block=128),
}
PRUNED = "float32;int8;int4"
"""What of `KINDS` a pruned model is written as."""

_AS_OURS = ("block_size=32", "accuracy_level=4", "windowed_kv_cache=false")
"""Blocks and activations as ours, and caches that are as long as the text in every layer."""

LENGTH = 128
"""Tokens of a window that loss is measured on."""
ROUNDS = 2
"""How often sessions are made anew, each time in reverse order: when they are made counts, too."""


def main(
    directory: Path,
    folder: Annotated[Path, typer.Argument(help="Where everything that is made stays.")],
    text: Annotated[Path, typer.Option(help="Text that loss is measured on.")],
    calibration: Annotated[Path, typer.Option(help="Text that pruning is planned on.")],
    recipe: Annotated[list[str] | None, typer.Option(help="Passes that prune; repeated.")] = None,
    kinds: Annotated[str, typer.Option(help="Kinds, joined by semicolons.")] = ";".join(KINDS),
    pruned: Annotated[str, typer.Option(help="Kinds of what is pruned.")] = PRUNED,
    windows: Annotated[int, typer.Option(help=f"Of {LENGTH} tokens, of the text.")] = 16,
    samples: Annotated[int, typer.Option(help="To calibrate with, of 256 tokens.")] = 32,
    turns: Annotated[int, typer.Option(help="For single tokens; a third of it for prompts.")] = 12,
    untimed: Annotated[str, typer.Option(help="Kinds whose loss is enough.")] = "",
    genai: Annotated[
        Path | None, typer.Option(help="Python of an environment with onnxruntime-genai's builder.")
    ] = None,
) -> None:
    """Measure what is missing, and write the tables."""
    ask_for_huge_pages()
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(3)
    source = Source(directory.absolute(), folder.absolute(), calibration, samples)
    held = gp.Calibration.from_text(
        text, str(directory), samples=windows, length=LENGTH, batch_size=1
    )
    rows: dict[str, Row] = {}
    for name, row in source.models(kinds.split(";"), pruned.split(";"), recipe or (), genai):
        if "path" in row and "loss" not in row:
            row |= _loaded(row["path"])
            row["loss"] = _loss(row["path"], held.batches)
            source.keep(name, row)
        rows[name] = row
        print(name, row, file=sys.stderr, flush=True)
    longest = source.dense.context_length or 2048
    left_out = untimed.split(";")
    timed = {n: r for n, r in rows.items() if "path" in r and n not in left_out}
    for work, (past, new) in WORKS.items():
        if past + new <= longest:
            source.time(work, timed, turns if new == 1 else max(turns // 3, 3))
    report = tables(directory.name, rows, f"{windows} windows of {LENGTH} tokens", recipe or ())
    print(report)
    keep(TABLES, directory.name, report)


@dataclass(frozen=True)
class Source:
    """What is made of a checkpoint, each once, and kept in a folder with what is known of it.

    Parameters
    ----------
    directory, folder
        The checkpoint, and where everything goes.
    calibration, samples
        Text that pruning is planned on, and how many windows of it.
    """

    directory: Path
    folder: Path
    calibration: Path
    samples: int

    @cached_property
    def dense(self) -> gp.Program:
        """The program as it is."""
        return gp.load(self.directory)

    def models(
        self, kinds: list[str], pruned: list[str], recipes: Any, genai: Path | None
    ) -> Iterator[tuple[str, Row]]:
        """Name and row of every model; a row has "why" where there is none."""
        for kind in kinds:
            yield kind, self._written(kind, kind)
        for recipe in recipes:
            for kind in pruned:
                name = f"{recipe.partition(',reconstruct')[0]}: {kind}"
                yield name, self._written(name, kind, recipe)
        if genai is not None:
            yield BUILT, self._built(genai.absolute())

    def keep(self, name: str, row: Row) -> None:
        """Keep what is known of a model."""
        place = self._place(name)
        place.mkdir(parents=True, exist_ok=True)
        (place / "row.json").write_text(json.dumps(row, indent=1), encoding="utf-8")

    def time(self, work: str, rows: Mapping[str, Row], turns: int) -> None:
        """Add the milliseconds of every turn of a kind of work, unless all of it is known."""
        file = self.folder / f"{re.sub(r'[^a-z0-9]+', '-', work)}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not rows.keys() <= known.keys():
            known = _timed({name: row["path"] for name, row in rows.items()}, WORKS[work], turns)
            file.write_text(json.dumps(known), encoding="utf-8")
            print(work, {n: statistics.median(t) for n, t in known.items()}, file=sys.stderr)
        for name, row in rows.items():
            row[work] = known[name]

    def _place(self, name: str) -> Path:
        return self.folder / re.sub(r"[^\w.]+", "_", name)

    def _known(self, name: str) -> Row:
        file = self._place(name) / "row.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def _program(self, recipe: str) -> gp.Program:
        if not recipe:
            return self.dense
        place = self._place(recipe)
        if not place.exists():
            data = gp.Calibration.from_text(
                self.calibration, str(self.directory), samples=self.samples, length=256
            )
            passes = gp.Pipeline.parse(recipe)
            passes.run(self.dense, calibration=data, quiet=True).program.save(place)
        return gp.load(place)

    def _written(self, name: str, kind: str, recipe: str = "") -> Row:
        if known := self._known(name):
            return known
        program = self._program(recipe)
        path = self._place(name) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        try:
            report = backend.export(
                program,
                path,
                target="cpu",
                check=False,
                quantization=KINDS[kind],
                external_data=True,
                overwrite=True,
            )
        except gp.errors.GraphPruneError as error:
            return {"why": first_line(error)}
        row: Row = {"path": str(path), "bytes": report.bytes, "kind": kind}
        row |= {"export": time.process_time() - start, "recipe": recipe}
        costs = Costs(gp.analyze(program))
        row |= {
            "macs": float(costs.after("macs", {})),
            "parameters": program.parameter_count(),
            "cache": _cache_bytes(path),
        }
        self.keep(name, row)
        return row

    def _built(self, genai: Path) -> Row:
        """Return what onnxruntime-genai's builder makes of the checkpoint, with blocks as ours."""
        if known := self._known(BUILT):
            return known
        place = self._place(BUILT)
        try:
            build(genai, self.directory, place, "int4", *_AS_OURS)
        except RuntimeError as error:
            return {"why": first_line(error)}
        config = transformers.AutoConfig.from_pretrained(self.directory)
        model = onnx.load(place / "model.onnx", load_external_data=False)
        for value in model.graph.input:
            if value.name.startswith("past_key_values"):  # their sizes are names there
                sizes = value.type.tensor_type.shape.dim
                sizes[1].dim_value, sizes[3].dim_value = config.num_key_value_heads, config.head_dim
        onnx.save(model, place / "model.onnx")
        size = sum(path.stat().st_size for path in place.glob("*.onnx*"))
        row = {"path": str(place / "model.onnx"), "bytes": size}
        self.keep(BUILT, row)
        return row


def _cache_bytes(path: Path) -> int:
    """Bytes of the caches for one token."""
    return sum(
        4 * sizes[1].dim_value * sizes[3].dim_value
        for value in onnx.load(path, load_external_data=False).graph.input
        if len(sizes := value.type.tensor_type.shape.dim) == 4
    )


def _loaded(path: str) -> Row:
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


def _feeds(opened: Any, ids: np.ndarray[Any, Any], past: int) -> dict[str, Any]:
    rows, new = ids.shape
    feeds = {"input_ids": ids, "attention_mask": np.ones((rows, past + new), np.int64)}
    for value in opened.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = (rows, value.shape[1], past, value.shape[3])
            feeds[value.name] = np.random.default_rng(0).standard_normal(shape, np.float32) * 0.1
    return feeds


def _loss(path: str, batches: Any) -> float:
    opened, losses = session(Path(path), 1), []
    name = opened.get_outputs()[0].name
    for batch in batches:
        (logits,) = opened.run([name], _feeds(opened, batch["input_ids"].numpy(), 0))
        losses.append(float(next_token_loss(torch.from_numpy(logits).float(), batch)))
    return statistics.mean(losses)


class Bound:
    """A session with inputs, and room for its outputs, bound to it."""

    def __init__(self, path: str, work: tuple[int, int]) -> None:
        past, new = work
        self.session = session(Path(path), 1)
        self.io = self.session.io_binding()
        ids = np.random.default_rng(0).integers(3, 1000, (1, new))
        self.feeds = feeds = _feeds(self.session, ids, past)
        for name, array in feeds.items():
            self.io.bind_cpu_input(name, array)
        sizes = [array.shape for array in self.session.run(None, feeds)]
        self.room = [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(s, np.float32) for s in sizes
        ]
        for value, room in zip(self.session.get_outputs(), self.room, strict=True):
            self.io.bind_ortvalue_output(value.name, room)

    def run(self) -> None:
        """Run it."""
        self.session.run_with_iobinding(self.io)


def _timed(paths: Mapping[str, str], work: tuple[int, int], turns: int) -> dict[str, list[float]]:
    """Milliseconds of a run in every turn."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(ROUNDS):
        order = list(paths) if number % 2 else list(paths)[::-1]
        ready = {name: Bound(paths[name], work) for name in order}
        runs = 4 if work[1] == 1 else 1
        for turn in range(-(-turns // ROUNDS)):
            random.Random(turn).shuffle(order)
            for name in order:
                start = time.process_time()
                for _ in range(runs):
                    ready[name].run()
                times[name].append(1e3 * (time.process_time() - start) / runs)
    return times


if __name__ == "__main__":
    typer.run(main)
