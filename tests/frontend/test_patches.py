"""What capture changes in torch while it exports, and what has to stay as it was."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import CaptureError


class Layers(nn.Module):
    """Linear layers on all kinds of inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.first(x)
        vector = F.linear(h, self.other.weight[0])
        shifted = F.linear(h, self.other.weight, torch.ones(()))
        return self.other(h.mT.contiguous().mT), self.first(x[0]), vector, shifted


class Branch(nn.Module):
    """Looks at what a layer gives to decide what to do."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(2, 1, bias=False)
        for weight in self.layer.parameters():
            nn.init.ones_(weight)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        found = found if isinstance(found, Tensor) else found[0]
        return x * 2 if found.sum() > 0 else x * 3


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_afterwards_if_it_was_before(collects: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        for width in (2, 3):
            try:
                gp.capture(nn.Linear(2, 2), (torch.zeros(2, width),))
            except CaptureError:
                assert width == 3
            assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (2, 3, 5, 4)], ids=str)
def test_linear_layers_have_the_sizes_and_strides_that_torch_finds(shape: tuple[int, ...]) -> None:
    module, x = Layers().eval(), torch.randn(shape)
    program = gp.capture(module, (x,))
    for expected, found in zip(module(x), program(x).values(), strict=True):
        assert torch.allclose(expected, found, atol=1e-6)
    promised = [node.meta["val"].stride() for _, node in program.output_nodes()]
    assert promised[0][-2:] == module(x)[0].stride()[-2:]


def test_a_linear_layer_that_does_not_fit_is_refused_in_the_words_of_torch() -> None:
    with pytest.raises(CaptureError, match="same reduction dim"):
        gp.capture(nn.Linear(2, 2), (torch.zeros(2, 3),))
    with pytest.raises(CaptureError, match="dtype|type"):
        gp.capture(nn.Linear(2, 2), (torch.zeros(2, 2, dtype=torch.float64),))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM, nn.RNN])
def test_a_branch_behind_a_layer_is_taken_as_its_values_say(
    kind: type[nn.Module], sign: int
) -> None:
    module, x = Branch(kind).eval(), sign * torch.ones(3, 4, 2)
    program = gp.capture(module, (x,), along_example=True)
    assert torch.equal(program(x)["output"], module(x))
