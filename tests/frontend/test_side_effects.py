"""What a call does beside computing its outputs: state, inputs written to, random draws."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 4)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        self.keep(h)
        return self.second(h - self.mean)

    def keep(self, h: Tensor) -> None:
        raise NotImplementedError


class Written(Stateful):
    def keep(self, h: Tensor) -> None:
        self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)


class WrittenView(Stateful):
    def keep(self, h: Tensor) -> None:
        self.mean[2:] = h.mean(0)[2:]


class Replaced(Stateful):
    def keep(self, h: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * h.mean(0)


class Normalized(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        variance = torch.ones(12)
        h = nn.functional.batch_norm(self.first(x), self.mean, variance, training=True)
        return self.second(h)


@pytest.mark.parametrize("kind", [Written, WrittenView, Replaced, Normalized])
def test_every_call_of_a_program_is_the_first(kind: type[Stateful]) -> None:
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    program = gp.capture(model, (X,))
    first, second = program(X)["output"], program(X)["output"]
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    assert not program.limits  # the model gave other outputs with each size that was tried
    assert torch.equal(first, second)
    assert torch.allclose(first, model(X), atol=1e-6)
    assert "what a call leaves in mean is not kept" in program.notes[0].text


def test_a_weight_that_a_call_writes_to_keeps_its_values() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(9, 4, max_norm=0.5)
    before = model.weight.detach().clone()
    program = gp.capture(model, (torch.arange(6).view(2, 3),))
    assert torch.equal(model.weight, before)
    assert program(torch.tensor([[1]]))["output"].norm() < 0.51
    assert "what a call leaves in weight is not kept" in program.notes[0].text


def test_an_input_that_the_model_writes_to_keeps_its_values() -> None:
    class Doubled(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.mul_(2)).relu())

    model, x = Doubled().eval(), X.clone()
    program = gp.capture(model, (x,))
    found = program(x)["output"]
    assert torch.equal(x, X)
    assert not program.limits
    assert torch.allclose(found, model(x))


def test_a_model_that_draws_is_limited_to_no_size() -> None:
    class Noisy(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.dropout(self.first(x), 0.5, training=True)
            return self.second(h + torch.randn_like(h))

    model = Noisy().eval()
    state = torch.get_rng_state()
    program = gp.capture(model, (X,))
    assert torch.equal(state, torch.get_rng_state())
    assert not program.limits
    assert program(X[:1])["output"].shape == (1, 4)


def test_sides_of_an_image_that_must_be_even_are_said_to_be_fixed() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(self.down(x))

    program = gp.capture(Skip(), (torch.randn(2, 3, 8, 8),))
    assert "are 8 alone: no others were tried" in program.notes[0].text
