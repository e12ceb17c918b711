"""Operators for which the exporter has no translation, in those of ONNX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graphprune.frontend.recurrences import operators  # so that torch knows them

if TYPE_CHECKING:
    import onnx_ir

    Value = onnx_ir.Value
    Nodes = list[onnx_ir.Node]


def translations() -> dict[Any, Callable[..., Any]]:
    """Return what writes each operator, as `torch.onnx.export` takes it."""
    return {
        torch.ops.aten.sym_stride.int: _stride,
        torch.ops.aten.rnn_tanh.input: functools.partial(_plain_rnn, "Tanh"),
        torch.ops.aten.rnn_relu.input: functools.partial(_plain_rnn, "Relu"),
        operators.linear_recurrence._opoverload: _linear_recurrence,
        operators.max_recurrence._opoverload: _max_recurrence,
        operators.delta_recurrence._opoverload: _delta_recurrence,
    }


def _stride(self: Any, dim: int) -> Any:
    """Return the stride of a contiguous tensor: the exporter reads sizes from strides of inputs."""
    from onnxscript import opset18

    return opset18.ReduceProd(opset18.Shape(self, start=dim + 1), keepdims=False)


def _plain_rnn(
    activation: str,
    input: Value,
    hx: Value,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, Value]:
    """Write an `nn.RNN` of one activation; the exporter has translations of LSTM and GRU alone."""
    import onnxscript

    op: Any = onnxscript.opset18
    ways, each = 2 if bidirectional else 1, 4 if has_biases else 2
    x = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
    last = []
    for layer in range(num_layers):
        start = layer * ways
        by_way = [params[at * each : (at + 1) * each] for at in range(start, start + ways)]
        inside, own, *biases = (
            op.Concat(*(op.Unsqueeze(weight, [0]) for weight in weights), axis=0)
            for weights in zip(*by_way, strict=True)
        )
        y, after = op.RNN(
            x,
            inside,
            own,
            op.Concat(*biases, axis=1) if biases else None,
            None,
            op.Slice(hx, [start], [start + ways], [0]),
            activations=[activation] * ways,
            direction="bidirectional" if bidirectional else "forward",
            hidden_size=int(by_way[0][1].shape[1]),
        )
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])
        last.append(after)
    final = op.Concat(*last, axis=0) if len(last) > 1 else last[0]
    return (op.Transpose(x, perm=[1, 0, 2]) if batch_first else x), final


# -- recurrences: a Scan, whose body is one step -------------------------------------------------


def _linear_recurrence(update: Value, decay: Value, dim: int) -> Value:
    def step(state: Value, gain: Value, added: Value) -> tuple[Value, Value, Nodes]:
        faded = _node("Mul", gain, state)
        after = _node("Add", faded.outputs[0], added)
        return after.outputs[0], after.outputs[0], [faded, after]

    return _scan(step, _filled(0.0, update, dim), (decay, update), dim)


def _max_recurrence(update: Value, decay: Value, dim: int) -> Value:
    def step(state: Value, loss: Value, other: Value) -> tuple[Value, Value, Nodes]:
        faded = _node("Add", state, loss)
        after = _node("Max", faded.outputs[0], other)
        return after.outputs[0], after.outputs[0], [faded, after]

    least = torch.finfo(torch.float16).min if _is_half(update) else torch.finfo().min
    return _scan(step, _filled(least, update, dim), (decay, update), dim)


def _delta_recurrence(decay: Value, written: Value, values: Value, reads: Value) -> Value:
    import onnxscript

    opset: Any = onnxscript.opset18

    def step(state: Value, *given: Value) -> tuple[Value, Value, Nodes]:
        gain, write, value, read = given
        known = _node("MatMul", read, state)
        new = _node("Sub", value, known.outputs[0])
        added = _node("MatMul", write, new.outputs[0])
        kept = _node("Mul", gain, state)
        after = _node("Add", kept.outputs[0], added.outputs[0])
        return after.outputs[0], state, [known, new, added, kept, after]

    rank = len(written.shape or ())
    first = opset.Gather(written, 0, axis=rank - 3)
    shape = opset.Concat(opset.Shape(first, end=-1), opset.Shape(values, start=rank - 1), axis=0)
    start = opset.CastLike(opset.Expand(0.0, shape), values)
    return _scan(step, start, (decay, written, values, reads), rank - 3)


def _scan(step: Callable[..., Any], start: Value, inputs: tuple[Value, ...], dim: int) -> Value:
    """Return what `step` puts out at each place of `inputs` along `dim`.

    It takes a state and the inputs at one place, and returns the next state, what is put out, and
    the nodes that they come from.
    """
    import onnx_ir as ir
    from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

    kind = inputs[0].type
    given = [ir.Value(name=f"scan_{at}", type=kind) for at in range(len(inputs) + 1)]
    after, out, nodes = step(*given)
    out_node = _node("Identity", out)
    for at, node in enumerate((*nodes, out_node)):
        node.outputs[0].name, node.outputs[0].type = f"scan_step_{at}", kind
    body = ir.Graph(given, [after, out_node.outputs[0]], nodes=[*nodes, out_node], name="step")
    axes = [dim] * len(inputs)
    _, result = call_op(
        "Scan",
        *(start, *inputs),
        _num_outputs=2,
        body=body,
        num_scan_inputs=len(inputs),
        scan_input_axes=axes,
        scan_output_axes=[dim],
    )
    return result


def _node(kind: str, *inputs: Value) -> onnx_ir.Node:
    import onnx_ir

    return onnx_ir.Node("", kind, inputs)


def _filled(value: float, like: Value, dim: int) -> Value:
    """Return a tensor of one value, of the sizes of `like` without `dim`."""
    import onnxscript

    opset: Any = onnxscript.opset18
    shape = opset.Shape(opset.Gather(like, 0, axis=dim))
    return opset.CastLike(opset.Expand(value, shape), like)


def _is_half(value: Value) -> bool:
    import onnx_ir

    return value.dtype == onnx_ir.DataType.FLOAT16
