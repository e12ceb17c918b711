"""Prune a tiny model of every type that transformers registers, and write down what came of it.

    python tools/coverage.py                        # every task, resumed where it was left
    python tools/coverage.py --task causal-lm --only llama,gpt2 --again
    python tools/coverage.py --shard 1/4            # a quarter of the types
    python tools/coverage.py --report               # make the table from what was measured

A type is built, run in eager mode, captured, compared with eager mode at sizes that were not
traced, analysed, cut by a quarter in every group at once and verified, its KV heads merged, a
uniform cut written and loaded by plain transformers, and exported to ONNX and compared in ONNX
Runtime. Each type runs in a process of its own, under a time limit; what it could not do stands in
its row with the reason.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from coverage_table import headline, table
from rich.console import Console
from rich.progress import track
from tiny_models import TASKS, tiny_model, types_of
from torch.fx import Node

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.backends.huggingface.save import checkpoint_form
from graphprune.errors import UsageError, first_line
from graphprune.frontend.capture import capture
from graphprune.frontend.example_inputs import example_of
from graphprune.ir.program import PRESENT, Program
from graphprune.ir.provenance import module_path, source_line
from graphprune.ir.sample_inputs import random_inputs, sample_sizes
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Cut, Step
from graphprune.transforms.heads.kv_heads import find_heads
from graphprune.transforms.heads.merge import merge_of
from graphprune.verification.masked_reference import masked
from graphprune.verification.verify import verify

for _name in ("frontend.transformers_models", "backends.archive.archive", "backends.onnx.export"):
    import_module(f"graphprune.{_name}")  # before any process is forked: all measure one state

WIDTHS = (("ffn", "expert-unit"), ("kv-head",), ("expert",), ("channel",))
"""Kinds of groups that are cut for a checkpoint, in this order."""

FORGIVEN = 1e-4
"""The relative error that `verify` allows in float32."""

SIZES = (*((2, length) for length in (1, 3, 17, 65, 130)), (1, 9), (3, 9))
"""Rows and lengths at which no model is captured."""

RESULTS = Path("out/coverage")
TABLE = Path(__file__).with_name("COVERAGE.md")

Row = dict[str, Any]


# -- one model ------------------------------------------------------------------------------------


def measure(task: str, model_type: str) -> Row:
    """Everything that is known of one type; stages after one that failed are left out."""
    row: Row = {"task": task, "type": model_type}
    model = _stage(row, "built", lambda: tiny_model(task, model_type))
    if model is None or _stage(row, "eager", lambda: _run_eager(model)) is None:
        return row
    program = _stage(row, "captured", lambda: capture(model, along_example=True))
    if program is None:
        return row
    row["cache"] = program.is_decoder
    row["notes"] = [note.text for note in program.notes]
    row["paths"] = [note.text for note in program.notes if note.kind == "example-path"]
    _stage(row, "equal", lambda: _compare_with_eager(program, model))
    _stage(row, "sizes", lambda: _at_other_sizes(program, model))
    coupling = _stage(row, "analysed", lambda: _analysed(program, row))
    if coupling is None:
        return row
    plan = Plan((Step(program.fingerprint(), _cuts(coupling)),))
    pruned = _stage(row, "rewritten", lambda: gp.apply(program, plan))
    if pruned is not None:
        _stage(row, "verified", lambda: verify(program, plan, pruned).max_relative_error)
        _stage(row, "tested", lambda: _least_reaction(program, coupling, plan))
    _stage(row, "merged", lambda: _merge(program))
    _stage(row, "reloaded", lambda: _reload(program, coupling))
    if pruned is not None:
        _stage(row, "onnx", lambda: _export(pruned))
    return row


WARMS_UP = ("causal-lm", "gpt2")
"""Measured before any: what it imports, the processes of all others need not import again."""


def _stage(row: Row, name: str, call: Callable[[], Any]) -> Any:
    """Run a stage; its row says how long it took, or why it failed."""
    began = time.perf_counter()
    try:
        result = call()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the row's reason
        text = str(error).strip().splitlines() or [""]
        row[name] = {"error": f"{type(error).__name__}: {text[0][:300]}"}
        return None
    row[name] = {"seconds": round(time.perf_counter() - began, 2)}
    if isinstance(result, int | float | str | bool):
        row[name]["value"] = result
    return result


def _run_eager(model: Any) -> str:
    with torch.no_grad():
        return type(model(**example_of(model).inputs)).__name__


def _compare_with_eager(program: Program, model: Any) -> float:
    from graphprune.backends.huggingface.model import difference

    if why := difference(program, model):
        raise ValueError(why)
    return 0.0


def _at_other_sizes(program: Program, model: Any) -> str:
    """Compare with eager mode at `SIZES`, as far as the model itself takes them."""
    found = {size: _at_size(program, model, *size) for size in SIZES}
    wrong = [f"{rows} x {n}: {why}" for (rows, n), why in found.items() if why not in _RIGHT]
    if wrong:
        raise ValueError("; ".join(wrong))
    refused = [f"{rows} x {n}" for (rows, n), why in found.items() if why == "refused"]
    return f"not {', '.join(refused)}" if refused else "all"


_RIGHT = ("equal", "refused", "not a size of the model")


def _at_size(program: Program, model: Any, rows: int, length: int) -> str:
    from graphprune.backends.huggingface.model import mismatch

    sizes = sample_sizes(program, batch=rows, length=length)
    for value in program.inputs:
        if value.dtype.is_floating_point:
            continue  # images and sounds: of a size that their strides divide
        for dim, symbol in enumerate(value.shape):
            if isinstance(symbol, str) and symbol in sizes:
                sizes[symbol] = length if dim else rows
    inputs = random_inputs(program, sizes)
    tokens = [tensor for name, tensor in inputs.items() if name.endswith("input_ids")]
    if any(tuple(tensor.shape[:2]) != (rows, length) for tensor in tokens):
        return "refused"  # the program is of one size
    try:
        with torch.no_grad():
            expected = model(**inputs, return_dict=True)
    except Exception:  # noqa: BLE001 - whatever it is, eager mode cannot do it either
        return "not a size of the model"
    try:
        return mismatch(program(**inputs), expected, FORGIVEN) or "equal"
    except Exception as error:  # noqa: BLE001 - what a user would see
        by_name = isinstance(error, UsageError) and error.__cause__ is None
        return "refused" if by_name else first_line(error)


def _analysed(program: Program, row: Row) -> Coupling:
    coupling = gp.analyze(program)
    row["groups"] = dict(Counter(group.role for group in coupling.groups))
    row["exactness"] = dict(Counter(group.exactness for group in coupling.groups))
    row["attention"] = bool(_attentions(coupling))
    inner = {
        name for group in coupling.groups if group.role != "residual" for name in group.weights()
    }
    total = prunable = 0
    reasons: Counter[str] = Counter()
    for name in _layers(coupling):
        size = program.weights[name].numel()
        total += size
        prunable += size if name in inner else 0
        if name not in inner:
            for reason in {
                _reason(found) for weight, _, found in coupling.frozen() if weight == name
            }:
                reasons[reason] += size
    row["share"] = prunable / total if total else None
    row["elements"] = total
    row["parameters"] = program.parameter_count()
    row["frozen"] = reasons.most_common(4)
    row["unruled"] = sorted({str(node.target) for node in coupling.types.facts.unruled})
    return coupling


def _attentions(coupling: Coupling) -> list[Any]:
    from graphprune.analysis.attention.attentions import attentions

    return list(attentions(coupling.types))


def _layers(coupling: Coupling) -> Iterator[str]:
    """Matrices of attention, MLPs and the like: those of modules inside numbered, repeated ones.

    One that only leads from residual streams to residual streams, such as a convolution between
    stages, has nothing of its own to prune and is none of them.
    """
    program = coupling.program
    for name, node in program.weight_nodes():
        inside = any(part.isdigit() for part in name.split(".")[:-2])
        matrix = program.kinds[name] == "parameter" and program.weights[name].ndim > 1
        if inside and matrix and node.users and not _joins_residuals(coupling, node):
            yield name


def _joins_residuals(coupling: Coupling, weight: Node) -> bool:
    types = coupling.types
    atoms = [atom for axis in types.axes_of[weight] for atom in types.axes.atoms(axis)]
    frozen = {atom: types.frozen[atom].why for atom in atoms if atom in types.frozen}
    groups = [coupling.group_of(a) for a in atoms if frozen.get(a) != "positions of a kernel"]
    return all(group is not None and group.role == "residual" for group in groups)


def _reason(frozen: Any) -> str:
    node = frozen.node
    where = ", ".join(filter(None, (module_path(node), source_line(node))))
    return f"{frozen.why}: {node.target if node.op != 'placeholder' else node.name} ({where})"


def _cuts(coupling: Coupling) -> tuple[Cut, ...]:
    """Draw a quarter of every group (one unit at least), other ones under every parent."""
    chosen = random.Random(0)
    sizes = {group.name: group.size for group in coupling.groups}
    return tuple(_cut(group, sizes, chosen) for group in coupling.groups)


def _cut(group: Group, sizes: dict[str, int], chosen: random.Random) -> Cut:
    count = min(max(1, group.size // 4), group.size - group.min_units)
    places = itertools.product(*(range(sizes[parent]) for parent in group.parents))
    return group.cut({place: tuple(chosen.sample(range(group.size), count)) for place in places})


def _least_reaction(program: Program, coupling: Coupling, plan: Plan) -> float:
    """How far the outputs move, relative, for the cut that moves them least, each made alone.

    A cut that moves them by no more than verification forgives is not tested by it: the random
    weights lead nowhere.
    """
    inputs = random_inputs(program)
    dense = program(**inputs)
    least, where = float("inf"), ""
    for cut in plan.steps[0].cuts:
        alone = Plan((Step(program.fingerprint(), (cut,)),))
        found = masked(program, alone, coupling.types)(**inputs)
        moved = max(
            float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-12))
            for name, value in dense.items()
            if not name.startswith(PRESENT) and value.is_floating_point()
        )
        if moved < least:
            least, where = moved, cut.group
    if least <= FORGIVEN:
        raise ValueError(
            f"cutting {where} moves the outputs by {least:.0e}: nothing is shown by it"
        )
    return least


def _merge(program: Program) -> str:
    heads = [each for each in find_heads(program) if each.size > 1]
    if not heads:
        return "no KV heads"
    merges = []
    refused = ""
    for each in heads:
        groups = each.size // 2 if each.size % 2 == 0 else 1
        try:
            merges.append(merge_of(each, groups))
        except gp.GraphPruneError as error:
            refused = refused or str(error)
    if refused:
        raise ValueError(refused)
    plan = Plan((Step(program.fingerprint(), (), tuple(merges)),))
    verify(program, plan, gp.apply(program, plan))
    return f"{len(merges)} attentions"


def _reload(program: Program, coupling: Coupling) -> str:
    """Cut the first kind of group that a checkpoint can hold by a quarter, write it and load it."""
    why = "nothing to cut evenly"
    for roles in WIDTHS:
        wanted = [group for group in coupling.groups if group.role in roles]
        if not wanted:
            continue
        chosen = random.Random(0)
        sizes = {group.name: group.size for group in coupling.groups}
        plan = Plan((Step(program.fingerprint(), tuple(_cut(g, sizes, chosen) for g in wanted)),))
        pruned = gp.apply(program, plan)
        found = checkpoint_form(pruned)
        if found.kind == "none":
            why = found.reason
            continue
        with tempfile.TemporaryDirectory() as folder:
            pruned.save_pretrained(f"{folder}/small")
            _compare_reloaded(pruned, f"{folder}/small", found.kind)
        return f"{roles[0]}, {found.kind}"
    raise ValueError(why)


def _compare_reloaded(program: Program, folder: str, kind: str) -> None:
    from graphprune.backends.huggingface.model import difference

    assert program.source is not None
    if kind == "plain":
        model_class: Any = program.source.model_class
        model = model_class.from_pretrained(folder, dtype=torch.float32)
    else:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        config = json.loads(Path(folder, "config.json").read_text())
        name = next(iter(config["auto_map"].values()))
        model = get_class_from_dynamic_module(name, folder).from_pretrained(folder)
    if why := difference(program, model.eval()):
        raise ValueError(why)


def _export(program: Program) -> float:
    with tempfile.TemporaryDirectory() as folder:
        report = program.export_onnx(f"{folder}/model.onnx")
    if report.max_relative_error is None:
        raise ValueError("; ".join(report.notes))
    return report.max_relative_error


# -- all models -----------------------------------------------------------------------------------


def isolated(task: str, model_type: str, limit: int) -> Row:
    """`measure` in a process of its own, which ends after `limit` seconds of processor time."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        with open(writing, "w") as stream:
            json.dump(measure(task, model_type), stream)
        os._exit(0)
    os.close(writing)
    with open(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    try:
        row: Row = json.loads(text)
    except ValueError:
        late = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        why = f"not done in {limit} s" if late else "it crashed"
        row = {"task": task, "type": model_type, "eager": {"error": why}}
    return row


def main(
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks.")] = None,
    only: Annotated[str, typer.Option(help="Only these types, joined by commas.")] = "",
    shard: Annotated[str, typer.Option(help="Which part of the types, such as 1/4.")] = "1/1",
    limit: Annotated[int, typer.Option(help="Seconds of processor time for each type.")] = 180,
    again: Annotated[bool, typer.Option("--again", help="Measure what is measured.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Only make the table.")] = False,
) -> None:
    """Measure every type that was not measured yet, and write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, shard.split("/"))
    jobs = [(name, kind) for name in task or TASKS for kind in types_of(name)]
    jobs = [job for job in jobs if not only or job[1] in only.split(",")][part - 1 :: parts]
    left = {job: RESULTS / f"{'.'.join(job)}.json" for job in ([] if report else jobs)}
    left = {job: path for job, path in left.items() if again or not path.is_file()}
    if left:
        measure(*WARMS_UP)
    for job, path in track(left.items(), console=Console(stderr=True)):
        path.write_text(json.dumps(isolated(*job, limit), indent=1) + "\n")
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    TABLE.write_text(table(rows), encoding="utf-8")
    print("\n".join(headline(rows)))


if __name__ == "__main__":
    typer.run(main)
