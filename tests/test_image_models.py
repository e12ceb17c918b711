"""A detector and a diffusion U-Net, tiny, from capture at sides that strides divide to the cut."""

from __future__ import annotations

import pytest
import torch
from architectures import random_plan
from plain_modules import conv
from tiny_models import perturb
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import graphprune as gp


class Split(nn.Module):
    """Halves of the channels go on one after another, and all that came up is joined."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = conv(inside, outside, 1)
        self.steps = nn.ModuleList([conv(outside // 2, outside // 2) for _ in range(2)])
        self.last = conv(2 * outside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(F.silu(self.first(x)).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + F.silu(step(parts[-1])))
        return F.silu(self.last(torch.cat(parts, 1)))


class Detector(nn.Module):
    """Two scales, pooled several times, joined; boxes as expectations over distances."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fine, self.down = conv(3, 8, stride=2), Split(8, 8), conv(8, 12, stride=2)
        self.reduce, self.pooled, self.merge = conv(12, 6, 1), conv(18, 12, 1), Split(20, 8)
        self.boxes = nn.ModuleList([nn.Conv2d(width, 16, 1) for width in (8, 12)])
        self.classes = nn.ModuleList([nn.Conv2d(width, 3, 1) for width in (8, 12)])
        self.register_buffer("distances", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(F.silu(self.stem(x)))
        pools = [self.reduce(F.silu(self.down(fine)))]
        for _ in range(2):
            pools.append(F.max_pool2d(pools[-1], 3, 1, 1))
        coarse = F.silu(self.pooled(torch.cat(pools, 1)))
        fine = self.merge(torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1))
        found = []
        for level, box, kind in zip((fine, coarse), self.boxes, self.classes, strict=True):
            found.append(torch.cat([box(level), kind(level)], 1).flatten(2))
        box, kind = torch.cat(found, 2).split((16, 3), 1)
        chances = box.unflatten(1, (4, 4)).softmax(2)
        return torch.cat([(chances * self.distances[:, None]).sum(2), kind.sigmoid()], 1)


class Block(nn.Module):
    """A residual block that the time scales and shifts."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(2, inside), nn.GroupNorm(2, outside)])
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)
        self.time, self.short = nn.Linear(8, 2 * outside), nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[..., None, None].chunk(2, 1)
        h = self.norms[1](self.first(F.silu(self.norms[0](x)))) * (1 + scale) + shift
        return self.second(F.silu(h)) + self.short(x)


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.stem = nn.Linear(8, 8), nn.Conv2d(3, 4, 3, padding=1)
        self.above, self.below, self.back = Block(4, 4), Block(4, 8), Block(12, 4)
        self.qkv, self.mix, self.out = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        angles = steps[:, None] * torch.exp(-torch.arange(4.0))
        time = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)))
        above = self.above(self.stem(x), time)
        below = self.below(F.avg_pool2d(above, 2), time)
        q, k, v = self.qkv(below).flatten(2).unflatten(1, (3, 2, 4)).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(below.shape)
        up = F.interpolate(below + self.mix(mixed), scale_factor=2.0)
        return self.out(F.silu(self.back(torch.cat([up, above], 1), time)))


IMAGE = torch.randn(2, 3, 16, 16)
SIDES = {2: 4 * Dim("height", min=2, max=64), 3: 4 * Dim("width", min=2, max=64)}


@pytest.mark.parametrize(
    ("model", "example", "least"),
    [(Detector, (IMAGE,), 9), (Diffusion, (IMAGE, torch.rand(2)), 10)],
)
def test_every_group_can_lose_a_quarter(
    model: type[nn.Module], example: tuple[Tensor, ...], least: int
) -> None:
    torch.manual_seed(0)
    net = perturb(model()).eval()
    shapes = ({0: Dim.AUTO} | SIDES, *({0: Dim.AUTO} for _ in example[1:]))
    program = gp.capture(net, example, dynamic_shapes=shapes)
    larger = (torch.randn(1, 3, 24, 32), *(each[:1] for each in example[1:]))
    assert torch.allclose(program(*larger)["output"], net(*larger), atol=1e-4)
    coupling = gp.analyze(program)
    assert len(coupling.groups) >= least
    plan = random_plan(coupling)
    assert gp.verify(program, plan, gp.apply(program, plan)).proves_sizes
