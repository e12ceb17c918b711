"""Time and memory at the size of a real checkpoint, each beside the limit of the same machine.

    python tools/bench_scale.py make FOLDER [--shape 7b]
    python tools/bench_scale.py measure FOLDER [--row NAME ...]

`make` writes a checkpoint with the shapes of Llama 2 7B in bfloat16 (13.5 GB of random numbers),
shard by shard. `measure` runs the command line on it, each row in a process of its own, and
writes ``tools/SCALE.md`` from all rows that FOLDER has figures of. Peak is anonymous memory, which
mapped pages of files are not counted in. The limit beside a row that moves weights is the time in
which the files are copied.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from graphprune.weights.deferred import Deferred
from graphprune.weights.writing import write_shards

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TABLE = Path(__file__).resolve().parent / "SCALE.md"
FIGURES = "figures.jsonl"
_L2 = "prune{target=ffn ratio=0.25 criterion=l2}"

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {},  # LlamaConfig is that of Llama 2 7B
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}


@dataclass(frozen=True)
class Figure:
    """What a row took.

    Parameters
    ----------
    name
        The row.
    seconds
        Of the clock.
    processor_seconds
        Of processor time, user and system.
    peak
        Most anonymous bytes that the process had.
    """

    name: str
    seconds: float
    processor_seconds: float
    peak: int


def model_on_meta(shape: str) -> Any:
    """Return a Llama of a shape, without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)


def write_checkpoint(shape: str, folder: Path, shard_size: str = "5GB") -> None:
    """Write a checkpoint of random numbers, a tensor at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model_on_meta(shape)
    model.config.architectures, model.config.dtype = [type(model).__name__], "bfloat16"
    model.config.save_pretrained(folder)
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()

    def drawn(like: torch.Tensor) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            if like.ndim == 1:
                return torch.ones(like.shape, dtype=torch.bfloat16)
            copies = -(-like.numel() // len(block))
            return (block.repeat(copies)[: like.numel()] * like.shape[1] ** -0.5).view(like.shape)

        return make

    weights: dict[str, torch.Tensor] = {
        name: Deferred(drawn(like), like.shape, torch.bfloat16)
        for name, like in model.state_dict().items()
    }
    write_shards(weights, folder, shard_size=shard_size)


# -- measuring ------------------------------------------------------------------------------------


def watched(name: str, command: list[str]) -> Figure:
    """Run a command, and return what it took."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    used = os.times()
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    now = os.times()
    if process.returncode:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    spent = (now.children_user - used.children_user) + (now.children_system - used.children_system)
    return Figure(name, time.monotonic() - start, spent, peak)


def rows(folder: Path, memory: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every row's name and command, in an order in which each finds what it needs."""
    cli = [sys.executable, "-m", "graphprune"]
    model, pruned, again = folder / "model", folder / "pruned", folder / "applied"
    yield "inspect", [*cli, "inspect", str(model), "--no-cache"]
    yield "copy the files", ["cp", "-r", str(model), str(folder / "copy")]
    yield "plan by l2 and write", [*cli, "run", str(model), "--passes", _L2, "-o", str(pruned)]
    yield "apply", [*cli, "apply", str(model), str(pruned / "plan.json"), "-o", str(again)]
    yield "verify", [*cli, "verify", str(model), str(again), "--memory", memory]
    yield "70B on meta: capture and plan", [sys.executable, __file__, "plan-on-meta", "70b"]


def table(figures: list[Figure], about: str) -> str:
    """Return the table as Markdown."""
    lines = [
        f"# At size: {about}",
        "",
        "Written by `python tools/bench_scale.py measure`, every row in a process of its own. On a",
        "busy machine the clock says little, and differs between rows; processor time says more.",
        "",
        "| work | seconds | of them processor | peak anonymous memory, GB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {each.name} | {each.seconds:.0f} | {each.processor_seconds:.0f} "
        f"| {each.peak / 1e9:.2f} |"
        for each in figures
    ]
    return "\n".join(lines) + "\n"


@app.command()
def make(folder: Path, shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "7b") -> None:
    """Write the checkpoint."""
    write_checkpoint(shape, folder / "model")


@app.command()
def measure(
    folder: Path,
    row: Annotated[list[str] | None, typer.Option(help="Only these rows.")] = None,
    memory: Annotated[str, typer.Option(help="The limit for verify.")] = "6GB",
) -> None:
    """Measure, and write the table of all that is known."""
    file = folder / FIGURES
    known = {}
    if file.exists():
        for line in file.read_text().splitlines():
            figure = Figure(**json.loads(line))
            known[figure.name] = figure
    outputs = {"copy the files": "copy", "plan by l2 and write": "pruned", "apply": "applied"}
    for name, command in rows(folder, memory):
        if row and name not in row:
            continue
        if name in outputs:
            shutil.rmtree(folder / outputs[name], ignore_errors=True)
        known[name] = watched(name, command)
        print(known[name])
        if name == "copy the files":
            shutil.rmtree(folder / "copy")
        with file.open("a") as stream:
            stream.write(json.dumps(asdict(known[name])) + "\n")
    size = sum(each.stat().st_size for each in (folder / "model").glob("*.safetensors"))
    cores, load = os.cpu_count(), os.getloadavg()[0]
    about = f"{size / 1e9:.1f} GB in bfloat16, on {cores} cores with {load:.0f} processes running"
    TABLE.write_text(table(list(known.values()), about), encoding="utf-8")


@app.command()
def plan_on_meta(shape: str) -> None:
    """Capture a model without weights, plan by a pass without data, and cut it."""
    import graphprune as gp

    program = gp.capture(model_on_meta(shape))
    result = gp.Pipeline.parse(_L2.replace("l2", "random")).run(program)
    print(f"{program.parameter_count():,} -> {result.program.parameter_count():,} parameters")


if __name__ == "__main__":
    app()
