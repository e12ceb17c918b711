"""Branches, loops and calls of a model's code that torch keeps as graphs of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.utils import rnn

import graphprune as gp
from graphprune.errors import CaptureError

X = torch.randn(3, 5)


class Net(nn.Module):
    def __init__(self, inner: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self, self.first(x).relu()))


def branch(on: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def inner(net: Any, h: Tensor) -> Tensor:
        return torch.cond(on(h), lambda h: net.second(h).relu(), lambda h: h.sin(), (h,))

    return inner


@pytest.mark.parametrize("on", [lambda h: h.shape[1] > 3, lambda h: h.ndim == 3])
def test_a_branch_on_what_is_known_is_read_with_the_rest(on: Callable[[Tensor], bool]) -> None:
    model = Net(branch(on))
    program = gp.capture(model, (X,))
    assert torch.allclose(program(X)["output"], model(X), atol=1e-6)
    assert not program.graph.find_nodes(op="get_attr")
    assert 12 in [group.size for group in gp.analyze(program).groups] or on(X) is False


def test_the_path_of_an_example_is_that_of_the_weights_as_they_are() -> None:
    for seed in range(5):  # memory that was not written held anything
        torch.manual_seed(seed)
        model = Net(lambda net, h: net.second(h) if h.sum() > 0 else h.sin())
        program = gp.capture(model, (X,), along_example=True)
        assert torch.allclose(program(X)["output"], model(X), atol=1e-6)


def test_a_branch_on_data_is_refused_as_one_of_python_is() -> None:
    torch.manual_seed(0)
    model = Net(branch(lambda h: h.sum() > 0))
    program = gp.capture(model, (X,), along_example=True)
    h = model.first(X).relu()
    assert h.sum() > 0
    assert torch.allclose(program(X)["output"], model.last(model.second(h).relu()), atol=1e-6)
    assert "example-path" in [note.kind for note in program.notes]
    with pytest.raises(CaptureError, match=r"test_regions.py:\d+.*along_example=True captures"):
        gp.capture(model, (X,))


def loop(net: Any, h: Tensor) -> Tensor:
    def step(count: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, net.second(h).tanh()

    return while_loop(lambda count, h: count < 3, step, (torch.tensor(0), h))[1]


@pytest.mark.parametrize(
    ("inner", "what"),
    [
        (loop, "while_loop"),
        (lambda net, h: torch.vmap(net.second)(h), "torch.func"),
        (lambda net, h: torch.func.grad(lambda h: net.second(h).sum())(h), "torch.func"),
    ],
)
def test_what_a_graph_cannot_be_read_through_is_refused_with_its_line(
    inner: Callable[[Any, Tensor], Tensor], what: str
) -> None:
    with pytest.raises(CaptureError, match=rf"calls {what}, .*\(at test_regions.py:\d+\)"):
        gp.capture(Net(inner), (X,))


def test_packed_sequences_are_refused_with_their_line_and_what_to_do() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(5, 6, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]

    with pytest.raises(CaptureError, match=r"give the layer the padded batch.*test_regions.py:"):
        gp.capture(Packed(), (torch.randn(2, 7, 5), torch.tensor([7, 3])))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_part_that_is_no_code_is_named() -> None:
    model = nn.Sequential(nn.Linear(5, 6), torch.jit.script(nn.Linear(6, 2)))
    with pytest.raises(CaptureError, match="1 of Sequential is TorchScript"):
        gp.capture(model, (X,))


def test_a_graph_that_computes_something_else_is_refused() -> None:
    class Told(nn.Linear):
        """Does something else where it is traced."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if torch.compiler.is_exporting() else 1)

    with pytest.raises(CaptureError, match="something else than the model on the example"):
        gp.capture(Told(5, 3), (X,))
