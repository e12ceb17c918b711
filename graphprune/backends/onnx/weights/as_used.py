"""Weights as an ONNX model uses them, so that no runtime has to make another copy of one.

A linear layer multiplies with the transpose of its weight. Left in the graph, the transpose is made
when a runtime loads the model, beside the weight; so the weight is written transposed, and its name
says so. Where something else reads the weight as it is, such as the embedding that a head is tied
to, both read one copy: the product is a Gemm, which transposes as it reads.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

_TURNED = re.compile(r"(.+)\.transposed((?:_\d+)*)")


def write_as_used(model: onnx_ir.Model) -> None:
    """Take every Transpose of a weight out of `model`, in place.

    A weight that is only read transposed becomes one of another name, which `stored` understands;
    it is made when it is written.
    """
    for value in list(model.graph.initializers.values()):
        readers = [user for user, _ in value.uses()]
        turned = [node for node in readers if node.op_type == "Transpose"]
        alone = len(turned) == len(readers) and not value.is_graph_output()
        if turned and alone and not any(node.outputs[0].is_graph_output() for node in turned):
            for node in turned:
                _write_turned(model, node)
            del model.graph.initializers[str(value.name)]
        else:
            for node in turned:
                _read_in_place(model, node)


def stored(name: str, array: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    """Return name and value that a weight has in the program, of those that it has in a model."""
    match = _TURNED.fullmatch(name)
    if match is None:
        return name, array
    order = [int(dim) for dim in match[2].split("_")[1:]]
    return match[1], array.transpose(np.argsort(order)) if order else array.T


def _write_turned(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    """Put an initializer in the place of `node`, which transposes one."""
    import onnx_ir

    (source,), (result,) = node.inputs, node.outputs
    assert source is not None and source.const_value is not None and source.shape is not None
    held, order = source.const_value, _order(node)
    plain = order == list(range(len(order)))[::-1]
    name = f"{source.name}.transposed" + ("" if plain else "".join(f"_{dim}" for dim in order))
    found = model.graph.initializers.get(name)
    if found is None:
        shape = onnx_ir.Shape([source.shape[dim] for dim in order])
        tensor = onnx_ir.LazyTensor(
            functools.partial(_made, held, order), dtype=held.dtype, shape=shape, name=name
        )
        found = initializer(model, tensor)
    result.replace_all_uses_with(found)
    model.graph.remove(node, safe=True)


def _made(held: Any, order: list[int]) -> Any:
    import onnx_ir

    array = np.ascontiguousarray(held.numpy().transpose(order))
    return onnx_ir.Tensor(array, dtype=held.dtype)


def _order(node: onnx_ir.Node) -> list[int]:
    given = node.attributes.get("perm")
    if given is not None:
        return list(given.as_ints())
    rank = len(node.inputs[0].shape)  # type: ignore[union-attr,arg-type]
    return list(range(rank))[::-1]


def _read_in_place(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    """Let products read what `node` transposes as it is; anything else leaves the node there."""
    (source,), (result,) = node.inputs, node.outputs
    readers = [user for user, _ in result.uses()]
    if result.is_graph_output() or not all(_multiplies_rows(user, result) for user in readers):
        return
    for product in readers:
        _write_as_gemm(model, product, source)
    model.graph.remove(node, safe=True)


def _multiplies_rows(node: onnx_ir.Node, matrix: onnx_ir.Value) -> bool:
    """Return whether `node` multiplies rows with `matrix`, a transposed one of two dimensions."""
    if node.op_type != "MatMul" or node.inputs[0] is matrix:
        return False
    (source,) = matrix.producer().inputs  # type: ignore[union-attr]
    sizes = [value.shape for value in (node.inputs[0], source) if value is not None]
    return all(size is not None for size in sizes) and len(sizes[0]) > 1 and len(sizes[1]) == 2  # type: ignore[arg-type]


def _write_as_gemm(model: onnx_ir.Model, product: onnx_ir.Node, matrix: Any) -> None:
    """Write a product of rows of any shape with a transposed matrix as a Gemm of all of them."""
    from onnx_ir import tape

    (result,), rows = product.outputs, product.inputs[0]
    wide, high = matrix.shape
    made = tape.Tape()
    flat = made.op("Reshape", [rows, whole_numbers(model, -1, high)])
    found = made.op("Gemm", [flat, matrix], {"transB": 1})
    sizes = made.op("Shape", [rows], {"start": 0, "end": -1})
    shape = made.op("Concat", [sizes, whole_numbers(model, wide)], {"axis": 0})
    out = made.op("Reshape", [found, shape])
    out.name, out.type, out.shape = result.name, result.type, result.shape
    model.graph.insert_before(product, made.nodes)
    result.replace_all_uses_with(out, replace_graph_outputs=True)
    model.graph.remove(product, safe=True)


def whole_numbers(model: onnx_ir.Model, *numbers: int) -> onnx_ir.Value:
    """Return an initializer of whole numbers, which all who need it share."""
    import onnx_ir

    name = "sizes_" + "_".join(map(str, numbers)).replace("-", "minus_")
    if (found := model.graph.initializers.get(name)) is None:
        found = initializer(model, onnx_ir.Tensor(np.array(numbers, np.int64), name=name))
    return found


def initializer(model: onnx_ir.Model, tensor: Any) -> onnx_ir.Value:
    """Return a new initializer of `model` that holds `tensor`, by the same name."""
    import onnx_ir

    value = onnx_ir.Value(
        name=tensor.name,
        shape=onnx_ir.Shape(list(tensor.shape)),
        type=onnx_ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value
