"""Models beside each other that read one file of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.backends.onnx.weights.one_file import DATA, in_one_file


def _sums(path: Path, **weights: np.ndarray) -> None:
    """Write a model that gives the sum of each weight, all of which lie in a file of its own."""
    nodes = [helper.make_node("ReduceSum", [w], [f"{w}_sum"], keepdims=0) for w in weights]
    outputs = [helper.make_tensor_value_info(f"{w}_sum", TensorProto.FLOAT, []) for w in weights]
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "sums", [], outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    data = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)


def test_what_models_share_is_there_once_and_they_give_what_they_gave(tmp_path: Path) -> None:
    ones, many = np.ones((64, 32), np.float32), np.arange(64 * 32, dtype=np.float32)
    paths = [tmp_path / "first.onnx", tmp_path / "next.onnx"]
    _sums(paths[0], shared=ones, own=many)
    _sums(paths[1], other_name_and_shape=ones.reshape(32, 64), own=-many)
    in_one_file(paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.onnx", DATA, "next.onnx"]
    assert (tmp_path / DATA).stat().st_size == 3 * ones.nbytes
    found = [onnxruntime.InferenceSession(path).run(None, {}) for path in paths]
    assert found == [[2048, many.sum()], [2048, pytest.approx(-many.sum())]]


def test_models_without_external_data_are_left_alone(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "same", [value], [helper.make_tensor_value_info("y", 1, [1])])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    in_one_file([tmp_path / "m.onnx"])
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
