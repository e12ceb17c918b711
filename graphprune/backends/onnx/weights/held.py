"""Read the weights of an ONNX model, under the names and in the form that a program has them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.backends.onnx.weights.as_used import stored
from graphprune.backends.onnx.weights.blocks import blocks_of
from graphprune.errors import CheckpointError, first_line
from graphprune.ir.program import Program
from graphprune.weights.deferred import Deferred
from graphprune.weights.scratch import ScratchFile

MODEL = "model.onnx"
"""The ONNX model in a directory that holds one."""


def models_in(folder: Path) -> list[Path]:
    """Return the ONNX models of the package in `folder`, of which some lie in ``onnx/``."""
    return sorted([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])


def weights_beside(folder: Path) -> Callable[[], Iterator[tuple[str, Tensor]]] | None:
    """Return what reads the weights of the ONNX models in `folder`; None where there are none."""
    paths = models_in(folder)
    return (lambda: _held_or_refused(paths)) if paths else None


def _held_or_refused(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        try:
            yield from held_weights(path)
        except Exception as error:  # damage shows in any way
            raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error


def held_weights(path: Path, *, quantized: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight of the ONNX model at `path`, external data included.

    What is written transposed comes as it was, and what is quantized as what it stands for; with
    `quantized`, only that. Each value is a copy of its own.
    """
    import onnx_ir

    graph = onnx_ir.load(path).graph
    parts, seen = set[str](), set[str]()
    for written, blocks, names in blocks_of(graph):
        parts.update(names)
        if written not in seen:
            name, array = stored(written, blocks.values().astype(blocks.scales.dtype))
            yield name, _as_torch(array, graph.initializers[names[1]].dtype)
        seen.add(written)
    for written, value in graph.initializers.items():
        if not quantized and value.const_value is not None and written not in parts:
            name, array = stored(written, value.const_value.numpy())
            yield name, _as_torch(array, value.const_value.dtype)


def _as_torch(array: np.ndarray[Any, Any], dtype: Any) -> Tensor:
    import onnx_ir

    if dtype == onnx_ir.DataType.BFLOAT16:
        # NumPy has no such type: its bits travel as whole numbers.
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def not_in_models(
    program: Program, models: Sequence[Path], quantized: Collection[str]
) -> dict[str, Tensor]:
    """Return the weights of `program` that its models hold neither as they are nor `quantized`."""
    missing = {n: weight for n, weight in program.weights.items() if n not in quantized}
    for name, tensor in (each for model in models for each in held_weights(model)):
        weight = missing.get(name)
        if weight is None or program.compute_types[name] != tensor.dtype:
            continue
        if torch.equal(weight.cpu().to(tensor.dtype), tensor):
            del missing[name]
    return missing


def with_held(program: Program, path: Path) -> Program:
    """`program` with the values that the quantized weights of the model at `path` stand for.

    They lie in a scratch file and are read where they are used.
    """
    scratch, weights = ScratchFile(), dict(program.weights)
    for name, value in held_weights(path, quantized=True):
        value = value.to(program.compute_types[name])
        read = functools.partial(scratch.read, scratch.write(value), value.shape, value.dtype)
        weights[name] = Deferred(read, value.shape, value.dtype)
    return dataclasses.replace(program, weights=weights)
