"""Queries, keys and values from one product: what attention reads is what it read from three."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from graphprune.backends.onnx.weights.held import held_weights
from graphprune.backends.onnx.weights.joined import join_projections
from graphprune.backends.onnx.weights.quantizers import quantized

HIDDEN, WIDTH = 32, {"q": 32, "k": 16, "v": 16}


def attention(
    *,
    biases: str = "",
    zeros: bool = False,
    other: str = "x",
    spoiled: bool = False,
    normed: str = "",
) -> onnx.ModelProto:
    """Make attention of two heads on one.

    `biases` and `normed` name what has a bias and what is normed, `other` what keys are of; queries
    may be `spoiled` by an input.
    """
    random = np.random.default_rng(0)
    nodes, held, read = [], [], {}
    for name, rows in WIDTH.items():
        matrix = random.standard_normal((rows, HIDDEN), dtype=np.float32)
        blocks = quantized(matrix, 4, 16, "default", symmetric=not zeros)
        parts = {"int4": blocks.packed, "scales": blocks.scales, "zeros": blocks.zeros}
        tensors = {f"{name}.{part}": array for part, array in parts.items() if array is not None}
        held += [numpy_helper.from_array(array, part) for part, array in tensors.items()]
        numbers = {"bits": 4, "block_size": 16, "K": HIDDEN, "N": rows}
        given = [other if name == "k" else "x", *tensors]
        nodes.append(
            helper.make_node("MatMulNBits", given, [name], domain="com.microsoft", **numbers)
        )
        read[name] = name
        if name in biases:
            bias = random.standard_normal(rows, dtype=np.float32)
            held.append(numpy_helper.from_array(bias, f"{name}.bias"))
            nodes.append(helper.make_node("Add", [name, f"{name}.bias"], [f"{name}_sum"]))
            read[name] = f"{name}_sum"
        if name in normed:
            scale = random.standard_normal(rows, dtype=np.float32)
            held.append(numpy_helper.from_array(scale, f"{name}.norm"))
            given, numbers = [read[name], f"{name}.norm"], {"axis": -1, "epsilon": 1e-3}
            nodes.append(
                helper.make_node(
                    "SimplifiedLayerNormalization", given, [f"{name}_normed"], **numbers
                )
            )
            read[name] = f"{name}_normed"
    if spoiled:
        nodes.append(helper.make_node("Add", [read["q"], "spoil"], ["spoiled"]))
        read["q"] = "spoiled"
    inputs = [*read.values(), "past_key", "past_value", "lengths", "total"]
    numbers = {"num_heads": 2, "kv_num_heads": 1}
    outputs = ["y", "key", "value"]
    nodes.append(
        helper.make_node("GroupQueryAttention", inputs, outputs, domain="com.microsoft", **numbers)
    )
    real, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    sizes = {"x": [1, "s", HIDDEN], "w": [1, "s", HIDDEN], "spoil": [1, 1, 1]}
    sizes |= {f"past_{each}": [1, 1, "p", 16] for each in ("key", "value")}
    ends = [helper.make_tensor_value_info(name, real, size) for name, size in sizes.items()]
    ends += [
        helper.make_tensor_value_info(n, whole, s) for n, s in (("lengths", [1]), ("total", []))
    ]
    made = [helper.make_tensor_value_info(name, real, None) for name in outputs]
    graph = helper.make_graph(nodes, "attention", ends, made, held)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def joined(model: onnx.ModelProto) -> onnx.ModelProto:
    found = onnx_ir.from_proto(model)
    join_projections(found)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(found)
    return onnx_ir.to_proto(found)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    feeds = {name: random.standard_normal((1, 5, HIDDEN), dtype=np.float32) for name in ("x", "w")}
    feeds |= {name: np.zeros((1, 1, 0, 16), np.float32) for name in ("past_key", "past_value")}
    feeds |= {"spoil": np.full((1, 1, 1), np.nan, np.float32)}
    feeds |= {"lengths": np.array([4], np.int32), "total": np.array(5, np.int32)}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return list(session.run(None, feeds))


@pytest.mark.parametrize(("biases", "zeros"), [("", False), ("qkv", True)])
def test_one_product_gives_what_three_gave(biases: str, zeros: bool) -> None:
    model = attention(biases=biases, zeros=zeros)
    one = joined(model)
    assert [node.op_type for node in one.graph.node].count("MatMulNBits") == 1
    assert list(one.graph.node[-1].input[1:3]) == ["", ""]
    for wanted, found in zip(run(model), run(one), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("biases", ["", "q"])
def test_what_is_normed_before_attention_is_split_off_one_product(biases: str) -> None:
    model = attention(normed="qk", biases=biases)
    one = joined(model)
    kinds = [node.op_type for node in one.graph.node]
    assert (kinds.count("MatMulNBits"), kinds.count("Split")) == (1, 1)
    for wanted, found in zip(run(model), run(one), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_what_spoils_queries_spoils_what_is_attended() -> None:
    one = joined(attention(spoiled=True))
    assert [node.op_type for node in one.graph.node].count("MatMulNBits") == 1
    assert np.isnan(run(one)[0]).all()


def test_weights_are_read_back_each_by_its_name(tmp_path: Path) -> None:
    model = attention(zeros=True)
    onnx.save(model, tmp_path / "three.onnx")
    onnx.save(joined(model), tmp_path / "one.onnx")
    three, one = (
        dict(held_weights(tmp_path / f"{name}.onnx", quantized=True)) for name in ("three", "one")
    )
    assert set(one) == set(WIDTH) == set(three)
    for name, value in three.items():
        np.testing.assert_array_equal(one[name], value)


@pytest.mark.parametrize("normed", ["", "qk"])
def test_what_is_not_of_the_same_stays_as_it_is(normed: str) -> None:
    one = joined(attention(other="w", normed=normed))
    assert [node.op_type for node in one.graph.node].count("MatMulNBits") == 3
