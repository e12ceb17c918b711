"""Quantize the weights of a model: matrices of a few bits, and the operators that read them.

A product with a weight becomes com.microsoft's MatMulNBits, an embedding its GatherBlockQuantized.
What is quantized is named after the weight, so that `held_weights` reads its values back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from graphprune.backends.onnx.weights.as_used import initializer
from graphprune.backends.onnx.weights.blocks import ROWS, Activations, Array, Blocks
from graphprune.backends.onnx.weights.joined import join_projections
from graphprune.backends.onnx.weights.quantizers import (
    Algorithm,
    check_matrix,
    check_quantizer,
    quantized,
)
from graphprune.errors import UsageError
from graphprune.weights.scratch import ScratchFile

if TYPE_CHECKING:
    import onnx_ir

    from graphprune.backends.onnx.attention.forms import Target

Bits = Literal["int4", "int8", "float"]
"""What a matrix becomes; "float" leaves it as it is."""

BITS = {"int4": 4, "int8": 8}

_SAME_BYTES = "graphprune.same_bytes"
"""In the meta data of an initializer: another one, which holds the same bytes."""


@dataclass(frozen=True)
class Quantization:
    """What is quantized, and how.

    Parameters
    ----------
    weights
        What every matrix that is multiplied with becomes.
    block
        How many numbers of a row share a scale.
    algorithm
        The quantizer of ONNX Runtime.
    head
        What the product that gives the model's first output becomes; None for the same as the rest.
    embedding
        What matrices become whose rows are picked; None for "float", but where the head is the same
        matrix, that.
    activations
        What a product is computed with: "float", or "int8" for activations that are rounded too.
        None for what `settled` finds to be faster. What hqq makes takes "float" only.
    zeros
        Whether blocks of four bits have a zero of their own, in place of the middle of their
        range; what "hqq" and "k-quant" make has. With eight bits there is nothing to gain by it.
    named
        What single matrices become, by name, whatever else is said.

    Raises
    ------
    UsageError
        When there is no such choice, or two exclude each other.
    """

    weights: Literal["int4", "int8"]
    block: int = 32
    algorithm: Algorithm = "default"
    head: Bits | None = None
    embedding: Bits | None = None
    activations: Activations | None = None
    zeros: bool = True
    named: Mapping[str, Bits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weights", "head", "embedding"):
            kind = getattr(self, name)
            if kind is not None and kind not in BITS and (kind != "float" or name == "weights"):
                raise UsageError(f"{name} becomes int4 or int8, not {kind!r}")
        if self.activations == "int8" and self.algorithm == "hqq":
            raise UsageError("activations=int8 is not for hqq: its zeros are no whole numbers")

    def settled(self, target: Target | None, *, by_token: bool) -> Quantization:
        """Return this with what it leaves open about activations said.

        Parameters
        ----------
        target
            What runs the model. ONNX Runtime's kernels on a CPU multiply one rounded row four times
            as fast as one that is not rounded, and many rows hardly differently.
        by_token
            Whether the model is run a token at a time.
        """
        if self.activations is not None:
            return self
        rounded = by_token and target == "cpu" and self.algorithm != "hqq"
        return dataclasses.replace(self, activations="int8" if rounded else "float")

    def symmetric(self, bits: int) -> bool:
        """Return whether blocks of so many bits have no zeros of their own."""
        return self.algorithm == "default" and (bits == 8 or not self.zeros)

    def check(self, target: Target | None) -> None:
        """Refuse a target that has no operators for it, and a quantizer that is not there.

        Raises
        ------
        UsageError
            When the model is not for ONNX Runtime.
        BackendError
            When the ONNX Runtime that is installed lacks the quantizer.
        """
        if target not in ("cpu", "cuda"):
            raise UsageError(
                f"weights={self.weights} takes operators of ONNX Runtime: the target is cpu or cuda"
            )
        wanted = {BITS[k] for k in (self.weights, self.head, self.embedding) if k in BITS}
        for bits in sorted(wanted):
            check_quantizer(bits, self.block, self.algorithm)

    def becomes(self, name: str, *, heads: Collection[bool], picked: bool) -> Bits:
        """Return what a matrix becomes.

        Parameters
        ----------
        name
            Of the matrix.
        heads
            Whether each product with it is the head.
        picked
            Whether rows of it are picked.

        Raises
        ------
        UsageError
            When it would have to be two things, or ONNX Runtime picks no rows of it.
        """
        wanted = set[Bits]()
        if name in self.named:
            wanted.add(self.named[name])
        else:
            wanted.update((self.head or self.weights) if head else self.weights for head in heads)
            if picked:
                otherwise: Bits = next(iter(wanted), "float")
                wanted.add(self.embedding or otherwise)
        if len(wanted) > 1:
            raise UsageError(
                f"{name} is embedding and head in one, and cannot become "
                + " and ".join(sorted(wanted))
            )
        (kind,) = wanted
        if kind != "float" and picked and self.algorithm == "hqq":
            raise UsageError(
                f"rows of {name} are picked, and ONNX Runtime picks none from what hqq makes: "
                "give embedding=float, or another algorithm"
            )
        return kind

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, `named` only where something is."""
        found = dataclasses.asdict(self)
        return found if self.named else {k: v for k, v in found.items() if k != "named"}


@dataclass(frozen=True)
class _Use:
    """A node that reads a matrix ``[N, K]``: a weight or, where that is `turned`, its transpose."""

    node: onnx_ir.Node
    turned: bool = False

    @property
    def picks(self) -> bool:
        """Whether rows are picked, in place of multiplied with."""
        return self.node.op_type == "Gather"


def quantize(
    model: onnx_ir.Model, chosen: Quantization, parameters: Collection[str]
) -> dict[str, float]:
    """Quantize those of `parameters` in `model` that are matrices, in place and one at a time.

    What comes of them lies in a scratch file until it is written.

    Returns
    -------
    dict
        Weight -> the length of what quantizing changed, over its own length (Frobenius norms).

    Raises
    ------
    UsageError
        When a block does not divide a matrix, one would have to become two different things, or
        there is nothing to quantize.
    BackendError
        When the quantizer fails.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    uses, head = dict(_matrices(model, parameters)), _head(model)
    bits = {value: _bits(value, found, chosen, head) for value, found in uses.items()}
    wanted = [value for value, number in bits.items() if number]
    if not wanted:
        raise UsageError("no weight is multiplied with as it is: there is nothing to quantize")
    for value in wanted:
        turned = uses[value][0].turned
        columns = int(value.shape[0 if turned else 1])  # type: ignore[index,arg-type]
        check_matrix(str(value.name), columns, chosen.block)
    scratch, distances = ScratchFile(), dict[str, float]()
    model.opset_imports.setdefault("com.microsoft", 1)
    for value in wanted:
        array = value.const_value.numpy()  # type: ignore[union-attr]
        matrix = array.T if uses[value][0].turned else array
        given = matrix.astype(np.float32, copy=False)
        symmetric = chosen.symmetric(bits[value])
        found = quantized(given, bits[value], chosen.block, chosen.algorithm, symmetric=symmetric)
        distances[str(value.name)] = _distance(given, found)
        name = f"{value.name}.transposed" if uses[value][0].turned else str(value.name)
        parts = _initializers(model, name, found, matrix.dtype, scratch)
        for use in uses[value]:
            _read(model, use, parts, matrix.shape, bits[value], chosen.block)
    join_projections(model)
    RemoveUnusedNodesPass()(model)
    return distances


def _matrices(
    model: onnx_ir.Model, parameters: Collection[str]
) -> Iterator[tuple[onnx_ir.Value, list[_Use]]]:
    """Yield every matrix that is only multiplied with and picked from, with what does so."""
    for name, value in model.graph.initializers.items():
        shape = value.shape
        if name not in parameters or shape is None or len(shape) != 2 or value.is_graph_output():
            continue
        if value.dtype is None or not value.dtype.is_floating_point():
            continue
        found = [use for node, at in value.uses() for use in _uses(node, at)]
        if found and None not in found and len({use.turned for use in found if use}) == 1:
            yield value, [use for use in found if use]


def _uses(node: onnx_ir.Node, at: int) -> list[_Use | None]:
    """Return how `node` reads a matrix, its input `at`; None for in another way than is known."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Transpose" and list(given.get("perm", (1, 0))) == [1, 0]:
        (result,) = node.outputs
        plain = not result.is_graph_output()
        return [
            _Use(reader) if plain and (reader.op_type, place) == ("MatMul", 1) else None
            for reader, place in result.uses()
        ]
    if (node.op_type, at) == ("MatMul", 1):
        return [_Use(node, turned=True)]
    if (node.op_type, at) == ("Gather", 0) and not given.get("axis"):
        return [_Use(node)]
    scaled = any(given.get(name, 1.0) != 1.0 for name in ("alpha", "beta")) or given.get("transA")
    if (node.op_type, at) == ("Gemm", 1) and not scaled:
        return [_Use(node, turned=not given.get("transB"))]
    return [None]


def _head(model: onnx_ir.Model) -> onnx_ir.Node | None:
    """Return the product that the first output comes from, but for what is done to each number."""
    node = model.graph.outputs[0].producer()
    while node is not None and node.op_type not in ("MatMul", "Gemm"):
        made = [value.producer() for value in node.inputs if value is not None]
        found = [each for each in made if each is not None]
        node = found[0] if len(found) == 1 else None
    return node


def _bits(
    value: onnx_ir.Value, uses: list[_Use], chosen: Quantization, head: onnx_ir.Node | None
) -> int:
    """Return how many bits a matrix gets; 0 where it stays as it is."""
    heads = [use.node is head for use in uses if not use.picks]
    picked = len(heads) < len(uses)
    return BITS.get(chosen.becomes(str(value.name), heads=heads, picked=picked), 0)


def _distance(matrix: Array, found: Blocks) -> float:
    """Return how far quantized values are from `matrix`, relative to its length."""
    step = max(2**24 // matrix.shape[1], 1)
    changed = length = 0.0
    for first in range(0, len(matrix), step):
        rows = slice(first, first + step)
        difference = found.rows(rows).values() - matrix[rows]
        changed += float(np.square(difference).sum(dtype=np.float64))
        length += float(np.square(matrix[rows]).sum(dtype=np.float64))
    return math.sqrt(changed / length) if length else 0.0


def shared_bytes(model: onnx_ir.Model) -> dict[onnx_ir.Value, onnx_ir.Value]:
    """Return the initializers of `model` that hold the same bytes as another one, with that."""
    held = model.graph.initializers.values()
    pairs = ((value, value.meta.get(_SAME_BYTES)) for value in held)
    return {value: same for value, same in pairs if same is not None and same.is_initializer()}


# -- the model -------------------------------------------------------------------------------------


def _initializers(
    model: onnx_ir.Model, name: str, found: Blocks, dtype: Any, scratch: ScratchFile
) -> list[onnx_ir.Value]:
    """Register the parts of a quantized weight, which lie in `scratch`."""
    arrays = [found.packed, found.scales.astype(dtype)]
    if found.zeros is not None:
        arrays.append(found.zeros if found.zeros.dtype == np.uint8 else found.zeros.astype(dtype))
    return [
        _initializer(model, f"{name}.{part}", array, scratch)
        for part, array in zip((f"int{found.bits}", "scales", "zeros"), arrays, strict=False)
    ]


def _initializer(
    model: onnx_ir.Model, name: str, array: Array, scratch: ScratchFile
) -> onnx_ir.Value:
    import onnx_ir

    kind = onnx_ir.tensor(array[:0]).dtype
    shape, dtype, size = array.shape, array.dtype, array.nbytes
    at = scratch.write(torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))

    def read() -> Any:
        held = scratch.read(at, (size,), torch.uint8).numpy()
        return onnx_ir.Tensor(held.view(dtype).reshape(shape), dtype=kind)

    tensor = onnx_ir.LazyTensor(read, dtype=kind, shape=onnx_ir.Shape(shape), name=name)
    return initializer(model, tensor)


def _read(
    model: onnx_ir.Model,
    use: _Use,
    parts: list[onnx_ir.Value],
    shape: tuple[int, int],
    bits: int,
    block: int,
) -> None:
    """Let the node of `use` read a quantized matrix of `shape`."""
    from onnx_ir import tape

    made, (result,) = tape.Tape(), use.node.outputs
    packed, *others = parts
    if use.picks:
        inputs = [_rows_of(model, packed), use.node.inputs[1], *others]
        numbers = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": block}
        out = made.op("GatherBlockQuantized", inputs, numbers, domain="com.microsoft")
    else:
        numbers = {"K": shape[1], "N": shape[0], "bits": bits, "block_size": block}
        inputs = [use.node.inputs[0], *parts]
        out = made.op("MatMulNBits", inputs, numbers, domain="com.microsoft")
        if len(use.node.inputs) > 2 and use.node.inputs[2] is not None:
            out.name, out.type, out.shape = f"{result.name}_product", result.type, result.shape
            out = made.op("Add", [out, use.node.inputs[2]])
    out.name, out.type, out.shape = result.name, result.type, result.shape
    model.graph.insert_before(use.node, made.nodes)
    result.replace_all_uses_with(out, replace_graph_outputs=True)
    model.graph.remove(use.node, safe=True)


def _rows_of(model: onnx_ir.Model, packed: onnx_ir.Value) -> onnx_ir.Value:
    """Return `packed` with the bytes of a row together, as rows are picked from it."""
    import onnx_ir

    tensor: Any = packed.const_value
    name, rows = f"{packed.name}{ROWS}", tensor.shape[0]
    if (found := model.graph.initializers.get(name)) is not None:
        return found
    lazy = onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(tensor.numpy().reshape(rows, -1)),
        dtype=tensor.dtype,
        shape=onnx_ir.Shape([rows, tensor.size // rows]),
        name=name,
    )
    value = initializer(model, lazy)
    value.meta[_SAME_BYTES] = packed
    return value
