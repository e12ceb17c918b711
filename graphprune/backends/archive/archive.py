"""Archives: a directory that holds a program as it is, whatever it was made from.

``program.json``
    Names, kinds, ties, notes and the config of the model behind the program.
``graph.json``
    The graph as `torch.export` serializes it, with the provenance of every node.
``weights.safetensors``
    Every weight, constants included, under its own name; where an ONNX model lies beside, only
    those that it does not hold; its reader hands them to `load`.

Nothing in an archive is unpickled, and no expression in it is read but plain arithmetic.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.backends.archive.graph import deserialize_graph, serialize_graph
from graphprune.errors import BackendError, CheckpointError, first_line
from graphprune.io.atomic import staged_directory
from graphprune.io.companions import copy_companions
from graphprune.ir.program import Note, Program, value_of
from graphprune.ir.provenance import Source
from graphprune.weights.files import TensorFile
from graphprune.weights.writing import write_file

_FORMAT, _VERSION = "graphprune-archive", 1
_PROGRAM, _GRAPH, _WEIGHTS = "program.json", "graph.json", "weights.safetensors"


def is_archive(directory: str | PathLike[str]) -> bool:
    """Return whether `directory` looks like one that `save` wrote."""
    return (Path(directory) / _PROGRAM).is_file()


def save(program: Program, directory: str | PathLike[str]) -> None:
    """Write `program` to `directory`, from which `load` rebuilds an equal one.

    Parameters
    ----------
    program
        Any program whose weights are not on the meta device.
    directory
        A directory that does not exist or is empty. The tokenizer of the model behind the program
        is copied along.

    Raises
    ------
    BackendError
        When the graph cannot be serialized, or there are no weights to write.
    OutputError
        When `directory` is not empty or cannot be written.
    """
    if program.lacks_values:
        raise BackendError(
            "the program's weights are on the meta device: there is nothing to write"
        )
    write = describe(program)
    with staged_directory(directory) as staged:
        write(staged, program.weights)


def describe(program: Program) -> Callable[[Path, Mapping[str, Tensor]], None]:
    """Return what writes an archive of `program` into a directory, beside whatever else goes there.

    It takes the directory and the weights to write, which may be fewer than the program has where
    an ONNX model beside them holds the rest.

    Raises
    ------
    BackendError
        When the graph cannot be serialized.
    """
    from graphprune.io.version import __version__

    graph = serialize_graph(program)
    described = {
        "format": _FORMAT,
        "version": _VERSION,
        "graphprune": __version__,
        "torch": str(torch.__version__),
        "fingerprint": program.fingerprint(),
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "weights": [{"name": name, "kind": program.kinds[name]} for name in program.weights],
        "aliases": dict(program.aliases),
        "inputs": [value.name for value in program.inputs],
        "outputs": [value.name for value in program.outputs],
        "notes": [asdict(note) for note in program.notes],
        "limits": {symbol: list(limits) for symbol, limits in program.limits.items()},
        "source": _describe_source(program.source),
    }

    def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
        (folder / _GRAPH).write_bytes(graph)
        write_file(weights, folder / _WEIGHTS)
        text = json.dumps(described, indent=1, ensure_ascii=False, default=str)
        (folder / _PROGRAM).write_text(text + "\n", encoding="utf-8")
        copy_companions(program.source.directory if program.source else None, folder)

    return write


def load(
    directory: str | PathLike[str], more: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
) -> Program:
    """Return the program that `save` wrote to `directory`.

    Parameters
    ----------
    directory
        Where it lies.
    more
        What gives the weights that lie in another file, by name; it is called where some are
        missing.

    Returns
    -------
    Program
        On the CPU; with the fingerprint, the outputs and the provenance of the one that was saved.

    Raises
    ------
    CheckpointError
        When a file is missing, damaged or not from an archive, naming it.
    """
    folder = Path(directory)
    described = _read_description(folder / _PROGRAM)
    weights = _read_weights(folder / _WEIGHTS)
    with _naming(folder / _PROGRAM):
        kinds = {entry["name"]: entry["kind"] for entry in described["weights"]}
        aliases, notes = dict(described["aliases"]), tuple(map(_note, described["notes"]))
        limits = {
            symbol: (least, most) for symbol, (least, most) in described.get("limits", {}).items()
        }
        names = list(described["inputs"]), list(described["outputs"])
        fingerprint, digest = described["fingerprint"], described["graph_sha256"]
        source, note = _rebuild_source(described["source"], folder)
    if more is not None and not kinds.keys() <= weights.keys():
        weights |= {n: weight for n, weight in more() if n in kinds and n not in weights}
    if missing := [name for name in kinds if name not in weights]:
        raise CheckpointError(f"{folder / _WEIGHTS} has no tensor {missing[0]!r}")
    with _naming(folder / _GRAPH):
        text = (folder / _GRAPH).read_bytes()
        if hashlib.sha256(text).hexdigest() != digest:
            raise CheckpointError(f"{folder / _GRAPH} is not the graph that {_PROGRAM} describes")
        exported = deserialize_graph(text, {n: _on_meta(weights[n]) for n in kinds}, kinds)
        graph = exported.graph
        placeholders = graph.find_nodes(op="placeholder")
        (output,) = graph.find_nodes(op="output")
        inputs, results = placeholders[len(kinds) :], output.args[0]
        program = Program(
            graph_module=exported.graph_module,
            weights={name: weights[name] for name in kinds},
            kinds=kinds,
            aliases=aliases,
            inputs=tuple(value_of(*pair) for pair in zip(names[0], inputs, strict=True)),
            outputs=tuple(value_of(*pair) for pair in zip(names[1], results, strict=True)),
            source=source,
            ranges=dict(exported.range_constraints),
            notes=notes + note,
            limits=limits,
        )
    for name, node in program.weight_nodes():
        wanted, found = tuple(node.meta["val"].shape), tuple(weights[name].shape)
        if wanted != found:
            raise CheckpointError(
                f"{folder / _WEIGHTS}: {name} is {found}, where the graph wants {wanted}"
            )
    if program.fingerprint() != fingerprint:
        raise CheckpointError(f"{folder / _PROGRAM} does not describe the weights beside it")
    return program


# -- the weights --------------------------------------------------------------------------------


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, to be read where they are used."""
    with _naming(path):
        return TensorFile(path).tensors()


def _on_meta(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


# -- the description ----------------------------------------------------------------------------


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no archive: {path.name} is missing")
    with _naming(path):
        described = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise CheckpointError(f"{path} does not describe a graphprune archive")
    if described.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} is of version {described.get('version')}, and this release reads {_VERSION}"
        )
    return described


def _describe_source(source: Source | None) -> dict[str, Any] | None:
    if source is None:
        return None
    generation = source.generation_config
    return {
        "model_class": _class_name(source.model_class),
        "config_class": _class_name(type(source.config)),
        "config": source.config.to_dict(),
        "generation_config_class": _class_name(type(generation)) if generation else None,
        "generation_config": generation.to_dict() if generation else None,
        "stored_dtype": str(source.stored_dtype) if source.stored_dtype else None,
        "stored_apart": {name: str(dtype) for name, dtype in source.stored_apart.items()},
        "tokenizer": source.directory is not None,
    }


def _note(described: Any) -> Note:
    """Read a note; one from before notes had kinds is a text alone."""
    return Note("", described) if isinstance(described, str) else Note(**described)


def _rebuild_source(described: Any, folder: Path) -> tuple[Source | None, tuple[Note, ...]]:
    """Return the source that was described, or a note on why it cannot be had here."""
    if described is None:
        return None, ()
    name = described["model_class"]
    try:
        generation = described["generation_config_class"]
        apart = described.get("stored_apart", {})  # not in archives of before
        source = Source(
            config=_class(described["config_class"]).from_dict(described["config"]),
            model_class=_class(name),
            directory=folder if described["tokenizer"] else None,
            generation_config=generation
            and _class(generation).from_dict(described["generation_config"]),
            stored_dtype=_dtype(described["stored_dtype"]),
            stored_apart={name: found for name in apart if (found := _dtype(apart[name]))},
        )
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        text = f"without its config, since {name} is not to be had: {first_line(error, typed=True)}"
        return None, (Note("no-source", text),)
    return source, ()


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, (name or "").removeprefix("torch."), None)


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> Any:
    module, _, qualified = name.partition(":")
    if module.split(".")[0] != "transformers":
        raise ImportError(f"{module} is not part of transformers")
    return getattr(importlib.import_module(module), qualified)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name `path` in whatever goes wrong with what it holds."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # damage shows in any way
        reason = (
            "is missing"
            if isinstance(error, FileNotFoundError)
            else f"is damaged: {first_line(error, typed=True)}"
        )
        raise CheckpointError(f"{path} {reason}") from error
