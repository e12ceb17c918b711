"""The weights that an ONNX model holds, under the names that they have in a program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

MODEL = "model.onnx"
"""The ONNX model in a directory that holds one."""


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
