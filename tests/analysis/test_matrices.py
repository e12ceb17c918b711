"""Matrices against the graph itself: what a contraction gives is its rows times the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, inputs_of, program_of
from torch import Tensor, fx, nn

import graphprune as gp
from graphprune.analysis.matrices import Contractions, Matrix, contractions, last_sum
from graphprune.ir.interpreter import Hooks, Interpreter, Values, given_of
from graphprune.ir.program import Program


def captured(module: nn.Module, *inputs: Tensor) -> Program:
    torch.manual_seed(0)
    return gp.capture(module.eval(), example_inputs=inputs)


class _Watch:
    """Compares every contraction with its matrix while the graph runs."""

    def __init__(self, program: Program, found: Contractions) -> None:
        self.program, self.checked = program, 0
        self.uses = [(m, use) for m in found.matrices for use in m.uses]
        self.expected: list[tuple[int, Tensor]] = []

    def run(self, inputs: dict[str, Tensor]) -> None:
        values = Values(given_of(self.program, inputs))
        Interpreter(values, Hooks(self._before, after=self._after)).run(self.program.graph.nodes)

    def _before(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        uses = [(m, use) for m, use in self.uses if use.node is node]
        self.expected = [self._sums(m, use, values) for m, use in uses]

    def _after(self, node: fx.Node, result: Any, values: Mapping[fx.Node, Any]) -> Any:
        for rows, total in self.expected:
            bias = self._bias(node, values)
            got = float(result.double().sum()) - bias * result.numel()
            assert got == pytest.approx(float(total), rel=1e-4, abs=1e-3), (node, rows)
            self.checked += 1
        return result

    def _sums(self, matrix: Matrix, use: Any, held: Mapping[fx.Node, Any]) -> tuple[int, Tensor]:
        values = matrix.read(self.program.weights[matrix.weight]).double()
        pairs = list(use.rows(held))
        return len(pairs), sum(
            ((rows.double() @ values[part].T).sum() for part, rows in pairs), torch.zeros(())
        )

    def _bias(self, n: fx.Node, values: Mapping[fx.Node, Any]) -> float:
        at = {"linear": 2, "addmm": 0, "conv1d": 2, "conv2d": 2}.get(str(n.target).split(".")[1])
        bias = n.args[at] if at is not None and len(n.args) > at else None
        if at is not None and bias is None:
            bias = n.kwargs.get("bias")
        return float(values[bias].double().mean()) if isinstance(bias, fx.Node) else 0.0


def check(program: Program, inputs: dict[str, Tensor]) -> int:
    watch = _Watch(program, contractions(program))
    with torch.no_grad():
        watch.run(inputs)
    return watch.checked


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_times_matrix_is_what_the_graph_computes(name: str) -> None:
    program = program_of(name)
    assert check(program, inputs_of(program)) >= 6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_of_a_layer_is_found(name: str) -> None:
    found = contractions(program_of(name))
    held = {matrix.weight for matrix in found.matrices}
    for weight, why in found.others.items():
        assert weight not in held
        assert "embedding" in why or "expand" in why or "add" in why, (weight, why)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 8, 8), (1, 6, 36)),
        (nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2), (2, 4, 8, 8), (2, 3, 12)),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2), (2, 4, 8, 8), (1, 4, 36)),
        (nn.Conv1d(4, 4, 5, groups=4, padding=2), (2, 4, 9), (4, 1, 5)),
    ],
)
def test_a_convolution_is_a_matrix_of_windows(
    module: nn.Module, shape: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    program = captured(module, torch.randn(shape))
    (matrix,) = contractions(program).matrices
    assert matrix.shape == expected
    assert matrix.channels == expected[2] // (module.weight[0, 0].numel())  # type: ignore[union-attr]
    assert check(program, {program.inputs[0].name: torch.randn(shape)}) == 1


class Packed(nn.Module):
    """A weight of which two slices are used apart, and one of experts picked by index."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(10, 6))
        self.experts = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both.split([6, 4])
        hidden = torch.relu(x @ first.T)
        hidden = hidden @ second.t()
        ids = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return torch.bmm(self.experts[ids], hidden[:, :, None])[..., 0]


def test_slices_are_matrices_of_their_own_and_experts_see_their_own_rows() -> None:
    program = captured(Packed(), torch.randn(7, 6))
    found = {matrix.name: matrix for matrix in contractions(program).matrices}
    assert {name: m.shape for name, m in found.items()} == {
        "both": (1, 6, 6),
        "both+36": (1, 4, 6),
        "experts": (3, 5, 4),
    }
    assert check(program, {program.inputs[0].name: torch.randn(11, 6)}) == 3


def test_writing_what_was_read_changes_nothing() -> None:
    program = program_of("mixtral") if "mixtral" in ARCHITECTURES else program_of("gpt2")
    for matrix in contractions(program).matrices:
        weight = program.weights[matrix.weight]
        assert torch.equal(matrix.write(weight, matrix.read(weight)), weight)
        assert torch.equal(matrix.write(weight, -matrix.read(weight)), -weight)


class Shared(nn.Module):
    """One weight that is multiplied twice, and one that is also looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.inner(torch.tanh(self.inner(self.table(ids))))
        return hidden @ self.table.weight.T


def test_a_weight_that_is_looked_up_too_has_a_reason_and_a_shared_one_two_uses() -> None:
    program = captured(Shared(), torch.zeros(2, 3, dtype=torch.int64))
    found = contractions(program)
    assert [(m.weight, len(m.uses)) for m in found.matrices] == [("inner.weight", 2)]
    assert found.others == {"table.weight": "it is used by aten.embedding.default"}


@pytest.mark.parametrize("accumulate", [True, False])
def test_rows_that_are_put_into_others_are_a_sum_where_they_are_added(accumulate: bool) -> None:
    class Put(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            at = (torch.tensor([1, 0]),)
            return torch.ops.aten.index_put.default(self.linear(x), at, x[:2, :3], accumulate)

    program = captured(Put(), torch.randn(5, 4))
    node = contractions(program).matrices[0].uses[0].node
    assert (last_sum(node) is not node) == accumulate
