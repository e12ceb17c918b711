"""One product for queries, keys and values that are read together.

A product with quantized weights rounds what it is given before it multiplies, so three products of
the same hidden states round them three times; for a single token that, and calling two operators
more, is a good part of the time. GroupQueryAttention also takes queries, keys and values side by
side in one tensor, which one product of their joined weights makes; where some of them are normed
first, they are split again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.backends.onnx.weights.as_used import initializer, whole_numbers
from graphprune.backends.onnx.weights.blocks import note_rows, read_by

if TYPE_CHECKING:
    import onnx_ir

_BY_ROWS = ("Add", "Reshape", "SimplifiedLayerNormalization")
"""Operators between products and attention that make of the rows of their first input others."""


@dataclass(frozen=True)
class _Projection:
    """A product with a quantized weight, its bias if there is one, and what is added after that."""

    product: onnx_ir.Node
    bias: onnx_ir.Node | None
    further: onnx_ir.Node | None


def join_projections(model: onnx_ir.Model) -> None:
    """Let each GroupQueryAttention read one product where it reads three alike, in place.

    Where queries and keys are normed first, what the one product gives is split.
    """
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention":
            continue
        read = [_projection(value) for value in node.inputs[:3]]
        projections = [each for each in read if each is not None]
        made = [_product(value) for value in node.inputs[:3]]
        products = [each for each in made if each is not None]
        if len(projections) == 3 and _are_alike(projections):
            _join(model, node, projections)
        elif len(set(products)) == 3 and len({_kind(each) for each in products}) == 1:
            _split(model, products)


def _kind(product: onnx_ir.Node) -> tuple[Any, ...]:
    """Return what has to be the same of products that become one."""
    kept = sorted((k, a.value) for k, a in product.attributes.items() if k != "N")
    return product.inputs[0], len(product.inputs), *kept


def _product(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """Return the product that `value` is made from, row by row."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _BY_ROWS:
        read = node.inputs[0]
        node = read.producer() if read is not None else None
    return node if node is not None and node.op_type == "MatMulNBits" else None


def _projection(value: onnx_ir.Value | None) -> _Projection | None:
    """Return the product that only `value` is made from; None where there is more."""
    further: onnx_ir.Node | None = None
    bias: onnx_ir.Node | None = None
    while value is not None and len(value.uses()) == 1 and (node := value.producer()) is not None:
        if node.op_type == "MatMulNBits":
            return _Projection(node, bias, further)
        if node.op_type != "Add" or bias is not None or node.inputs[1] is None:
            return None
        if node.inputs[1].is_initializer():
            bias = node
        elif further is None:
            further = node
        else:
            return None
        value = node.inputs[0]
    return None


def _are_alike(projections: Sequence[_Projection]) -> bool:
    alike = {(_kind(each.product), each.bias is None) for each in projections}
    return len(alike) == 1 and not any(each.further for each in projections[1:])


def _join(
    model: onnx_ir.Model, attention: onnx_ir.Node, projections: Sequence[_Projection]
) -> None:
    from onnx_ir import tape

    made = tape.Tape()
    result = _joint(model, made, [each.product for each in projections])
    if projections[0].bias is not None:
        biases = [each.bias.inputs[1] for each in projections if each.bias is not None]
        result = made.op("Add", [result, _joined(model, biases)])
    if (further := projections[0].further) is not None:
        result = made.op("Add", [result, further.inputs[1]])
    result.name = f"{attention.outputs[0].name}_read"
    model.graph.insert_before(attention, made.nodes)
    for at, value in enumerate((result, None, None)):
        attention.replace_input_with(at, value)


def _split(model: onnx_ir.Model, products: Sequence[onnx_ir.Node]) -> None:
    from onnx_ir import tape

    made = tape.Tape()
    first = min(products, key=list(model.graph).index)
    sizes = whole_numbers(model, *(node.attributes["N"].as_int() for node in products))
    whole = _joint(model, made, products)
    whole.name = f"{first.outputs[0].name}_joined"
    parts = made.op_multi_out("Split", [whole, sizes], {"axis": -1}, num_outputs=len(products))
    model.graph.insert_before(first, made.nodes)
    for node, part in zip(products, parts, strict=True):
        (result,) = node.outputs
        part.name, part.type, part.shape = result.name, result.type, result.shape
        result.replace_all_uses_with(part, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _joint(model: onnx_ir.Model, made: Any, products: Sequence[onnx_ir.Node]) -> onnx_ir.Value:
    """Return one product of all rows of several."""
    parts = zip(*(node.inputs[1:] for node in products), strict=True)
    inputs = [products[0].inputs[0], *(_joined(model, part) for part in parts)]
    rows = {read_by(node): node.attributes["N"].as_int() for node in products}
    attributes = {name: each.value for name, each in products[0].attributes.items()}
    attributes["N"] = sum(rows.values())
    result: onnx_ir.Value = made.op("MatMulNBits", inputs, attributes, domain="com.microsoft")
    note_rows(made.nodes[-1], rows)
    return result


def _joined(model: onnx_ir.Model, values: Sequence[onnx_ir.Value | None]) -> onnx_ir.Value:
    """Return an initializer of the rows of others, made when it is written."""
    import onnx_ir

    tensors: list[Any] = [value.const_value for value in values if value is not None]
    name = f"{tensors[0].name}.joined"
    shape = [sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]]

    def made() -> Any:
        array = np.concatenate([tensor.numpy() for tensor in tensors])
        return onnx_ir.Tensor(array, dtype=tensors[0].dtype)

    lazy = onnx_ir.LazyTensor(made, dtype=tensors[0].dtype, shape=onnx_ir.Shape(shape), name=name)
    return initializer(model, lazy)
