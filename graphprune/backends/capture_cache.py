"""Graphs of checkpoints that were looked into, kept for the next look.

A graph follows from the checkpoint's config, from the code that captures and from torch and
transformers, so all of these are in the name that it is kept under; weights are not kept. A file
that cannot be read is as good as none.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.backends.fixed_graph import graph_data, graph_module
from graphprune.errors import BackendError, GraphPruneError
from graphprune.io.atomic import staged_file
from graphprune.ir.program import Note, Program, value_of
from graphprune.ir.provenance import Source
from graphprune.weights.tensors import type_name

FOLDER = "GRAPHPRUNE_CACHE"
"""The environment variable that names the folder; empty, nothing is kept."""

_FORMAT = 3


def cache_folder() -> Path | None:
    """Return where graphs are kept: as `FOLDER` says, or in the user's cache; None for nowhere."""
    asked = os.environ.get(FOLDER)
    if asked is not None:
        return Path(asked) if asked else None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "graphprune"


def cache_file(directory: Path) -> Path | None:
    """Return the file that keeps the graph of a Hugging Face directory; None for none.

    Its name is a digest of all that the graph follows from: the config and any code in the
    directory, the code of graphprune and of the model in transformers, and the versions of torch,
    transformers and Python.
    """
    folder = cache_folder()
    if folder is None:
        return None
    config = directory / "config.json"
    found = hashlib.sha256(repr((_FORMAT, _environment())).encode())
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", "")
        _add_files(found, [config, *sorted(directory.glob("*.py"))])
        _add_files(found, _model_code(str(kind)))
    except (OSError, ValueError, AttributeError):
        return None
    return folder / f"{found.hexdigest()}.json"


def read_capture(file: Path, directory: Path) -> Program | None:
    """Return the program that `write_capture` kept in `file`, without weights; None if it cannot.

    `directory` is the checkpoint that it stands for.
    """
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return _rebuilt(kept, directory)
    except Exception:  # noqa: BLE001 - damage shows in any way, and the model is there to look at
        return None


def write_capture(file: Path, program: Program) -> None:
    """Keep the graph of `program` in `file`; what cannot be kept is not."""
    source = program.source
    if source is None:
        return
    try:
        graph, is_fixed = _graph_text(program)
        kept = {
            "graph": graph,
            "is_fixed": is_fixed,
            "sha256": hashlib.sha256(graph.encode()).hexdigest(),
            "fingerprint": program.fingerprint(),
            "weights": [
                (name, program.kinds[name], list(weight.shape), type_name(weight.dtype))
                for name, weight in program.weights.items()
            ],
            "aliases": dict(program.aliases),
            "inputs": [value.name for value in program.inputs],
            "outputs": [value.name for value in program.outputs],
            "notes": [asdict(note) for note in program.notes],
            "stand_ins": list(program.stand_ins.items()),
            "limits": list(program.limits.items()),
            "class": f"{source.model_class.__module__}:{source.model_class.__qualname__}",
        }
        with staged_file(file, overwrite=True) as staged:
            staged.write_text(json.dumps(kept), encoding="utf-8")
    except (GraphPruneError, OSError, TypeError, ValueError):
        return  # a graph that cannot be written down, or a folder that cannot be written to


def _graph_text(program: Program) -> tuple[str, bool]:
    """Return the graph as text, and whether that is the form of graphs without dynamic sizes."""
    try:
        return json.dumps(graph_data(program.graph)), True
    except BackendError:
        from graphprune.backends.archive.graph import serialize_graph

        return serialize_graph(program).decode(), False


class _NamedClass:
    """Stands for a transformers class that is not imported: only its name is known."""

    def __init__(self, module: str, name: str) -> None:
        self.__module__ = module
        self.__qualname__ = self.__name__ = name


class _Fields:
    """Stands for a config whose class is not imported: fields as ``config.json`` has them."""

    def __init__(self, fields: dict[str, Any]) -> None:
        vars(self).update(fields)


def _rebuilt(kept: dict[str, Any], directory: Path) -> Program:
    graph = kept["graph"]
    if hashlib.sha256(graph.encode()).hexdigest() != kept["sha256"]:
        raise ValueError("another graph")
    kinds = {name: kind for name, kind, *_ in kept["weights"]}
    weights = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, _, shape, dtype in kept["weights"]
    }
    module, ranges = _graph(graph, kept["is_fixed"], weights, kinds)
    (output,) = module.graph.find_nodes(op="output")
    inputs = module.graph.find_nodes(op="placeholder")[len(kinds) :]
    named_inputs = zip(kept["inputs"], inputs, strict=True)
    named_outputs = zip(kept["outputs"], output.args[0], strict=True)
    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model_class: Any = _NamedClass(*kept["class"].split(":"))
    program = Program(
        graph_module=module,
        weights=weights,
        kinds=kinds,
        aliases=kept["aliases"],
        inputs=tuple(value_of(name, node) for name, node in named_inputs),
        outputs=tuple(value_of(name, node) for name, node in named_outputs),
        source=Source(_Fields(fields), model_class, directory),
        ranges=ranges,
        notes=tuple(Note(**note) for note in kept["notes"]),
        stand_ins={int(size): what for size, what in kept["stand_ins"]},
        limits={symbol: (least, most) for symbol, (least, most) in kept["limits"]},
    )
    if program.fingerprint() != kept["fingerprint"]:
        raise ValueError("another program")
    return program


def _graph(
    text: str, is_fixed: bool, weights: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> tuple[fx.GraphModule, dict[Any, Any]]:
    """Return the graph that `_graph_text` wrote, with the ranges of its dynamic sizes."""
    if is_fixed:  # the other form takes torch's compiler to read
        return graph_module(json.loads(text)), {}
    from graphprune.backends.archive.graph import deserialize_graph

    exported = deserialize_graph(text.encode(), weights, kinds)
    return exported.graph_module, dict(exported.range_constraints)


@cache
def _environment() -> tuple[str, ...]:
    """Return what all graphs follow from."""
    import sys

    found = hashlib.sha256()
    _add_files(found, sorted(Path(__file__).resolve().parent.parent.rglob("*.py")))
    versions = (metadata.version(name) for name in ("torch", "transformers"))
    return (sys.version, *versions, found.hexdigest())


def _model_code(kind: str) -> list[Path]:
    """Return the files of transformers that make models of a kind; transformers is not imported."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    root = Path(spec.origin).parent
    name = kind.replace("-", "_")
    return [root / "masking_utils.py", *sorted((root / "models" / name).glob("*.py"))]


def _add_files(digest: Any, files: Iterable[Path]) -> None:
    for file in files:
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
