"""The weights that an ONNX model holds, under the names that they have in a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from graphprune.errors import CheckpointError, first_line

MODEL = "model.onnx"
"""The ONNX model in a directory that holds one."""


def weights_beside(folder: Path) -> Callable[[], Iterator[tuple[str, Tensor]]] | None:
    """Return what reads the weights of the ONNX model in `folder`, or None where there is none."""
    path = folder / MODEL
    return (lambda: _held_or_refused(path)) if path.is_file() else None


def _held_or_refused(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from held_weights(path)
    except Exception as error:  # damage shows in any way
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error


def held_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every initializer of the ONNX model at `path`, external data included.

    Each value is a copy of its own.
    """
    import onnx_ir

    for name, value in onnx_ir.load(path).graph.initializers.items():
        if value.const_value is not None:
            yield name, _as_torch(value.const_value)


def _as_torch(tensor: object) -> Tensor:
    import onnx_ir

    assert isinstance(tensor, onnx_ir.TensorProtocol)
    array = tensor.numpy()
    if tensor.dtype == onnx_ir.DataType.BFLOAT16:
        # NumPy has no such type: its bits travel as whole numbers.
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
