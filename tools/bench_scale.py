"""Time and memory at the size of a real checkpoint, each beside the limit of the same machine.

    python tools/bench_scale.py make FOLDER [--shape 7b]
    python tools/bench_scale.py measure FOLDER [--row NAME ...]
    python tools/bench_scale.py measure-on-data FOLDER [--row NAME ...]
    python tools/bench_scale.py beside-forward FOLDER [--passes TEXT ...]
    python tools/bench_scale.py divide FOLDER [--rounds N]

`make` writes a checkpoint with the shapes of Llama 2 7B in bfloat16 (13.5 GB of random numbers),
shard by shard. `measure` runs the command line on it, each row in a process of its own, and
writes ``tools/SCALE.md`` from all rows that FOLDER has figures of. Peak is anonymous memory, which
mapped pages of files are not counted in. The limit beside a row that moves weights is the time in
which the files are copied. `measure-on-data` does so with passes that run the model on text; two
layers of the same widths (``--shape 7b-two-layers``) show what they hold. `beside-forward` measures
passes and plain forward passes of the same windows in one process. `divide` measures statistics by
one process and by two that divide the data, in turns, on a small checkpoint that it
makes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from graphprune.io import reference
from graphprune.weights.deferred import Deferred
from graphprune.weights.writing import write_shards

if TYPE_CHECKING:
    from graphprune.calibration.data import Calibration
    from graphprune.ir.program import Program

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TABLE = Path(__file__).resolve().parent / "SCALE.md"
FIGURES = "figures.jsonl"
_L2 = "prune{target=ffn ratio=0.25 criterion=l2}"

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {},  # LlamaConfig is that of Llama 2 7B
    "7b-two-layers": {"num_hidden_layers": 2},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "small": {
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
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


def rows_on_data(folder: Path, samples: int, length: int) -> Iterator[tuple[str, list[str]]]:
    """Yield name and command of every row that runs the model on text."""
    data = ["--calibration", str(reference.calibration_text()), "--samples", str(samples)]
    data += ["--calibration-length", str(length)]
    ffn = "prune{target=ffn ratio=0.25"
    for name, passes, memory in (
        ("sparsify, wanda 0.5", "sparsify{pattern=0.5 criterion=wanda}", "3GB"),
        ("taylor", f"{ffn}}}", "6GB"),
        ("obs, reconstruct", f"{ffn} criterion=obs}},reconstruct", "6GB"),
        ("merge-kv-heads, aligned", "merge-kv-heads{groups=16 init=aligned}", "6GB"),
    ):
        command = [sys.executable, "-m", "graphprune", "run", str(folder / "model"), *data]
        out = ["--memory", memory, "-o", str(folder / "smaller"), "--overwrite"]
        yield name, [*command, "--passes", passes, *out]


def table(figures: list[Figure], about: str, command: str = "measure") -> str:
    """Return the table as Markdown."""
    title = "# At size" if command == "measure" else "## On text"
    lines = [
        f"{title}: {about}",
        "",
        f"Written by `python tools/bench_scale.py {command}`, every row in a process of its own.",
        "On a busy machine the clock says little, and differs between rows; processor time says",
        "more.",
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
    """Write the checkpoint, with the tokenizer of the packaged model."""
    write_checkpoint(shape, folder / "model")
    for file in reference.checkpoint_dir().glob("tokenizer*"):
        shutil.copy(file, folder / "model")


@app.command()
def measure(
    folder: Path,
    row: Annotated[list[str] | None, typer.Option(help="Only these rows.")] = None,
    memory: Annotated[str, typer.Option(help="The limit for verify.")] = "6GB",
) -> None:
    """Measure, and write the table of all that is known."""
    outputs = {"copy the files": "copy", "plan by l2 and write": "pruned", "apply": "applied"}
    known = _known(folder)
    for name, command in rows(folder, memory):
        if row and name not in row:
            continue
        if name in outputs:
            shutil.rmtree(folder / outputs[name], ignore_errors=True)
        known[name] = _kept(folder, watched(name, command))
        if name == "copy the files":
            shutil.rmtree(folder / "copy")
    of_data = {name for name, _ in rows_on_data(folder, 1, 1)}
    figures = [figure for name, figure in known.items() if name not in of_data]
    write_part(table(figures, _about(folder)))


@app.command()
def measure_on_data(
    folder: Path,
    row: Annotated[list[str] | None, typer.Option(help="Only these rows.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
) -> None:
    """Measure passes that run the model on text, and write the table of all that is known."""
    known, named = _known(folder), dict(rows_on_data(folder, samples, length))
    for name, command in named.items():
        if not row or name in row:
            known[name] = _kept(folder, watched(name, command))
    config = json.loads((folder / "model" / "config.json").read_text())
    about = f"{config['num_hidden_layers']} layers, {samples} x {length} tokens, {_about(folder)}"
    figures = [known[name] for name in named if name in known]
    write_part(table(figures, about, "measure-on-data"))


def _known(folder: Path) -> dict[str, Figure]:
    """Return the last figures of every row that FOLDER has some of."""
    file = folder / FIGURES
    lines = file.read_text().splitlines() if file.exists() else []
    return {figure.name: figure for figure in (Figure(**json.loads(line)) for line in lines)}


def _kept(folder: Path, figure: Figure) -> Figure:
    """Keep figures in FOLDER, and print them."""
    print(figure)
    with (folder / FIGURES).open("a") as stream:
        stream.write(json.dumps(asdict(figure)) + "\n")
    return figure


def _about(folder: Path) -> str:
    size = sum(each.stat().st_size for each in (folder / "model").glob("*.safetensors"))
    cores, load = os.cpu_count(), os.getloadavg()[0]
    return f"{size / 1e9:.1f} GB in bfloat16, on {cores} cores with {load:.0f} processes running"


# -- beside plain forward passes ------------------------------------------------------------------

PASSES = (
    "sparsify{pattern=0.5 criterion=wanda}",
    "prune{target=ffn ratio=0.25}",
    "prune{target=ffn ratio=0.25 criterion=obs},reconstruct",
    "merge-kv-heads{groups=16 init=aligned}",
)


@app.command()
def beside_forward(
    folder: Path,
    passes: Annotated[list[str] | None, typer.Option(help="Pipelines to measure.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    memory: Annotated[str, typer.Option(help="The limit for passes.")] = "6GB",
) -> None:
    """Measure passes beside forward passes by transformers, one window at a time, in float32."""
    from transformers import AutoModelForCausalLM

    import graphprune as gp

    model, found = folder / "model", []
    text = reference.calibration_text()
    data = gp.Calibration.from_text(text, model, samples=samples, length=length)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    start = time.process_time()
    with torch.no_grad():
        for batch in data:
            for window in batch["input_ids"].split(1):
                plain(window)
    forward = time.process_time() - start
    del plain
    program = gp.load(model, memory=memory)
    for each in passes or PASSES:
        start = time.process_time()
        gp.Pipeline.parse(each).run(program, calibration=data, quiet=True)
        found.append((each, time.process_time() - start))
        print(*found[-1], forward, flush=True)
    layers = program.source.config.num_hidden_layers if program.source else 0
    lines = [
        f"## Beside forward passes: {layers} layers, {samples} x {length} tokens, {memory}",
        "",
        "Written by `python tools/bench_scale.py beside-forward`, in one process: processor time",
        "of a pass, and of forward passes by plain transformers, in float32, a window at a time.",
        "",
        "| work | seconds | of the forward passes |",
        "|---|---|---|",
        f"| forward passes | {forward:.0f} | |",
        *(f"| {each} | {took:.0f} | {took / forward:.2f} |" for each, took in found),
    ]
    write_part("\n".join(lines) + "\n")


# -- dividing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divided:
    """What statistics took one process, and two that divided them; medians over rounds.

    Parameters
    ----------
    name
        Which statistics.
    alone, together
        Seconds of the clock.
    ratio
        Of the clock, of a round.
    processor_alone, processor_each
        Seconds of processor time, of the one and of each of the two.
    difference
        The largest relative difference between what they made.
    """

    name: str
    alone: float
    together: float
    ratio: float
    processor_alone: float
    processor_each: float
    difference: float


@app.command()
def divide(folder: Path, rounds: int = 7, shape: str = "small") -> None:
    """Measure statistics by one process and by two, and write their table."""
    model = folder / f"divided-{shape}"
    if not model.exists():
        write_checkpoint(shape, model)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*launcher, __file__, "divided-by-two", str(model), str(rounds)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = [Divided(**json.loads(line)) for line in found.splitlines()]
    print(*figures, sep="\n")
    write_part(divided_table(figures, rounds))


@app.command(hidden=True)
def divided_by_two(model: Path, rounds: int) -> None:
    """Measure, in one of two processes; the first prints figures."""
    import graphprune as gp
    from graphprune import ranks
    from graphprune.calibration.tokens import token_batch

    with ranks.joined([]):
        program = gp.load(model)
        ids = torch.randint(0, 512, (16, 128), generator=torch.Generator().manual_seed(0))
        data = gp.Calibration.from_batches([token_batch(each) for each in ids.split(2)])
        for name, measure in measurements(program, data).items():
            figure = compared(name, measure, rounds)
            if ranks.is_first():
                print(json.dumps(asdict(figure)), flush=True)


Measurement = Callable[[], list[torch.Tensor]]


def measurements(program: Program, data: Calibration) -> dict[str, Measurement]:
    """Return what is measured: moments, products of pairs, and gradients of all matrices."""
    import graphprune as gp
    from graphprune.analysis.matrices import contractions
    from graphprune.calibration.statistics import observe
    from graphprune.criteria.base import ScoringContext
    from graphprune.criteria.gradients import loss_gradients

    matrices = contractions(program).matrices
    context = ScoringContext(program, gp.analyze(program), (), data)

    def moments() -> list[torch.Tensor]:
        return [each.squares for each in observe(program, matrices, data).values()]

    def products() -> list[torch.Tensor]:
        found = observe(program, matrices, data, "gram").values()
        return [each.gram for each in found if each.gram is not None]

    def gradients() -> list[torch.Tensor]:
        return [each for _, each in loss_gradients(context, [m.weight for m in matrices])]

    return {"moments": moments, "products of pairs": products, "gradients": gradients}


def compared(name: str, measure: Measurement, rounds: int) -> Divided:
    """Measure by the first process alone and by both, in turns."""
    from graphprune import ranks

    def timed() -> tuple[list[torch.Tensor], float, float]:
        clock, processor = time.perf_counter(), time.process_time()
        found = measure()
        return found, time.perf_counter() - clock, time.process_time() - processor

    took: list[Divided] = []
    for number in range(rounds + 1):
        one: list[torch.Tensor] = []
        alone = processor = 0.0
        if ranks.is_first():
            with ranks.alone():
                one, alone, processor = timed()
        ranks.agree(number, "they are in different rounds")
        two, together, own = timed()
        each = ranks.gathered(torch.tensor([own])).mean().item()
        pairs = zip(one, two, strict=bool(one))
        apart = [float((a - b).norm() / a.norm().clamp(min=1e-30)) for a, b in pairs]
        ratio = together / alone if alone else 0.0
        worst = max(apart, default=0.0)
        took.append(Divided(name, alone, together, ratio, processor, each, worst))
    figures = [field.name for field in fields(Divided) if field.name != "name"]
    # The first round warms up.
    medians = {key: statistics.median(getattr(each, key) for each in took[1:]) for key in figures}
    return Divided(name, **medians)


def divided_table(figures: list[Divided], rounds: int) -> str:
    """Return the table as Markdown."""
    lines = [
        "## One process, and two that divide the data",
        "",
        "Written by `python tools/bench_scale.py divide`: statistics of all matrices of a Llama of",
        f"6 layers, 512 wide, on 16 windows of 128 tokens, with one thread each; {rounds} rounds",
        "in turns, medians. Seconds, of the clock and of the processor; the ratio is of the clock,",
        "within a round, and the difference is the largest of any matrix, relative.",
        "",
        "| statistics | one | two | ratio | processor: one | each of two | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.name} | {each.alone:.2f} | {each.together:.2f} | {each.ratio:.2f} "
        f"| {each.processor_alone:.2f} | {each.processor_each:.2f} | {each.difference:.0e} |"
        for each in figures
    ]
    return "\n".join(lines) + "\n"


def write_part(part: str) -> None:
    """Write one of the tables, and keep the others."""
    known = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    parts = [each for each in re.split(r"^(?=##? )", known, flags=re.MULTILINE) if each.strip()]
    kinds = [_title(each) for each in parts]
    if _title(part) in kinds:
        parts[kinds.index(_title(part))] = part
    else:
        parts.append(part)
    parts.sort(key=lambda each: each.startswith("## "))  # the first heading stays the first
    TABLE.write_text("\n".join(each.strip() + "\n" for each in parts), encoding="utf-8")


def _title(part: str) -> str:
    """Return what tells a part from others: its heading, without what a colon adds."""
    return part.partition("\n")[0].partition(":")[0]


@app.command()
def plan_on_meta(shape: str) -> None:
    """Capture a model without weights, plan by a pass without data, and cut it."""
    import graphprune as gp

    program = gp.capture(model_on_meta(shape))
    result = gp.Pipeline.parse(_L2.replace("l2", "random")).run(program)
    print(f"{program.parameter_count():,} -> {result.program.parameter_count():,} parameters")


if __name__ == "__main__":
    app()
