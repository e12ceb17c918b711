"""Prune the reference checkpoint for you to see; tools/demo.sh sets everything up and runs this.

The checkpoint that comes with graphprune is looked at, pruned, refitted and merged pass by pass,
verified, saved, loaded again by plain transformers in a process of its own, exported to ONNX and
run in ONNX Runtime. Beside it stands what the same passes make of units chosen without data.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import graphprune as gp
from graphprune import reference
from graphprune.errors import GraphPruneError, OutputError, VerificationError
from graphprune.evaluation.perplexity import perplexity
from graphprune.io.progress import DisplayFactory, display_factory, progress_bar
from graphprune.ir.program import PAST, PRESENT, Program
from graphprune.pipeline.instruments import Instrument, PassPosition
from graphprune.pipeline.pass_base import Context, Outcome
from graphprune.pipeline.pass_manager import Result
from graphprune.report.overview import group_table

STEPS = {
    "FFN -25 %": "prune{{target=ffn ratio=0.25 criterion={criterion}}}",
    "refitted": "reconstruct",
    "KV heads 8 to 4": "merge-kv-heads{{groups=4}}",
}
"""What is done, in this order: a heading and a pass."""

CRITERIA = ("taylor", "magnitude", "random")
"""How units are chosen; the first one's result is verified, written and raced."""

KEPT = CRITERIA[0]

WRITE = "verify,save-pretrained{path=checkpoint},export-onnx{path=model.onnx}"
"""What is done with the result that is kept."""

PROMPT = 256
"""Tokens of a prefill, and in the cache while decoding."""

ROUNDS = 20
"""How often each speed is measured."""

MARK = ".graphprune-demo"
"""Lies in a folder that this tool wrote and may replace."""

TOLERANCE = 1e-3
"""Largest relative difference of logits between two ways to run one program."""

RELOAD = """
import sys
import numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.from_numpy(numpy.load(sys.argv[2]))).logits
numpy.save(sys.argv[3], logits.numpy())
assert "graphprune" not in sys.modules
"""
"""Runs where graphprune is never imported."""


@dataclass(frozen=True)
class Row:
    """A program on the way: its size and its perplexity."""

    parameters: int
    cache: int
    perplexity: float


@dataclass
class Watch(Instrument):
    """Measures what every pass leaves."""

    measure: Callable[[Program], Row]
    rows: list[Row] = field(default_factory=list)

    def after_pass(self, place: PassPosition, outcome: Outcome, context: Context) -> None:
        """Measure the new program, unless the pass only checks or writes."""
        if not place.pass_.required:
            self.rows.append(self.measure(outcome.program))


@dataclass(frozen=True)
class Speed:
    """Tokens per second in ONNX Runtime."""

    prefill: float
    decode: float


def main(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder; an earlier demo in it is replaced.")
    ] = Path("out/demo"),
    max_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens to measure on; all of them if left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of every timing.")] = ROUNDS,
) -> None:
    """Prune, merge, verify, save, reload and export the reference checkpoint."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    began = time.monotonic()
    try:
        demonstrate(output, max_tokens, rounds)
    except GraphPruneError as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(f"{time.monotonic() - began:.0f} s in all")


def demonstrate(output: Path, max_tokens: int | None, rounds: int) -> None:
    """Do it all, leaving the results in `output`."""
    console, progress = Console(highlight=False), display_factory()
    console = console if console.is_terminal else Console(highlight=False, width=100)
    source = reference.checkpoint_dir()
    make_room(output)
    program = gp.load(source)
    console.print(f"{source}\n{size_text(program)}\n")
    console.print(group_table(program, gp.analyze(program)))

    def measure(candidate: Program) -> Row:
        found = perplexity(
            candidate,
            reference.heldout_text(),
            source,
            max_tokens=max_tokens,
            progress=progress or False,
        )
        sizes = candidate.parameter_count(), candidate.kv_bytes_per_token()
        return Row(*sizes, found.perplexity)

    first = measure(program)
    rows: dict[str, list[Row]] = {}
    results: dict[str, Result] = {}
    calibration = gp.Calibration.from_text(reference.calibration_text(), source)
    for criterion in CRITERIA:
        watch = Watch(measure, [first])
        text = ",".join(STEPS.values()).format(criterion=criterion)
        text += f",{WRITE}" if criterion == KEPT else ""
        console.print(Text(f"\n$ graphprune run reference --passes '{text}' -o {output}"))
        results[criterion] = gp.Pipeline.parse(text).run(
            program,
            calibration=calibration,
            output=output,
            instruments=[watch],
            quiet=progress is None,
        )
        rows[criterion] = watch.rows

    result = results[KEPT]
    result.plan.save(output / "plan.json")
    report = result.report.to_json()
    (output / "report.json").write_text(report, encoding="utf-8")
    proof = next(r.details for r in result.report.passes if r.name == "verify")
    program.export_onnx(output / "dense.onnx")

    ids = sample(program)
    reloaded = difference(result.program, ids, plain_transformers(output, ids))
    session = open_session(output / "model.onnx")
    in_runtime = difference(result.program, ids, onnx_logits(session, result.program, ids))
    decoded = decode_difference(session, result.program, ids)
    dense = open_session(output / "dense.onnx")
    speeds = race(
        {"dense": (dense, program), "result": (session, result.program)}, rounds, progress
    )

    files = {
        "checkpoint": (weights_bytes(source), weights_bytes(output / "checkpoint")),
        "ONNX file": tuple((output / n).stat().st_size for n in ("dense.onnx", "model.onnx")),
    }
    console.print()
    console.print(final_table(rows, files, speeds))
    console.print(
        "perplexity on held-out text\n"
        f"speeds: ONNX Runtime on the CPU, {PROMPT} tokens in the prompt or the cache\n"
        f"\nmax relative error of the result against ...\n"
        f"  the original, refitted, heads that merge equal   {proof['max_relative_error']:.1e}\n"
        f"  plain transformers, loaded from the checkpoint   {reloaded:.1e}\n"
        f"  ONNX Runtime, one window                         {in_runtime:.1e}\n"
        f"  ONNX Runtime, ten decode steps                   {decoded:.1e}\n"
    )
    for name in ("checkpoint", "model.onnx", "plan.json", "report.json"):
        console.print(f"  {output / name}", soft_wrap=True)


# -- files --------------------------------------------------------------------------------------


def make_room(output: Path) -> None:
    """Make `output` an empty folder; only an earlier demo is removed for that.

    Raises
    ------
    OutputError
        When something else is there, or no folder can be made.
    """
    if output.exists() and not (output.is_dir() and (output / MARK).is_file()):
        if not output.is_dir() or any(output.iterdir()):
            raise OutputError(f"{output} holds something that this demo did not write")
    elif output.exists():
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARK).touch()
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}") from error


def weights_bytes(directory: Path) -> int:
    """Bytes of the weight files in a checkpoint."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def size_text(program: Program) -> str:
    """Parameters and cache of `program` in words."""
    return (
        f"{program.parameter_count():,} parameters, "
        f"{program.kv_bytes_per_token():,} bytes of KV cache per token"
    )


# -- the same program elsewhere -----------------------------------------------------------------


def sample(program: Program) -> torch.Tensor:
    """Tokens to compare logits on, ``[2, 24]``."""
    vocabulary = int(program.outputs[0].shape[-1])
    return torch.randint(vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))


def plain_transformers(output: Path, ids: torch.Tensor) -> np.ndarray[Any, Any]:
    """Logits of the written checkpoint in a process that never imports graphprune."""
    given, got = output / ".ids.npy", output / ".logits.npy"
    np.save(given, ids.numpy())
    command = [sys.executable, "-c", RELOAD, str(output / "checkpoint"), str(given), str(got)]
    subprocess.run(command, check=True)
    logits: np.ndarray[Any, Any] = np.load(got)
    given.unlink()
    got.unlink()
    return logits


def difference(
    program: Program, ids: torch.Tensor, logits: np.ndarray[Any, Any], what: str = "logits"
) -> float:
    """Return the largest difference from the program's logits, relative to the largest of those.

    Raises
    ------
    VerificationError
        When it is beyond `TOLERANCE`.
    """
    return relative(program(input_ids=ids)["logits"].numpy(), logits, what)


def relative(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any], what: str) -> float:
    """Return the largest difference over the largest expected; refuse it beyond `TOLERANCE`."""
    found = float(np.abs(expected - got).max() / np.abs(expected).max())
    if not found <= TOLERANCE:
        raise VerificationError(f"{what} differ from the program's by {found:.1e}")
    return found


# -- ONNX Runtime -------------------------------------------------------------------------------


def open_session(path: Path) -> Any:
    """Open an ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(
    program: Program, ids: np.ndarray[Any, Any], past: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Everything that a decoder takes for the tokens `ids` after the cache `past`."""
    held = {}
    for value in program.inputs:
        if value.name.startswith(PAST):
            _, heads, _, width = value.shape
            empty = np.zeros((len(ids), int(heads), 0, int(width)), dtype=np.float32)
            held[value.name] = past.get(value.name, empty)
    length = ids.shape[1] + next(iter(held.values())).shape[2]
    mask = np.ones((len(ids), length), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": mask, **held}


def step(
    session: Any, inputs: dict[str, np.ndarray[Any, Any]]
) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Run a decoder; return its logits and the cache to go on with."""
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, inputs), strict=True))
    logits = outputs.pop("logits")
    return logits, {name.replace(PRESENT, PAST, 1): value for name, value in outputs.items()}


def onnx_logits(session: Any, program: Program, ids: torch.Tensor) -> np.ndarray[Any, Any]:
    """Logits of a whole window in ONNX Runtime."""
    return step(session, feed(program, ids.numpy(), {}))[0]


def decode_difference(session: Any, program: Program, ids: torch.Tensor, steps: int = 10) -> float:
    """Decode `steps` tokens one by one in ONNX Runtime; compare with the program on all at once."""
    expected = program(input_ids=ids)["logits"].numpy()
    start = ids.shape[1] - steps
    _, past = step(session, feed(program, ids[:, :start].numpy(), {}))
    got = []
    for position in range(start, ids.shape[1]):
        one = ids[:, position : position + 1].numpy()
        logits, past = step(session, feed(program, one, past))
        got.append(logits)
    return relative(expected[:, start:], np.concatenate(got, 1), "decoded logits")


def race(
    entrants: Mapping[str, tuple[Any, Program]], rounds: int, progress: DisplayFactory | None
) -> dict[str, Speed]:
    """Prefill and decode speed of each entrant: medians, taken in turns."""
    ids = np.zeros((1, PROMPT), dtype=np.int64)
    jobs = {}
    for name, (session, program) in entrants.items():
        prefill = feed(program, ids, {})
        _, past = step(session, prefill)
        jobs[name] = session, prefill, feed(program, ids[:, :1], past)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in jobs}
    with progress_bar(progress, "timing ONNX Runtime", total=rounds) as advance:
        for _ in range(rounds):
            for name, (session, prefill, decode) in jobs.items():
                times[name][0].append(seconds(session, prefill))
                times[name][1].append(statistics.median(seconds(session, decode) for _ in range(9)))
            advance(1)
    return {
        name: Speed(PROMPT / statistics.median(first), 1 / statistics.median(second))
        for name, (first, second) in times.items()
    }


def seconds(session: Any, inputs: dict[str, np.ndarray[Any, Any]]) -> float:
    """Wall-clock seconds of one run."""
    began = time.perf_counter()
    session.run(None, inputs)
    return time.perf_counter() - began


# -- the table ----------------------------------------------------------------------------------


def final_table(
    rows: Mapping[str, list[Row]],
    files: Mapping[str, tuple[int, ...]],
    speeds: Mapping[str, Speed],
) -> Table:
    """Everything that was measured: a column for the original and one after each pass."""
    table = Table("", *("original", *STEPS), title="the reference checkpoint, pass by pass")
    for column in table.columns[1:]:
        column.justify = "right"
    kept = rows[KEPT]
    blank = [""] * (len(STEPS) - 1)
    table.add_row("parameters", *(cell(r.parameters, kept[0].parameters) for r in kept))
    table.add_row("KV bytes per token", *(cell(r.cache, kept[0].cache) for r in kept))
    table.add_section()
    for criterion, found in rows.items():
        table.add_row(f"perplexity, {criterion}", *(f"{row.perplexity:.2f}" for row in found))
    table.add_section()
    for name, (before, after) in files.items():
        table.add_row(f"{name}, bytes", f"{before:,}", *blank, cell(after, before))
    dense, result = speeds["dense"], speeds["result"]
    for name, slow, fast in (
        ("prefill, tokens/s", dense.prefill, result.prefill),
        ("decode, tokens/s", dense.decode, result.decode),
    ):
        table.add_row(name, f"{slow:,.0f}", *blank, f"{fast:,.0f} ({fast / slow:.2f} x)")
    return table


def cell(value: int, before: int) -> str:
    """`value`, with its change in percent if it changed."""
    return f"{value:,}" if value == before else f"{value:,} ({100 * (value / before - 1):+.0f} %)"


if __name__ == "__main__":
    typer.run(main)
