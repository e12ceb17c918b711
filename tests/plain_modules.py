"""A zoo of small plain modules of the kinds that people bring, with the shape of an input for each.

Its counterpart for the types of transformers is `tools/tiny_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
