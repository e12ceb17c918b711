"""Decoding and prompts in ONNX Runtime on one CPU thread: by target, and before and after merging.

    python tools/bench_onnx.py          # a Markdown table of milliseconds, and what merging gains

A random Llama of 6 layers, 512 hidden and 16 heads of 32 is exported with all its KV heads and with
4, for no target and for each that the CPU runs. All of them take turns; the process time of a run
counts, which other load moves little, and of it the median.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import transformers as tf
import typer
from rich.console import Console
from rich.progress import track

import graphprune as gp

TARGETS = (None, "portable", "cpu")
WORK = {"1 token, past 64": (64, 1), "1 token, past 2048": (2048, 1), "256 tokens": (0, 256)}
VOCABULARY = 1024


def main(
    turns: Annotated[int, typer.Option(help="Runs of each model and kind of work.")] = 30,
) -> None:
    """Export, run in turns, and print the table."""
    torch.set_num_threads(1)
    console = Console(stderr=True)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=16,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    wide = gp.capture(tf.LlamaForCausalLM(config).eval())
    merge = gp.Pipeline.parse("merge-kv-heads{groups=4}")
    programs = {16: wide, 4: merge.run(wide, quiet=True).program}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            (heads, target): session(program, Path(folder) / f"{heads}-{target}.onnx", target)
            for heads, program in programs.items()
            for target in TARGETS
        }
        found = {name: measured(sessions, *work, turns, console) for name, work in WORK.items()}
    print(f"| ms | {' | '.join(WORK)} |\n" + "|---" * (len(WORK) + 1) + "|")
    for heads, target in sessions:
        cells = (f"{found[name][heads, target]:.1f}" for name in WORK)
        print(f"| {heads} KV heads, {target or 'no target'} | {' | '.join(cells)} |")
    for target in TARGETS:
        gains = (f"{found[name][16, target] / found[name][4, target]:.2f}" for name in WORK)
        print(f"| 16 to 4, {target or 'no target'}: times | {' | '.join(gains)} |")


def session(program: gp.Program, path: Path, target: Any) -> onnxruntime.InferenceSession:
    """A session of one thread on `program` as it is exported for `target`."""
    program.export_onnx(path, target=target)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measured(
    sessions: dict[Any, Any], past: int, new: int, turns: int, console: Console
) -> dict[Any, float]:
    """The median process time of a run of each session, in ms; the first run does not count."""
    bound = {key: binding(each, past, new) for key, each in sessions.items()}
    times: dict[Any, list[float]] = {key: [] for key in sessions}
    for _ in track(range(turns + 1), f"{new} tokens, past {past}", console=console):
        for key, each in sessions.items():
            start = time.process_time()
            each.run_with_iobinding(bound[key][0])
            times[key].append(1e3 * (time.process_time() - start))
    return {key: statistics.median(each[1:]) for key, each in times.items()}


def binding(session: onnxruntime.InferenceSession, past: int, new: int) -> tuple[Any, list[Any]]:
    """Random inputs and room for all outputs, and what must live as long as they do."""
    generator = np.random.default_rng(0)
    io, held = session.io_binding(), []

    def bind(name: str, value: Any, how: Any) -> None:
        held.append(value)
        how(name, value)

    for given in session.get_inputs():
        if given.name == "input_ids":
            array = generator.integers(0, VOCABULARY, (1, new))
        elif given.name == "attention_mask":
            array = np.ones((1, past + new), np.int64)
        else:
            size = (1, given.shape[1], past, given.shape[3])
            array = generator.standard_normal(size).astype(np.float32)
        bind(given.name, onnxruntime.OrtValue.ortvalue_from_numpy(array), io.bind_ortvalue_input)
    for given in session.get_outputs():
        shape: tuple[int, ...] = (1, new, VOCABULARY)
        if given.name != "logits":
            shape = (1, given.shape[1], past + new, given.shape[3])
        room = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
        bind(given.name, room, io.bind_ortvalue_output)
    return io, held


if __name__ == "__main__":
    typer.run(main)
