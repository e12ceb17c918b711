"""Plain modules of the kinds that people bring: what is found, and that removing it is exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_plan, relative_error
from tiny_models import perturb
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group


def conv(inside: int, outside: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Module:
    """A convolution without bias and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    )


class Head(nn.Module):
    """Global pooling and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


# -- convolutional networks ---------------------------------------------------------------------


class Basic(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = conv(inside, outside, stride=stride)
        self.second = conv(outside, outside)
        self.short = nn.Identity() if stride == 1 else conv(inside, outside, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.short(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.Sequential(
            Basic(8, 8, 1), Basic(8, 8, 1), Basic(8, 12, 2), Basic(12, 12, 1)
        )
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


class Dense(nn.Module):
    def __init__(self, inside: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inside)
        self.conv = nn.Conv2d(inside, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.Sequential(Dense(6), Dense(10))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 7, 1), nn.AvgPool2d(2)
        )
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transition(self.layers(self.stem(x))))


class UNet(nn.Module):
    """Two levels: up once by a transposed convolution and once by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv(3, 4), conv(4, 6)
        self.middle = conv(6, 8)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, 2)
        self.merge2 = conv(12, 5)
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear")
        self.merge1 = conv(9, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        low = F.relu(self.middle(F.max_pool2d(two, 2)))
        two = F.relu(self.merge2(torch.cat([self.up2(low), two], 1)))
        return self.out(F.relu(self.merge1(torch.cat([self.up1(two), one], 1))))


class MobileNet(nn.Module):
    """Inverted residuals with depthwise convolutions and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6, stride=2)
        self.expand, self.depthwise = conv(6, 12, 1), conv(12, 12, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project = conv(12, 6, 1)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        h = F.relu6(self.depthwise(F.relu6(self.expand(x))))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1))))
        return self.head(x + self.project(h * F.hardsigmoid(gate)))


class ShuffleNet(nn.Module):
    """Grouped convolutions whose channels are shuffled by a view and a transposition."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.stem = conv(3, 12)
        self.reduce, self.depthwise = conv(12, 12, 1, groups=groups), conv(12, 12, groups=12)
        self.restore = conv(12, 12, 1, groups=groups)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        h = F.relu(self.reduce(x))
        h = h.view(len(h), self.groups, -1, *h.shape[2:]).transpose(1, 2).reshape(h.shape)
        return self.head(F.relu(x + self.restore(self.depthwise(h))))


class Shuffle2(nn.Module):
    """ShuffleNet V2: half of the channels pass, and the halves are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.branch = nn.Sequential(conv(4, 4, 1), nn.ReLU(), conv(4, 4, groups=4), conv(4, 4, 1))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        passed, changed = self.stem(x).chunk(2, 1)
        h = torch.cat([passed, self.branch(changed)], 1)
        h = h.view(len(h), 2, 4, *h.shape[2:]).transpose(1, 2).reshape(h.shape)
        return self.head(h)


class ResNeXt(nn.Module):
    """A grouped convolution between two pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = conv(3, 12, 1), conv(12, 8, groups=4)
        self.last = conv(8, 6, 1)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.grouped(F.relu(self.first(x)))))))


class Norms(nn.Module):
    """Batch, group and instance norms, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in [(3, 8), (8, 12), (12, 6), (6, 10)]
        )
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(8),
                nn.GroupNorm(4, 12),
                nn.InstanceNorm2d(6, affine=True),
                nn.InstanceNorm2d(10, affine=True, track_running_stats=True),
            ]
        )
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        return self.head(x)


class SuperResolution(nn.Module):
    """Pixel shuffles, a transposed convolution in groups, PReLU, pads of every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        self.slope = nn.PReLU(6)
        self.second = nn.Conv2d(6, 20, 3, padding=1, padding_mode="replicate")
        self.third = nn.Conv2d(5, 4, 3, padding=1, padding_mode="circular")
        self.one_slope = nn.PReLU()
        self.up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.last = nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.second(self.slope(self.first(x))), 2)
        return self.last(F.pixel_unshuffle(self.up(self.one_slope(self.third(x))), 2))


# -- attention ----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Fused queries, keys and values, spelled out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        scores = scores if bias is None else scores + bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches by a convolution, a class token joined before them, learnt places."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 5, 12))
        self.layers = nn.Sequential(Layer(12, 3), Layer(12, 3))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layers(x))[:, 0])


class Swin(nn.Module):
    """Attention within shifted windows, with a bias by relative place, and patch merging."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, 2)
        self.norm, self.attention = nn.LayerNorm(12), Attention(12, 3)
        self.table = nn.Parameter(torch.randn(9, 3))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"))
        apart = places.flatten(1)[:, :, None] - places.flatten(1)[:, None]
        self.register_buffer("apart", ((apart[0] + 1) * 3 + apart[1] + 1).flatten())
        self.merge = nn.Linear(48, 10, bias=False)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        n, height, width, channels = x.shape
        h = torch.roll(self.norm(x), (-1, -1), (1, 2))
        h = h.view(n, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        bias = self.table[self.apart].view(4, 4, -1).permute(2, 0, 1)[None]
        h = self.attention(h.reshape(-1, 4, channels), bias)
        h = h.view(n, height // 2, width // 2, 2, 2, channels).transpose(2, 3)
        x = x + torch.roll(h.reshape(n, height, width, channels), (1, 1), (1, 2))
        corners = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        return self.head(F.gelu(self.merge(torch.cat(corners, -1))).mean((1, 2)))


class GroupedQueries(nn.Module):
    """Attention of six queries over two keys and values, by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 24), nn.Linear(10, 8), nn.Linear(10, 8)
        self.out = nn.Parameter(torch.randn(2, 3, 4, 10) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 3, 4))
        k, v = (layer(x).unflatten(-1, (2, 4)) for layer in (self.k, self.v))
        scores = torch.einsum("bskqd,btkd->bkqst", q, k) * 0.5
        mixed = torch.einsum("bkqst,btkd->bskqd", scores.softmax(-1), v)
        return torch.einsum("...kqd,kqdh->...h", mixed, self.out)


# -- what is shared -----------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that embeds and also reads out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 8)
        self.up, self.down = nn.Linear(8, 14), nn.Linear(14, 8)
        self.out = nn.Linear(8, 17, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.out(h + self.down(F.relu(self.up(h))))


class Twice(nn.Module):
    """One module called twice: what it reads and what it makes are one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(F.relu(self.again(F.relu(self.first(x))))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int, **options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.cell = kind(8, 7, batch_first=True, **options)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.cell(F.relu(self.before(x)))
        return self.down(F.relu(self.up(h)))


class Spectral(nn.Module):
    """Channels pass a Fourier transform over places, windows, and pooling by the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.windows = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(24, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.fft2(self.first(x).flip(-1)).abs()
        h = F.relu(self.windows(F.unfold(h, 2, stride=2).transpose(1, 2)))
        return self.head(F.adaptive_max_pool1d(h.transpose(1, 2), 1).flatten(1))


IMAGE = (2, 3, 8, 8)
TEXT = (2, 7, 6)

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, (2, 3, 16, 16)),
    "densenet": (DenseNet, IMAGE),
    "unet": (UNet, IMAGE),
    "mobilenet": (MobileNet, IMAGE),
    "shufflenet": (ShuffleNet, IMAGE),
    "shufflenet-v2": (Shuffle2, IMAGE),
    "resnext": (ResNeXt, IMAGE),
    "norms": (Norms, IMAGE),
    "super-resolution": (SuperResolution, IMAGE),
    "vit": (ViT, IMAGE),
    "swin": (Swin, IMAGE),
    "grouped-queries": (GroupedQueries, (2, 7, 10)),
    "tied": (Tied, (2, 7)),
    "twice": (Twice, TEXT),
    "lstm": (lambda: Recurrent(nn.LSTM, 14, num_layers=2, bidirectional=True), TEXT),
    "gru": (lambda: Recurrent(nn.GRU, 7), TEXT),
    "spectral": (Spectral, IMAGE),
}


def inputs_of(name: str, seed: int = 0) -> Tensor:
    generator, shape = torch.Generator().manual_seed(seed), MODULES[name][1]
    if name == "tied":
        return torch.randint(17, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@cache
def coupling_of(name: str) -> Coupling:
    build, _ = MODULES[name]
    torch.manual_seed(0)
    model = perturb(build())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)  # what a layer makes of its input shall not fade
    x = inputs_of(name)
    program = gp.capture(model, example_inputs=(x,))
    with torch.no_grad():
        torch.testing.assert_close(program(x)["output"], model(x))
    return gp.analyze(program)


# -- what is found ------------------------------------------------------------------------------

FOUND = {
    "resnet": "residual 8, channel 8, channel 8, channel 12, residual 12, channel 12",
    "densenet": "channel 6, channel 4, channel 4, ffn 7",
    "unet": "channel 4, channel 6, channel 8, channel 6, channel 5, channel 4",
    "mobilenet": "residual 6, channel 12, channel 3",
    "shufflenet": "channel 2, residual 6, channel 3",
    "shufflenet-v2": "ffn 4, channel 4, channel 4",
    "resnext": "channel 4, channel 3, channel 2, ffn 6",
    "norms": "channel 8, channel 4, channel 3, channel 6, ffn 10",
    "super-resolution": "channel 6, channel 5, channel 2, channel 2, channel 3",
    "vit": "residual 12, kv-head 3, head-dim 4, ffn 20, kv-head 3, head-dim 4, ffn 20",
    "swin": "kv-head 3, residual 12, head-dim 4, ffn 10",
    "grouped-queries": "kv-head 2, query-slot 3, head-dim 4, head-dim 4",
    "tied": "residual 8, ffn 14",
    "twice": "ffn 8",
    "lstm": "ffn 8, ffn 7, ffn 12",
    "gru": "ffn 8, ffn 7, ffn 12",
    "spectral": "ffn 6, ffn 7",
}


@pytest.mark.parametrize("name", MODULES)
def test_the_groups_of_a_module_are_found(name: str) -> None:
    found = [f"{group.role} {group.size}" for group in coupling_of(name).groups]
    assert ", ".join(found) == FOUND[name]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODULES)
def test_removing_from_all_groups_at_once_equals_zeroing(name: str, seed: int) -> None:
    coupling = coupling_of(name)
    plan = random_plan(coupling, ratio=None, seed=seed)
    report = gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))
    assert report.max_relative_error <= 1e-4


@pytest.mark.parametrize("name", MODULES)
def test_what_is_left_still_tells_inputs_apart(name: str) -> None:
    coupling = coupling_of(name)
    plan = random_plan(coupling)
    pruned = gp.apply(coupling.program, plan)
    assert gp.verify(coupling.program, plan, pruned).max_relative_error <= 1e-4
    first, second = inputs_of(name, seed=1), inputs_of(name, seed=2)
    found = pruned(first)["output"]
    assert relative_error(found, pruned(second)["output"]) > 0.01
    assert relative_error(found, coupling.program(first)["output"]) > 0.01


@pytest.mark.parametrize("name", ["unet", "shufflenet", "swin", "lstm", "grouped-queries"])
def test_what_is_left_is_the_same_in_onnx(name: str, tmp_path: Path) -> None:
    pruned = gp.apply(coupling_of(name).program, random_plan(coupling_of(name)))
    assert pruned.export_onnx(tmp_path / "m.onnx").max_relative_error <= 1e-4


def groups_at(name: str, weight: str, dim: int = 0) -> list[Group]:
    places = (weight, dim)
    return [
        group
        for group in coupling_of(name).groups
        if places in {(member.weight, member.dim) for member in group.members}
    ]


def reached(name: str, weight: str, dim: int = 0) -> set[tuple[str, int]]:
    """Where else the only group of a dimension reaches, biases and norms left out."""
    (group,) = groups_at(name, weight, dim)
    weights = coupling_of(name).program.weights
    return {(m.weight, m.dim) for m in group.members if weights[m.weight].ndim > 1}


def test_a_residual_stage_is_one_group_with_its_norms() -> None:
    (group,) = groups_at("resnet", "stem.0.0.weight")
    norms = {"stem.0.1", "stages.0.second.1", "stages.1.second.1"}
    kinds = ("weight", "bias", "running_mean", "running_var")
    assert {f"{norm}.{kind}" for norm in norms for kind in kinds} <= set(group.weights())
    assert reached("resnet", "stem.0.0.weight") == {
        ("stem.0.0.weight", 0),
        *((f"stages.{at}.first.0.weight", 1) for at in range(3)),
        *((f"stages.{at}.second.0.weight", 0) for at in range(2)),
        ("stages.2.short.0.weight", 1),
    }
    assert reached("resnet", "stages.0.first.0.weight") == {
        ("stages.0.first.0.weight", 0),
        ("stages.0.second.0.weight", 1),
    }


def test_concatenated_channels_are_groups_of_their_own() -> None:
    groups = groups_at("densenet", "transition.2.weight", 1)
    offsets = [
        member.offset
        for group in groups
        for member in group.members
        if (member.weight, member.dim) == ("transition.2.weight", 1)
    ]
    assert [(group.size, at) for group, at in zip(groups, offsets, strict=True)] == [
        (6, 0),
        (4, 6),
        (4, 10),
    ]
    assert [group.weights()[0] for group in groups] == [
        "stem.weight",
        "layers.0.conv.weight",
        "layers.1.conv.weight",
    ]


def test_what_skips_a_level_is_joined_with_what_comes_up() -> None:
    assert reached("unet", "down2.0.weight") == {
        ("down2.0.weight", 0),
        ("middle.0.weight", 1),
        ("merge2.0.weight", 1),
    }
    assert reached("unet", "up2.weight", 1) == {("up2.weight", 1), ("merge2.0.weight", 1)}


def test_depthwise_channels_are_what_comes_in_and_goes_out() -> None:
    assert reached("mobilenet", "depthwise.0.weight") == {
        ("expand.0.weight", 0),
        ("depthwise.0.weight", 0),
        ("squeeze.weight", 1),
        ("excite.weight", 0),
        ("project.0.weight", 1),
    }


def test_grouped_convolutions_lose_whole_groups_and_channels_of_every_group() -> None:
    inside, outside = (
        groups_at("resnext", "grouped.0.weight", 1),
        groups_at("resnext", "first.0.weight"),
    )
    assert [group.size for group in inside] == [3]
    assert [group.size for group in outside] == [4, 3]
    assert [group.size for group in groups_at("resnext", "last.0.weight", 1)] == [4, 2]


def test_shuffled_channels_keep_their_groups() -> None:
    coupling = coupling_of("shufflenet")
    types = [
        coupling.type_of(f"{name}.0.weight").text for name in ("reduce", "depthwise", "restore")
    ]
    assert [text[:2] for text in types] == [
        ("(c c c2)", "hidden"),
        ("(c c2 c)", "1"),
        ("(c hidden)", "(c2 c)"),
    ]


def test_whole_normalized_groups_go_exactly_and_channels_of_each_approximately() -> None:
    found = groups_at("norms", "norms.1.weight")
    assert [(group.size, group.exactness) for group in found] == [(4, "exact"), (3, "approximate")]
    assert "mean and variance over it at aten.group_norm.default" in found[1].why


def test_slopes_and_shuffled_pixels_follow_their_channels() -> None:
    (first,) = groups_at("super-resolution", "slope.weight")
    assert set(first.weights()) == {"first.weight", "first.bias", "slope.weight", "second.weight"}
    assert groups_at("super-resolution", "one_slope.weight") == []
    (channel,) = groups_at("super-resolution", "second.weight")
    assert [m.width for m in channel.members if m.weight == "second.weight"] == [4]


def test_a_class_token_and_places_are_on_the_residual_stream() -> None:
    stream = reached("vit", "patches.weight")
    assert {("token", 2), ("places", 2), ("head.weight", 1)} <= stream
    assert groups_at("vit", "token", 2)[0].exactness == "approximate"


def test_shifted_windows_let_heads_and_channels_pass() -> None:
    (head,) = groups_at("swin", "table", 1)
    assert head.role == "kv-head"
    assert ("merge.weight", 1) in reached("swin", "patches.weight")


def test_query_slots_are_shared_by_key_value_heads() -> None:
    roles = {group.role for group in groups_at("grouped-queries", "q.weight")}
    assert roles == {"kv-head", "query-slot", "head-dim"}
    assert "q.weight" in groups_at("grouped-queries", "k.weight")[0].weights()
    assert reached("grouped-queries", "out", 1) == {("out", 1), ("q.weight", 0)}


def test_a_tied_table_loses_columns_and_keeps_its_rows() -> None:
    assert reached("tied", "table.weight", 1) >= {("table.weight", 1), ("down.weight", 0)}
    assert "out.weight" in coupling_of("tied").program.aliases
    assert groups_at("tied", "table.weight", 0) == []


def test_a_module_called_twice_reads_what_it_makes() -> None:
    assert reached("twice", "again.weight", 0) == {
        ("first.weight", 0),
        ("again.weight", 0),
        ("again.weight", 1),
        ("last.weight", 1),
    }


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3)])
def test_a_hidden_unit_has_a_row_in_every_gate(name: str, gates: int) -> None:
    (group,) = groups_at(name, "cell.weight_hh_l0", 1)
    (rows,) = [m for m in group.members if (m.weight, m.dim) == ("cell.weight_hh_l0", 0)]
    assert rows.indices(2) == [2 + 7 * gate for gate in range(gates)]
    assert "up.weight" in group.weights()


class Standardised(nn.Module):
    """A convolution whose weight is brought to mean 0 and variance 1 before each use."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.norm, self.head = nn.GroupNorm(2, 6), Head(6)
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        if self.by_hand:
            variance, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
            weight = (weight - mean) / (variance + 1e-5).sqrt()
        else:
            flat = weight.reshape(1, len(weight), -1)
            weight = F.batch_norm(flat, None, None, training=True).reshape_as(weight)
        return self.head(self.norm(F.conv2d(F.relu(self.first(x)), weight)))


@pytest.mark.parametrize("by_hand", [True, False])
def test_inputs_of_a_standardized_weight_go_with_its_statistics_kept(by_hand: bool) -> None:
    torch.manual_seed(0)
    program = gp.capture(Standardised(by_hand).eval(), example_inputs=(torch.randn(2, 3, 8, 8),))
    coupling = gp.analyze(program)
    exactness = {group.size: group.exactness for group in coupling.groups}
    assert exactness == {8: "exact", 2: "exact", 3: "approximate"}
    for seed in range(2):
        plan = random_plan(coupling, ratio=None, seed=seed)
        gp.verify(program, plan, gp.apply(program, plan))


def test_a_layer_norm_that_is_written_out_is_as_the_one_that_is_not() -> None:
    class Written(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.to(torch.float64)
            mean = wide.mean(-1, keepdim=True)
            variance = (wide - mean).pow(2).mean(-1, keepdim=True)
            return self.weight * ((wide - mean) * torch.rsqrt(variance + 1e-5)).to(x.dtype)

    class Stream(nn.Module):
        def __init__(self, norm: type[nn.LayerNorm]) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(6, 8), norm(8, bias=False)
            self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.inner(F.silu(self.norm(x))))

    found = []
    for norm in (nn.LayerNorm, Written):
        torch.manual_seed(0)
        program = gp.capture(Stream(norm).eval(), example_inputs=(torch.randn(2, 4, 6),))
        coupling = gp.analyze(program)
        (group,) = coupling.groups
        assert group.exactness == "approximate"
        plan = random_plan(coupling)
        pruned = gp.apply(program, plan)
        gp.verify(program, plan, pruned)
        found.append(pruned(torch.ones(2, 4, 6))["output"])
    torch.testing.assert_close(*found)


# -- what is not --------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "sizes"), [(0.0, [7]), (1.0, [])])
def test_units_are_summed_over_where_they_start_from_zero(start: float, sizes: list[int]) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRU(6, 7), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_ones(1, x.shape[1], 7) if start else x.new_zeros(1, x.shape[1], 7)
            h, _ = self.cell(x, state)
            return self.out(h) + h.sum(-1, keepdim=True)

    torch.manual_seed(0)
    coupling = gp.analyze(gp.capture(Summed(), example_inputs=(torch.randn(4, 2, 6),)))
    assert [group.size for group in coupling.groups] == sizes
    if start:
        assert "do not vanish" in coupling.explain("cell.weight_hh_l0", 1)
    plan = random_plan(coupling)
    gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))


def test_a_shuffle_that_does_not_fill_groups_evenly_is_frozen() -> None:
    torch.manual_seed(0)
    program = gp.capture(ShuffleNet(groups=3).eval(), example_inputs=(torch.randn(IMAGE),))
    coupling = gp.analyze(program)
    assert "4 and 3 have no common factor" in coupling.explain("reduce.0.weight", 0)
    plan = random_plan(coupling)
    gp.verify(program, plan, gp.apply(program, plan))
