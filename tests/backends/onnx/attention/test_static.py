"""Caches that keep their length, in ONNX Runtime and in ONNX's own evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from byte_llama import byte_llama
from onnx.reference import ReferenceEvaluator

import graphprune as gp
from graphprune.backends.onnx import export as backend
from graphprune.backends.onnx.package import read_package, verify_package, write_package
from graphprune.backends.onnx.parity import SHARED
from graphprune.errors import BackendError
from graphprune.frontend.capture import capture
from graphprune.ir.compare import relative_error
from graphprune.ir.program import Program

ROOM = 12


@pytest.fixture(scope="module")
def llama() -> Program:
    """Two layers that differ in their KV heads."""
    torch.manual_seed(0)
    program = capture(byte_llama(num_hidden_layers=2))
    passes = "merge-kv-heads{groups=2 skip=model.layers.0.*}"
    return gp.Pipeline.parse(passes).run(program, quiet=True).program


@pytest.fixture(scope="module")
def package(llama: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "out"
    write_package(llama, folder, target="portable", opset=24)
    return folder


def test_caches_are_written_in_place_and_proven(package: Path) -> None:
    record = read_package(package)
    assert all(said.startswith("static: ") for said in record.attention.values())
    assert (record.shares_buffers, record.padding) == (True, "both")
    assert {"padded on the left", "chunk on a filled cache", SHARED} <= set(record.parity)
    model = onnx.load(package / "model.onnx")
    count = [node.op_type for node in model.graph.node]
    assert (count.count("TensorScatter"), count.count("Attention")) == (4, 2)
    assert {node.domain for node in model.graph.node} == {""}
    sizes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert sizes["past_key_values.1.key"] == ["batch", 2, "past_sequence", 8]
    assert sizes["present.1.key"] == sizes["past_key_values.1.key"]


def test_onnx_runtime_and_onnx_itself_agree_with_the_program(package: Path, llama: Program) -> None:
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = llama(input_ids=ids)["logits"].numpy()
    path = str(package / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    for run in (session.run, ReferenceEvaluator(path).run):
        feed = {
            value.name: np.zeros((2, value.shape[1], ROOM, value.shape[3]), np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past")
        }
        for start, end in ((0, 5), (5, 6), (6, 9)):
            feed["input_ids"] = ids[:, start:end].numpy()
            feed["attention_mask"] = np.ones((2, end), np.int64)
            found = dict(zip(names, run(names, feed), strict=True))
            logits = torch.from_numpy(found["logits"])
            assert relative_error(torch.from_numpy(expected[:, start:end]), logits) < 1e-5
            feed |= {f"past_key_values.{n[8:]}": a for n, a in found.items() if n != "logits"}
            assert feed["past_key_values.0.key"].shape[2] == ROOM


def test_the_runner_keeps_each_cache_in_one_buffer(package: Path, llama: Program) -> None:
    runner = gp.OnnxRunner(package)
    runner.ends = frozenset()
    prompts = [[72, 101, 108], [7, 250, 31, 0, 5, 9]]
    for prompt, row in zip(prompts, runner.generate(prompts, max_new_tokens=8), strict=True):
        ids = list(prompt)
        for _ in range(8):
            logits = llama(input_ids=torch.tensor([ids]))["logits"]
            ids.append(int(logits[0, -1].argmax()))
        assert list(row.tokens) == ids[len(prompt) :]


@pytest.mark.slow
def test_it_is_proven_again(package: Path) -> None:
    assert SHARED in verify_package(package).errors


def test_an_older_opset_has_caches_that_grow(llama: Program, tmp_path: Path) -> None:
    report = backend.export(llama, tmp_path / "m.onnx", target="portable", check=False)
    assert all(said.startswith("standard: ") for said in report.attention.values())
    assert "TensorScatter" not in report.operators


def test_where_a_runtime_lacks_the_operator_attention_is_taken_apart(
    llama: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: object, **options: object) -> object:
        if any(node.op_type == "TensorScatter" for node in onnx.load(path).graph.node):
            raise BackendError("no kernel of TensorScatter")
        return opened(path, *args, **options)  # type: ignore[arg-type]

    opened = backend.compare.__globals__["open_session"]
    monkeypatch.setitem(backend.compare.__globals__, "open_session", refuse)
    report = backend.export(llama, tmp_path / "m.onnx", target="portable", opset=24)
    assert set(report.attention.values()) == {"decomposed: static failed"}
    assert report.max_relative_error is not None
    assert report.notes[-1] == "attention is not fused: no kernel of TensorScatter"
