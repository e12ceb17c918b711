"""What a converted model is made of: whole layers, few operators, the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.backends.onnx.convert import _norm_before_turning, simplify

NORM = "SimplifiedLayerNormalization<axis=-1, epsilon=0.001, stash_type=1>"


def parsed(body: str, inputs: str, outputs: str) -> onnx_ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 20]> graph ({inputs}) => ({outputs}) {{ {body} }}'
    return onnx_ir.from_proto(onnx.parser.parse_model(text))


def kinds(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run(model: onnx_ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    return list(session.run(None, feeds))


@pytest.mark.parametrize(
    ("back", "kept"),
    [
        ("y = Transpose<perm=[0, 2, 1, 3]>(n)", False),
        ("y = Transpose<perm=[0, 1, 3, 2]>(n)", True),  # it turns something else
        ("y = Transpose<perm=[0, 2, 1, 3]>(n) z = Identity(n)", True),  # it is read turned, too
    ],
)
def test_a_norm_between_two_transposes_reads_what_was_before_them(back: str, kept: bool) -> None:
    def model() -> onnx_ir.Model:
        return parsed(
            f"t = Transpose<perm=[0, 2, 1, 3]>(x) n = {NORM}(t, scale) {back}",
            "float[b, s, 2, 4] x, float[4] scale",
            "float[b, d, e, f] y" + (", float[b, 2, s, 4] z" if "z =" in back else ""),
        )

    simple = model()
    _norm_before_turning(simple)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(simple)
    assert ("Transpose" in kinds(simple)) == kept
    random = np.random.default_rng(0)
    feeds = {
        "x": random.standard_normal((3, 5, 2, 4), dtype=np.float32),
        "scale": random.standard_normal(4, dtype=np.float32),
    }
    for wanted, found in zip(run(model(), **feeds), run(simple, **feeds), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "made", "asked"),
    [
        ("rows, length, eight", "b, s, 8", False),
        ("length, rows, eight", "s, b, 8", True),  # they change places
    ],
)
@pytest.mark.parametrize("past", [0, 3])
def test_a_reshape_is_told_what_stays(sizes: str, made: str, asked: bool, past: int) -> None:
    def model() -> onnx_ir.Model:
        return parsed(
            "rows = Shape<start=0, end=1>(x) length = Shape<start=1, end=2>(x) "
            f"eight = Constant<value_ints=[8]>() shape = Concat<axis=0>({sizes}) "
            "y = Reshape<allowzero=1>(x, shape)",
            "float[b, s, 2, 4] x",
            f"float[{made}] y",
        )

    simple = model()
    simplify(simple, set())
    assert ("Shape" in kinds(simple)) == asked
    x = np.random.default_rng(0).standard_normal((2, past, 2, 4), dtype=np.float32)
    for wanted, found in zip(run(model(), x=x), run(simple, x=x), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.GRU(3, 4, bidirectional=True), "GRU"),
        (nn.RNN(3, 4, num_layers=2, bidirectional=True), "RNN"),
        (nn.RNN(3, 4, nonlinearity="relu", batch_first=True, bias=False), "RNN"),
    ],
)
def test_a_recurrent_layer_is_whole_and_its_length_dynamic(
    layer: nn.RNNBase, kind: str, tmp_path: Path
) -> None:
    program = gp.capture(layer.eval(), (torch.randn(5, 2, 3),))
    report = program.export_onnx(tmp_path / "m.onnx")
    assert report.operators[kind] == layer.num_layers
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for shape in ((1, 1, 3), (9, 4, 3)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = layer(x)
        for found, wanted in zip(session.run(None, {"input": x.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
