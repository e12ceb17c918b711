"""Sizes that follow where capture could take them for fixed, and layers that have such sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import random_plan
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.coupling import Coupling


def checked(coupling: Coupling) -> None:
    plan = random_plan(coupling)
    assert gp.verify(coupling.program, plan, gp.apply(coupling.program, plan)).proves_sizes


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(5, 6, batch_first=True, bidirectional=True, **options)
        self.out = nn.Linear(2 * options.get("proj_size", 6), 3)

    def forward(self, x: Tensor) -> Tensor:
        h, states = self.layers(x)
        last = states[0] if isinstance(states, tuple) else states
        return self.out(h) + last.sum()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {"proj_size": 4, "num_layers": 2}), (nn.GRU, {}), (nn.RNN, {"num_layers": 2})],
)
def test_recurrent_layers_take_any_length(kind: type[nn.RNNBase], options: dict[str, int]) -> None:
    model = Recurrent(kind, **options).eval()
    program = gp.capture(model, (torch.randn(2, 7, 5),))
    assert not program.limits
    assert not program.notes
    for rows, length in ((1, 1), (3, 17)):
        x = torch.randn(rows, length, 5)
        assert torch.allclose(program(x)["output"], model(x), atol=1e-5)
    coupling = gp.analyze(program)
    assert {group.size for group in coupling.groups} == {options.get("proj_size", 6), 6}
    checked(coupling)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(x, k, v, need_weights=False)[0]


def test_rows_that_a_view_makes_the_same_have_one_size() -> None:
    model = Cross().eval()
    program = gp.capture(model, (torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 5)))
    assert len({value.shape[0] for value in program.inputs}) == 1
    assert len({value.shape[1] for value in program.inputs}) == 2
    given = torch.randn(3, 4, 8), torch.randn(3, 6, 6), torch.randn(3, 6, 5)
    assert torch.allclose(program(*given)["output"], model(*given), atol=1e-6)
    coupling = gp.analyze(program)
    assert [group.size for group in coupling.groups if group.role == "kv-head"] == [2]
    checked(coupling)


class Rotary(nn.Module):
    """Rotates by complex numbers that it holds, as Llama's first code did."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 4)
        angles = torch.outer(torch.arange(20.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns[: x.shape[2]]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (2, 8)).transpose(1, 2) for h in self.qkv(x).chunk(3, -1))
        q, k = self.rotate(q), self.rotate(k)
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h.transpose(1, 2).flatten(2))


def test_complex_numbers_that_a_model_holds_are_read_in_reals() -> None:
    model = Rotary().eval()
    program = gp.capture(model, (torch.randn(2, 5, 8),))
    x = torch.randn(3, 9, 8)
    assert torch.allclose(program(x)["output"], model(x), atol=1e-6)
    coupling = gp.analyze(program)
    (group,) = [group for group in coupling.groups if "turns" in group.weights()]
    assert (group.role, group.size, group.exactness) == ("head-dim", 4, "exact")
    assert "kv-head" in {group.role for group in coupling.groups}
    checked(coupling)


def test_a_split_by_tensor_split_is_a_split() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(5, 16), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.up(x).tensor_split(2, -1)
            return self.down(gate.sigmoid() * value)

    coupling = gp.analyze(gp.capture(Gated(), (torch.randn(3, 5),)))
    assert [group.size for group in coupling.groups] == [8]
    checked(coupling)


def test_what_takes_no_negative_numbers_is_verified_on_others() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            degrees = edges.sum(-1, keepdim=True).rsqrt()
            return self.second((degrees * (edges @ self.first(x))).relu())

    program = gp.capture(Graph(), (torch.randn(2, 4, 5), torch.rand(2, 4, 4)))
    checked(gp.analyze(program))
