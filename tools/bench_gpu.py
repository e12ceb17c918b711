"""ONNX packages on a GPU: where nodes run, parity, rates, memory, and what 2:4 gains. One command.

    python tools/bench_gpu.py                        # on a machine with a GPU
    python tools/bench_gpu.py --provider cpu --tiny  # everything that the CPU's provider can do

A random Llama is written for ``cuda`` as it is, with half of its FFN units and KV heads, and with
its KV heads merged to a quarter. Rows go to ``out/bench_gpu.jsonl`` as they are measured, and the
tables to ``tools/GPU_BENCH.md``. Rates are the medians of turns that all models take one after the
other. The attention kernel is what ONNX Runtime itself prints
(``ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO``).
"""

from __future__ import annotations

import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers as tf
import typer
from gpu_table import as_text
from rich.console import Console
from rich.progress import Progress

import graphprune as gp
from graphprune.backends.onnx.package import read_package, verify_package, write_package
from graphprune.backends.onnx.runtime.decoder import Batch, layout_of
from graphprune.backends.onnx.session import CPU, open_session, provider_name
from graphprune.errors import BackendError, GraphPruneError, first_line
from graphprune.frontend.capture import capture

HERE = Path(__file__).resolve().parent
ROWS = HERE.parent / "out" / "bench_gpu.jsonl"
TABLES = HERE / "GPU_BENCH.md"

RECIPES = {
    "dense": "",
    "pruned": "prune{target=ffn ratio=0.5 criterion=l2},prune{target=kv-heads ratio=0.5 "
    "criterion=l2}",
    "merged": "merge-kv-heads{groups=GROUPS}",
}
SPARSE = ((4096, 4096), (11008, 4096), (4096, 11008))
"""Matrices ``[out, in]`` whose 2:4 product is timed: those of a Llama of seven billions."""

_TENSORRT = "TensorrtExecutionProvider"

STEPS = 16
"""Tokens that are decoded in each turn."""


@dataclass(frozen=True)
class Size:
    """A random Llama, and what it is run on."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    batches: tuple[int, ...]
    pasts: tuple[int, ...]
    turns: int

    def model(self, dtype: torch.dtype) -> Any:
        """Make the model, the same each time."""
        config = tf.LlamaConfig(
            vocab_size=4096,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=max(self.pasts) + 64,
        )
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(config).eval().to(dtype)


FULL = Size(2048, 5632, 16, 32, (1, 8, 32), (128, 512, 2048, 8192), 5)
TINY = Size(64, 128, 2, 4, (1, 2), (8, 24), 2)


def main(
    provider: Annotated[str, typer.Option(help="cuda, or cpu to try the tool itself.")] = "cuda",
    dtypes: Annotated[str, typer.Option(help="Element types, by commas.")] = "float16,bfloat16",
    tiny: Annotated[bool, typer.Option(help="A model of two layers, in seconds.")] = False,
    rows: Annotated[Path, typer.Option(help="Where rows go.")] = ROWS,
    tables: Annotated[Path, typer.Option(help="Where the tables go.")] = TABLES,
) -> None:
    """Measure, and write the tables."""
    size, console = TINY if tiny else FULL, Console(stderr=True)
    found: list[dict[str, Any]] = []
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("w", encoding="utf-8") as file:

        def note(**row: Any) -> None:
            found.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

        note(kind="machine", **machine(provider))
        for name in dtypes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    measure(name, size, provider_name(provider), Path(folder), console, note)
                except GraphPruneError as error:
                    note(kind="failure", dtype=name, what=str(error))
        for by, products in (("torch", sparse_products), ("TensorRT", tensorrt_products)):
            for row in products():
                note(kind="sparse", by=by, **row)
    tables.write_text(as_text(found), encoding="utf-8")
    print(tables.read_text(encoding="utf-8"))


def machine(provider: str) -> dict[str, Any]:
    """Return what ran it."""
    versions = {}
    for name in ("graphprune", "torch", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    smi = _smi("name,driver_version,memory.total")
    return {"provider": provider, "gpu": smi or "none", "versions": versions}


def measure(
    dtype: str,
    size: Size,
    provider: str,
    folder: Path,
    console: Console,
    note: Callable[..., None],
) -> None:
    """All that is measured with one element type."""
    kind = getattr(torch, dtype)
    packages = dict(_packages(size, kind, folder, console))
    for model, package in packages.items():
        note(kind="package", dtype=dtype, model=model, **_described(package))
        try:
            ran = verify_package(package, provider=provider)
            note(kind="parity", dtype=dtype, model=model, error=ran.max_relative_error,
                 checks=len(ran.errors), notes=list(ran.notes))  # fmt: skip
        except GraphPruneError as error:
            note(kind="parity", dtype=dtype, model=model, error=None, notes=[str(error)])
    runnable = {model: path for model, path in packages.items() if _opens(path, provider)}
    for model, package in runnable.items():
        note(kind="placement", dtype=dtype, model=model, **placement(package, provider))
        note(kind="kernel", dtype=dtype, model=model, lines=kernels(package, provider))
        memory = peak_memory(package, provider, size)
        note(kind="memory", dtype=dtype, model=model, bytes=memory)
    sessions = {
        model: open_session(read_package(package).model, provider)
        for model, package in runnable.items()
    }
    for batch in size.batches:
        for past in size.pasts:
            for row in rates(runnable, sessions, batch, past, size.turns, console):
                note(kind="rate", dtype=dtype, batch=batch, past=past, **row)


def _packages(
    size: Size, dtype: torch.dtype, folder: Path, console: Console
) -> Iterator[tuple[str, Path]]:
    wide = capture(size.model(dtype))
    for name, passes in RECIPES.items():
        console.log(f"writing {name}, {dtype}")
        program = wide
        if passes:
            text = passes.replace("GROUPS", str(size.heads // 4))
            program = gp.Pipeline.parse(text).run(wide, quiet=True).program
        write_package(program, folder / name, target="cuda", check=False)
        yield name, folder / name


def _described(package: Path) -> dict[str, Any]:
    read = read_package(package)
    forms = Counter(form.partition(":")[0] for form in read.attention.values())
    size = sum(path.stat().st_size for path in package.glob(f"{read.model.name}*"))
    program = gp.load(package)
    return {"bytes": size, "forms": dict(forms), "kv_bytes_per_token": program.kv_bytes_per_token()}


def _opens(package: Path, provider: str) -> bool:
    try:
        open_session(read_package(package).model, provider)
    except BackendError:
        return False
    return True


# -- where nodes run ------------------------------------------------------------------------------


def placement(package: Path, provider: str) -> dict[str, Any]:
    """Nodes by the provider that runs them, copies between devices, and what runs on the CPU."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            str(read_package(package).model),
            options,
            providers=list(dict.fromkeys([provider, CPU])),
        )
        batch = _batch(session, package, 1, 16)
        batch.prompt([[1, 2, 3]])
        batch.step([4])
        events = json.loads(Path(session.end_profiling()).read_text())
    seen: dict[str, tuple[str, str]] = {}
    for event in events:
        held = event.get("args", {})
        if event.get("cat") == "Node" and held.get("provider"):
            seen[event["name"]] = (held["provider"], held["op_name"])
    by_provider = Counter(where for where, _ in seen.values())
    copies = sum(kind.startswith("Memcpy") for _, kind in seen.values())
    hosted = Counter(kind for where, kind in seen.values() if where == CPU)
    return {"nodes": dict(by_provider), "copies": copies, "on_cpu": dict(hosted.most_common(12))}


def kernels(package: Path, provider: str) -> list[str]:
    """Return which attention kernel ONNX Runtime says it chose, in a process of its own."""
    environment = {**os.environ, "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    command = [sys.executable, __file__, "probe", str(package), provider]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    said = [line.strip() for line in text.splitlines() if re.search(r"(?i)kernel|attention", line)]
    return list(dict.fromkeys(said))[:6]


def probe(package: str, provider: str) -> None:
    """Make a prompt and a token."""
    session = open_session(read_package(package).model, provider)
    batch = _batch(session, Path(package), 1, 64)
    batch.prompt([list(range(32))])
    batch.step([1])


# -- rates and memory -----------------------------------------------------------------------------


def rates(
    packages: dict[str, Path],
    sessions: dict[str, Any],
    rows: int,
    past: int,
    turns: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Tokens per second of prompts and of decoding, of all models in turns."""
    prompt = np.random.default_rng(0).integers(0, 4096, (rows, past)).tolist()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in packages}
    failures: dict[str, str] = {}
    with Progress(console=console) as progress:
        task = progress.add_task(f"{rows} x {past}", total=turns + 1)
        for _ in range(turns + 1):
            for name, session in sessions.items():
                if name in failures:
                    continue
                try:
                    batch = _batch(session, packages[name], rows, past + STEPS + 1)
                    start = time.perf_counter()
                    batch.prompt(prompt)
                    middle = time.perf_counter()
                    for step in range(STEPS):
                        batch.step([step + 1] * rows)
                    end = time.perf_counter()
                except Exception as error:  # noqa: BLE001 - out of memory comes in many types
                    failures[name] = first_line(error)
                    continue
                times[name].append((middle - start, (end - middle) / STEPS))
                del batch
            progress.advance(task)
    found: list[dict[str, Any]] = []
    for name in packages:
        if name in failures:
            found.append({"model": name, "failure": failures[name]})
            continue
        ratios = [
            [wide[part] / own[part] for wide, own in zip(times["dense"], times[name], strict=True)]
            for part in (0, 1)
            if "dense" not in failures
        ]
        prefill, decode = (statistics.median(each) for each in zip(*times[name][1:], strict=True))
        found.append(
            {
                "model": name,
                "prefill": rows * past / prefill,
                "decode": rows / decode,
                "gains": [statistics.median(each[1:]) for each in ratios],
            }
        )
    return found


def _batch(session: Any, package: Path, rows: int, capacity: int) -> Batch:
    read = read_package(package)
    shares = read.shares_buffers
    return Batch(
        session,
        layout_of(session),
        rows,
        capacity,
        shares=shares,
        left=read.padding == "both",
    )


def peak_memory(package: Path, provider: str, size: Size) -> int | None:
    """Bytes of the GPU that are taken for the largest batch at the third longest past."""
    if provider == CPU or (before := _used()) is None:
        return None
    session = open_session(read_package(package).model, provider)
    past = size.pasts[min(2, len(size.pasts) - 1)]
    try:
        batch = _batch(session, package, size.batches[-1], past + 8)
        batch.prompt([[1] * past] * size.batches[-1])
        batch.step([1] * size.batches[-1])
        return (_used() or before) - before
    except Exception:  # noqa: BLE001 - out of memory comes in many types
        return None
    finally:
        del session
        gc.collect()


def _used() -> int | None:
    said = _smi("memory.used")
    return int(said.split()[0]) * 2**20 if said else None


def _smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else ""


# -- 2:4 ------------------------------------------------------------------------------------------


def sparse_products() -> Iterator[dict[str, Any]]:
    """Dense and 2:4 products of half precision in torch, by the rows that are multiplied."""
    if not torch.cuda.is_available():
        yield {"what": f"torch {torch.__version__} has no GPU here"}
        return
    for out, inner in SPARSE:
        weight = _two_of_four(torch.randn(out, inner, dtype=torch.float16, device="cuda"))
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        for rows in (1, 16, 256, 4096):
            x = torch.randn(rows, inner, dtype=torch.float16, device="cuda")
            dense_ms, sparse_ms = (
                _milliseconds(partial(torch.nn.functional.linear, x, held))
                for held in (weight, sparse)
            )
            yield {"out": out, "in": inner, "rows": rows, "dense": dense_ms, "sparse": sparse_ms}


def tensorrt_products() -> Iterator[dict[str, Any]]:
    """Measure the same by TensorRT, with its sparse kernels off and on."""
    import onnxruntime

    out, inner = SPARSE[0]
    layer = torch.nn.Linear(inner, out, bias=False).half().eval()
    layer.weight.data = _two_of_four(layer.weight.data)
    x = torch.randn(16, inner, dtype=torch.float16)
    program = capture(layer, example_inputs=(x,))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ONNX Runtime warns where it falls back
        path = Path(folder) / "linear.onnx"
        program.export_onnx(path, target="tensorrt", check=False)
        sessions = [
            onnxruntime.InferenceSession(
                str(path), options, providers=[(_TENSORRT, {"trt_sparsity_enable": flag}), CPU]
            )
            for flag in ("0", "1")
        ]
        if any(_TENSORRT not in session.get_providers() for session in sessions):
            yield {"what": "TensorRT does not run here"}
            return
        for rows in (1, 16, 256, 4096):
            feeds = {program.inputs[0].name: np.zeros((rows, inner), np.float16)}
            times: list[list[float]] = [[], []]
            for _ in range(23):
                for session, held in zip(sessions, times, strict=True):
                    start = time.perf_counter()
                    session.run(None, feeds)
                    held.append(1e3 * (time.perf_counter() - start))
            dense_ms, sparse_ms = (statistics.median(held[3:]) for held in times)
            yield {"out": out, "in": inner, "rows": rows, "dense": dense_ms, "sparse": sparse_ms}


def _two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """`weight` without the two smaller of every four neighbors along its inputs."""
    groups = weight.reshape(-1, 4).clone()
    groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0)
    return groups.view_as(weight)


def _milliseconds(run: Callable[[], Any]) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    if sys.argv[1:2] == ["probe"]:
        probe(sys.argv[2], sys.argv[3])
    else:
        typer.run(main)
