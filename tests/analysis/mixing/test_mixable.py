from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import coupling_of
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.mixing.mixable import Mixable, mixable
from graphprune.analysis.mixing.places import Basis, Unmixable
from graphprune.transforms.rotations.layout import Copies

WIDTH = 6


class Bottleneck(nn.Module):
    """Something between two matrices, of which the units in the middle are looked at."""

    def __init__(self, between: Callable[[Bottleneck, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.down, self.up = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.side, self.gain = nn.Linear(5, WIDTH), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return self.up(self.between(self, self.down(x)))


def normalized(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)


FREE: dict[str, Callable[[Bottleneck, Tensor], Tensor]] = {
    "nothing": lambda m, h: h,
    "a sum": lambda m, h: h + m.side(m.x) - 0.5 * h,
    "another shape": lambda m, h: h.view(-1, 2, WIDTH).transpose(0, 1).reshape(2, -1, WIDTH),
    "a factor of each token": lambda m, h: h * m.x.sum(-1, keepdim=True) / 3,
    "a mean over tokens": lambda m, h: h.mean(-2, keepdim=True),
    "tokens side by side": lambda m, h: torch.cat([h, m.side(m.x)], -2),
    "some tokens": lambda m, h: h[..., 1:, :],
    "a mask of tokens": lambda m, h: h.masked_fill(m.x[..., :1] > 0, 0.0),
    "tokens of a mask": lambda m, h: h[m.x[..., 0] > 0],
    "mixed tokens": lambda m, h: torch.softmax(m.x @ m.x.transpose(-1, -2), -1) @ h,
    "a linear attention": lambda m, h: (m.side(m.x) @ h.transpose(-1, -2)) @ h,
}

ORTHOGONAL = {
    "a norm": lambda m, h: normalized(h),
    "a fused norm": lambda m, h: torch.rms_norm(h, (WIDTH,)),
    "their scores": lambda m, h: torch.softmax(h @ h.transpose(-1, -2), -1) @ h,
}

REFUSED: dict[str, tuple[Callable[[Bottleneck, Tensor], Tensor], str]] = {
    "a nonlinearity": (lambda m, h: torch.relu(h), "aten.relu.default is not known to be linear"),
    "a gate": (lambda m, h: h * torch.sigmoid(m.side(m.x)), "aten.sigmoid.default is not known"),
    "a gain of one way": (lambda m, h: h + h * m.gain, "gain multiplies its units on one way to"),
    "a number": (lambda m, h: h + 1.0, "joins it with what lacks it"),
    "a sum of units": (lambda m, h: h - h.sum(-1, keepdim=True), "its units are summed"),
    "a layer norm": (lambda m, h: nn.functional.layer_norm(h, (WIDTH,)), "aten.layer_norm.default"),
    "squares": (lambda m, h: h.pow(2), "squares of its units are used one by one"),
    "squares with a gain": (lambda m, h: h.pow(2) * m.gain, "squares of its units are used one by"),
    "norms of units": (
        lambda m, h: torch.rms_norm(h.transpose(-1, -2), (4,)).transpose(-1, -2),
        "a norm is taken of each of its units",
    ),
    "a filling": (lambda m, h: h.masked_fill(m.x[..., :1] > 0, 1.0), "not known to be linear"),
}


def coupled(between: Callable[[Bottleneck, Tensor], Tensor]) -> tuple[Coupling, Group]:
    torch.manual_seed(0)
    model = Bottleneck(between).double().eval()
    coupling = gp.analyze(gp.capture(model, (torch.randn(2, 4, 5, dtype=torch.float64),)))
    (group,) = (
        g for g in coupling.groups if any(m.weight == "up.weight" for m in g.members if m.dim == 1)
    )
    return coupling, group


def error_of(coupling: Coupling, mixed: Mixable, mixing: Tensor) -> float:
    """How far the output is when all members are mixed as `mixed` says."""
    program = coupling.program
    new = {name: weight.clone() for name, weight in program.weights.items()}
    both = {1: mixing[None], -1: torch.linalg.inv(mixing).mT[None]}
    for member, basis in zip(mixed.group.members, mixed.bases, strict=True):
        assert basis is not None
        by = both[basis.side]
        Copies.of(coupling, mixed.group, member).mix(new[member.weight], member.dim, by)
    x = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (before,), (after,) = (p(x).values() for p in (program, program.with_weights(new)))
    return float((before - after).abs().max() / before.abs().max())


def drawn(orthogonal: bool) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    found = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(found)[0] if orthogonal else found


@pytest.mark.parametrize("name", FREE)
def test_any_mixing_is_free_where_units_pass_linearly(name: str) -> None:
    coupling, group = coupled(FREE[name])
    found = mixable(coupling, group)
    assert not found.orthogonal
    assert error_of(coupling, found, drawn(orthogonal=False)) < 1e-11


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_lengths_are_kept_where_something_looks_at_them(name: str) -> None:
    coupling, group = coupled(ORTHOGONAL[name])
    found = mixable(coupling, group)
    assert found.orthogonal
    assert error_of(coupling, found, drawn(orthogonal=True)) < 1e-11
    assert error_of(coupling, found, drawn(orthogonal=False)) > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_single_units_is_the_reason_to_refuse(name: str) -> None:
    between, why = REFUSED[name]
    coupling, group = coupled(between)
    with pytest.raises(Unmixable, match=why):
        mixable(coupling, group)
    bases = tuple(Basis(-1 if m.weight == "up.weight" else 1) for m in group.members)
    by_hand = Mixable(group, bases, {}, False)
    assert error_of(coupling, by_hand, drawn(orthogonal=True)) > 1e-3  # and rightly so


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2", "bert", "phi3", "mixtral", "t5"])
def test_values_and_outputs_are_on_two_sides_in_every_attention(name: str) -> None:
    coupling = coupling_of(name)
    values = [g for g in coupling.groups if g.role == "head-dim"]
    for group in values:
        found = mixable(coupling, group)
        assert not found.orthogonal
        assert {basis.side for basis in found.bases if basis} == {1, -1}


@pytest.mark.parametrize(
    ("role", "why"),
    [
        ("ffn", "aten.silu.default is not known to be linear along it"),
        ("kv-head", "attention computes with each of its units"),
        ("rope-pair", "which holds it, is no parameter"),
    ],
)
def test_other_groups_of_a_decoder_have_their_reasons(role: str, why: str) -> None:
    coupling = coupling_of("llama-gqa")
    group = next(g for g in coupling.groups if g.role == role)
    with pytest.raises(Unmixable, match=why):
        mixable(coupling, group)
