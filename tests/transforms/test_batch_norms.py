"""Statistics that are taken anew are those of the data, layer after layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError
from graphprune.ir.program import Program
from graphprune.transforms.batch_norms import reestimate


class Twice(nn.Module):
    """One batch norm at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x) + 1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 1),
        nn.BatchNorm2d(3, affine=False),
        nn.Flatten(),
    ).eval()


def captured(net: nn.Module, x: Tensor) -> tuple[Program, str]:
    program = gp.capture(net, example_inputs=(x,))
    return program, program.inputs[0].name


def images(*counts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(count, 2, 6, 6, generator=generator) + 1 for count in counts]


def test_they_are_those_of_what_comes_in_when_they_are_used() -> None:
    net, parts = network(), images(5, 3, 4)
    program, name = captured(net, parts[0])
    before = {key: weight.clone() for key, weight in program.weights.items()}
    found = reestimate(program, Calibration.from_batches([{name: x} for x in parts]))
    assert list(found) == [key for key, _ in net.named_buffers() if "running" in key]
    net.load_state_dict(found, strict=False)
    for at in (1, 4):
        with torch.no_grad():
            x = net[:at](torch.cat(parts)).movedim(1, -1).flatten(0, -2)
        for key, expected in (("mean", x.mean(0)), ("var", x.var(0))):
            kept = found[f"{at}.running_{key}"]
            assert torch.allclose(kept, expected, rtol=1e-4, atol=1e-5)
            assert kept.dtype == before[f"{at}.running_{key}"].dtype
            assert not torch.allclose(kept, before[f"{at}.running_{key}"], atol=0.05)


def test_the_program_is_left_as_it_is() -> None:
    program, name = captured(network(), images(2)[0])
    before = {key: weight.clone() for key, weight in program.weights.items()}
    reestimate(program, Calibration.from_batches([{name: images(4)[0]}]))
    assert all(torch.equal(before[key], weight) for key, weight in program.weights.items())


def test_norms_that_keep_nothing_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).eval()
    program, name = captured(net, torch.zeros(2, 3))
    assert reestimate(program, Calibration.from_batches([{name: torch.ones(2, 3)}])) == {}


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        (Twice(), torch.ones(2, 3), "norm.running_mean: two batch norms keep it"),
        (nn.Sequential(nn.BatchNorm1d(3)), torch.ones(1, 3), "the data has 1 value of each chan"),
        (nn.Sequential(nn.BatchNorm1d(3)), torch.full((2, 3), torch.inf), "are not finite"),
    ],
)
def test_what_gives_no_statistics_is_refused(net: nn.Module, x: Tensor, message: str) -> None:
    program, name = captured(net.eval(), torch.ones(2, 3))
    with pytest.raises(CalibrationError, match=message):
        reestimate(program, Calibration.from_batches([{name: x}]))
