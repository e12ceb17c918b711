"""Matrices of a few bits, in blocks that share a scale, as ONNX Runtime's operators hold them.

Reference: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnx_ir

Array = np.ndarray[Any, Any]


ROWS = ".rows"
"""At the end of the name of packed numbers that rows are picked from."""

Activations = Literal["float", "int8"]
"""What a product with quantized weights is computed with: activations as they are, or rounded."""

_ROWS_OF = "graphprune.rows"
"""In the meta data of a node that reads several weights as one: how many rows each has, as JSON."""

_LEVEL, _INT8 = "accuracy_level", 4
"""The attribute of MatMulNBits that says so, and what it is for 8 bits."""

_READERS = {"MatMulNBits": 0, "GatherBlockQuantized": 1}
"""Operators that read quantized weights, and which of their inputs is of none."""


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix of ``N`` rows and ``K`` columns: ``(number - zero) * scale`` each.

    Parameters
    ----------
    bits
        Bits of a number.
    packed
        ``[N, blocks, bytes]``, numbers of a row together, the lower half of a byte first.
    scales
        A scale for each block.
    zeros
        What stands for zero in each block: bytes as `packed`, or numbers as `scales`; None for the
        middle of the range.
    """

    bits: int
    packed: Array
    scales: Array
    zeros: Array | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix, whose columns blocks divide."""
        rows, blocks, size = self.packed.shape
        return rows, blocks * size * 8 // self.bits

    def rows(self, chosen: slice) -> Blocks:
        """Return some of its rows."""
        zeros = None if self.zeros is None else self.zeros.reshape(len(self.packed), -1)[chosen]
        scales = self.scales.reshape(len(self.packed), -1)[chosen]
        return Blocks(self.bits, self.packed[chosen], scales, zeros)

    def values(self) -> Array:
        """Return the matrix in float32, ``[N, K]``."""
        rows, blocks, _ = self.packed.shape
        numbers = _unpacked(self.packed, self.bits).astype(np.float32)
        if self.zeros is None:
            zeros: Any = np.float32(1 << (self.bits - 1))
        elif self.zeros.dtype == np.uint8:
            found = _unpacked(self.zeros.reshape(rows, -1), self.bits)[:, :blocks]
            zeros = found.astype(np.float32)[:, :, None]
        else:
            zeros = self.zeros.reshape(rows, blocks, 1).astype(np.float32)
        numbers -= zeros
        numbers *= self.scales.reshape(rows, blocks, 1).astype(np.float32)
        return numbers.reshape(rows, -1)


def blocks_of(graph: onnx_ir.Graph) -> Iterator[tuple[str, Blocks, list[str]]]:
    """Yield what reads a quantized weight in a graph: its name, the weight, and what holds it."""
    for node in graph:
        if node.op_type not in _READERS:
            continue
        held = [value for at, value in enumerate(node.inputs) if at != _READERS[node.op_type]]
        names = [str(value.name) for value in held if value is not None]
        packed, scales, *zeros = (graph.initializers[name].const_value.numpy() for name in names)  # type: ignore[union-attr]
        bits, rows = node.attributes["bits"].as_int(), packed.shape[0]
        packed = packed.reshape(rows, scales.size // rows, -1)
        blocks = Blocks(bits, packed, scales, zeros[0] if zeros else None)
        first = 0
        for name, count in json.loads(node.metadata_props.get(_ROWS_OF, "{}")).items():
            yield name, blocks.rows(slice(first, first + count)), names
            first += count
        if not first:
            yield read_by(node), blocks, names


def read_by(node: onnx_ir.Node) -> str:
    """Return the name of the weight that a node of its own reads quantized."""
    value = node.inputs[1 - _READERS[node.op_type]]
    bits = node.attributes["bits"].as_int()
    return str(value.name).removesuffix(ROWS).removesuffix(f".int{bits}")  # type: ignore[union-attr]


def note_rows(node: onnx_ir.Node, rows: Mapping[str, int]) -> None:
    """Note in a node which weights it reads as one, in their order, and how many rows each has."""
    node.metadata_props[_ROWS_OF] = json.dumps(rows)


def with_activations(path: Path, kind: Activations) -> onnx.ModelProto:
    """Return the model at `path` whose products with quantized weights take activations of a kind.

    External data is not read.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [each for each in node.attribute if each.name != _LEVEL]
            del node.attribute[:]
            node.attribute.extend(kept)
            if kind == "int8":
                node.attribute.append(onnx.helper.make_attribute(_LEVEL, _INT8))
    return model


def _unpacked(packed: Array, bits: int) -> Array:
    """Return the numbers of bytes, along the last dimension."""
    if bits == 8:
        return packed
    return np.stack((packed & 0xF, packed >> 4), -1).reshape(*packed.shape[:-1], -1)
