"""Weights lie in a model the way they are used: loading it transposes nothing."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from graphprune.backends.onnx.export import export
from graphprune.backends.onnx.weights.held import held_weights
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program


class Mixed(nn.Module):
    """A head tied to its embedding, a linear layer, packed matrices, and one that leaves turned."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.linear = nn.Linear(6, 6)
        self.packed = nn.Parameter(torch.randn(2, 5, 6))
        self.leaving = nn.Parameter(torch.randn(3, 4))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.linear(self.embedding(ids)).relu()
        experts = hidden.unsqueeze(1) @ self.packed.transpose(1, 2)
        head = hidden @ self.embedding.weight.T
        return {"head": head, "experts": experts, "leaving": self.leaving.T + 0}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Mixed().eval(), (torch.randint(0, 20, (2, 7)),))


@pytest.fixture(scope="module")
def path(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("as_used") / "model.onnx"
    report = export(program, path, external_data=True)
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5
    return path


def test_no_weight_is_left_to_be_transposed(path: Path) -> None:
    graph = onnx_ir.load(path).graph
    turned = [node for node in graph if node.op_type == "Transpose"]
    assert not [node for node in turned if node.inputs[0].name in graph.initializers]  # type: ignore[union-attr]


def test_what_is_only_read_turned_is_stored_so_and_its_name_says_it(path: Path) -> None:
    stored = {t.name: tuple(t.dims) for t in onnx.load(path).graph.initializer}
    assert stored["packed.transposed_0_2_1"] == (2, 6, 5)
    assert {"linear.weight.transposed", "leaving.transposed"} <= stored.keys()
    assert not {"linear.weight", "packed", "leaving"} & stored.keys()


def test_a_tied_weight_stays_one_copy(path: Path, program: Program) -> None:
    stored = [t.name for t in onnx.load(path, load_external_data=False).graph.initializer]
    assert [name for name in stored if name.startswith("embedding")] == ["embedding.weight"]
    held = sum(weight.nbytes for weight in program.weights.values())
    assert path.with_name("model.onnx.data").stat().st_size <= held


def test_weights_are_read_back_as_the_program_has_them(path: Path, program: Program) -> None:
    held = dict(held_weights(path))
    for name, weight in program.weights.items():
        assert torch.equal(held[name], weight)


def test_rows_of_any_shape_meet_a_tied_matrix(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            found = self.embedding(ids)
            return found @ self.embedding.weight.T, found[0, 0] @ self.embedding.weight.T

    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = capture(Tied(), (torch.randint(0, 9, (2, 3, 5)),), dynamic_shapes=sizes)
    report = export(program, tmp_path / "model.onnx")
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5
    assert "Transpose" not in report.operators
    assert report.operators["Gemm"] == 2
