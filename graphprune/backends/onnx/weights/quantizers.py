"""ONNX Runtime's weight-only quantizers, called for one matrix at a time.

`onnxruntime.quantization.matmul_nbits_quantizer` quantizes models; here it is given models of one
product, so that no more than a piece of one weight is in memory. Blocks run along a row, so rows
can be taken piece by piece.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from graphprune.backends.onnx.weights.blocks import Array, Blocks
from graphprune.errors import BackendError, UsageError, first_line

Algorithm = Literal["default", "hqq", "k-quant"]
"""Rounding with a scale and zero of each block's own; half-quadratic quantization (Badri & Shaji,
2023), for 4 bits; and llama.cpp's search for scales ("k-quant")."""

_CONFIGS: dict[Algorithm, str] = {
    "default": "DefaultWeightOnlyQuantConfig",
    "hqq": "HQQWeightOnlyQuantConfig",
    "k-quant": "KQuantWeightOnlyQuantConfig",
}

_PAIRED: Algorithm = "k-quant"
"""It writes two zeros of 4 bits into a byte across rows, which operators read within a row: so a
row gets an even number of blocks."""

_PIECE = 2**27
"""Bytes of a matrix that are quantized at a time."""

_BLOCKS = (16, 32, 64, 128, 256)


def check_quantizer(bits: int, block: int, algorithm: Algorithm) -> None:
    """Refuse what the ONNX Runtime that is installed does not quantize.

    Raises
    ------
    UsageError
        When there are no blocks of that size.
    BackendError
        When ONNX Runtime is not installed, lacks the algorithm, or fails on a small matrix.
    """
    if block not in _BLOCKS:
        raise UsageError(f"blocks have {_listed(_BLOCKS)} numbers, not {block}")
    if algorithm == "hqq" and bits != 4:
        raise BackendError(f"ONNX Runtime runs no zeros of hqq with {bits} bits: it does with 4")
    try:
        quantized(np.eye(2, 2 * block, dtype=np.float32), bits, block, algorithm)
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime has no quantizer of weights: {first_line(error)}; "
            "graphprune[ort] brings one that has"
        ) from error
    except AttributeError as error:
        raise BackendError(
            f"the ONNX Runtime that is installed lacks the quantizer {algorithm!r}: "
            f"{first_line(error)}"
        ) from error


def check_matrix(name: str, columns: int, block: int) -> None:
    """Refuse a matrix whose `columns` a block does not divide.

    Raises
    ------
    UsageError
        Naming it, and a block that does.
    """
    if columns % block == 0:
        return
    fitting = [each for each in _BLOCKS if columns % each == 0]
    hint = f"{fitting[-1]} does" if fitting else f"no block does, the least is {_BLOCKS[0]}"
    raise UsageError(f"blocks of {block} do not divide the {columns} columns of {name}: {hint}")


def quantized(
    matrix: Array, bits: int, block: int, algorithm: Algorithm, *, symmetric: bool = False
) -> Blocks:
    """Quantize a matrix ``[N, K]`` whose rows are multiplied with.

    Where it is `symmetric`, blocks have no zeros of their own; the algorithm is "default" then.

    Raises
    ------
    BackendError
        When the quantizer fails.
    """
    blocks = matrix.shape[1] // block
    if bits == 4 and algorithm == _PAIRED and blocks % 2:
        even = np.pad(matrix, ((0, 0), (0, block)))
        found = quantized(even, bits, block, algorithm)
        own = found.scales.reshape(len(matrix), -1)[:, :blocks]
        return Blocks(bits, found.packed[:, :blocks], own, found.zeros)
    count = max(_PIECE // max(matrix.shape[1] * matrix.itemsize, 1), 1)
    pieces = [
        _piece(matrix[first : first + count], bits, block, algorithm, symmetric)
        for first in range(0, len(matrix), count)
    ]
    packed, scales, zeros = (
        np.concatenate(parts) if parts[0] is not None else None
        for parts in zip(*((p.packed, p.scales, p.zeros) for p in pieces), strict=True)
    )
    assert packed is not None and scales is not None
    return Blocks(bits, packed, scales, zeros)


def _piece(rows: Array, bits: int, block: int, algorithm: Algorithm, symmetric: bool) -> Blocks:
    from onnx import helper, numpy_helper

    with _quietly():
        from onnxruntime.quantization import matmul_nbits_quantizer as library

        weight = numpy_helper.from_array(np.ascontiguousarray(rows.T), "weight")
        ends = [
            helper.make_tensor_value_info(name, weight.data_type, [1, size])
            for name, size in (("x", rows.shape[1]), ("y", rows.shape[0]))
        ]
        node = helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")
        graph = helper.make_graph([node], "one", ends[:1], ends[1:], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        config = getattr(library, _CONFIGS[algorithm])(
            **_options(bits, block, algorithm, symmetric)
        )
        quantizer = library.MatMulNBitsQuantizer(
            model, bits=bits, block_size=block, algo_config=config
        )
        quantizer.process()
    (product,) = quantizer.model.model.graph.node
    held = {t.name: numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer}
    if product.op_type != "MatMulNBits":
        raise BackendError(f"the quantizer {algorithm!r} leaves {rows.dtype} as it is")
    given = [held[name] for name in product.input[1:]]
    return Blocks(bits, given[0], given[1], given[2] if len(given) > 2 else None)


def _options(bits: int, block: int, algorithm: Algorithm, symmetric: bool) -> dict[str, Any]:
    if algorithm == _PAIRED:
        return {"customized_weight_config": {"product": {"bits": bits}}}
    further = {"is_symmetric": True} if symmetric else {}
    return {"bits": bits, "block_size": block, **further}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the library's progress off the screen, and what it does to logging undone."""
    root, before = logging.root, (logging.root.level, list(logging.root.handlers))
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(before[0])
        root.handlers[:] = before[1]


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
