"""Plain modules of the kinds that people bring: what is found, and that removing it is exact."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import random_plan, relative_error
from plain_modules import IMAGE, MODULES, Head, ShuffleNet
from tiny_models import perturb
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group


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


def test_the_width_of_a_table_is_no_unit_of_experts() -> None:
    model = nn.Sequential(nn.Embedding(17, 12), nn.Linear(12, 3))
    (group,) = gp.analyze(gp.capture(model.eval(), (torch.zeros(2, 5).long(),))).groups
    assert (group.role, group.size) == ("ffn", 12)


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
