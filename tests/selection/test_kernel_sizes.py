"""Sizes that kernels like, and where a program or a plan leaves their fast path."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import pytest
import torch
from architectures import coupling_of
from byte_llama import byte_llama
from torch import nn

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.backends.onnx.attention.forms import Target
from graphprune.ir.devices import RUNTIMES, Runtime
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.report.overview import hint_lines
from graphprune.selection.kernel_sizes import (
    preferred_sizes,
    query_group_hints,
    speed_hints,
)


@cache
def coupling() -> Coupling:
    """A decoder at the fast path of everything: 4 query heads of 64 on each of 2 KV heads."""
    sizes = {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    return gp.analyze(gp.capture(byte_llama(**sizes, **heads)))


def lines(runtime: Runtime | None = None, name: str = "", **removed: int) -> list[str]:
    """Hints on the decoder, or on an architecture, once groups of its layers have lost units."""
    found = coupling_of(name) if name else coupling()
    lost = {
        group.name: removed[group.role.replace("-", "_")]
        for group in found.groups
        if group.role.replace("-", "_") in removed
    }
    return hint_lines(speed_hints(found, runtime, lost))


def preferred(role: Any, size: int, runtime: Runtime) -> list[int] | None:
    group = Group("it", size, role, "exact", "", ())
    found = preferred_sizes([group], runtime).get("it")
    return None if found is None else list(found)


def test_runtimes_are_the_targets_of_the_back_end_and_of_the_passes() -> None:
    assert set(get_args(Runtime)) == set(get_args(Target)) == {*RUNTIMES, "portable"}
    for made in (Prune, MergeKvHeads):
        assert set(made.option("runtime").choices) == set(get_args(Runtime))
        assert made.option("runtime").default is None


# -- what to round to -----------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["ffn", "expert-unit", "residual", "channel"])
@pytest.mark.parametrize(
    ("runtime", "size", "expected"),
    [
        ("cuda", 320, [64, 128, 192, 256, 320]),
        ("tensorrt", 300, [64, 128, 192, 256]),
        ("portable", 256, [64, 128, 192, 256]),
        ("cpu", 80, [16, 32, 48, 64, 80]),
        ("cpu", 160, [32, 64, 96, 128, 160]),  # blocks of quantized weights divide them
        ("cuda", 255, list(range(32, 256, 32))),  # too small for four multiples of 64
        ("cuda", 48, [8, 16, 24, 32, 40, 48]),
        ("cuda", 16, [8, 16]),
        ("cuda", 15, None),
        ("cpu", 15, None),
    ],
)
def test_widths_are_multiples_of_what_a_group_is_large_enough_for(
    role: str, runtime: Runtime, size: int, expected: list[int] | None
) -> None:
    assert preferred(role, size, runtime) == expected


@pytest.mark.parametrize("runtime", [*RUNTIMES, "portable"])
def test_head_sizes_are_multiples_of_sixteen_and_of_eight_where_heads_are_small(
    runtime: Runtime,
) -> None:
    assert preferred("head-dim", 64, runtime) == [16, 32, 48, 64]
    assert preferred("rope-pair", 32, runtime) == [8, 16, 24, 32]  # pairs: head sizes 16 to 64
    assert preferred("head-dim", 32, runtime) == [8, 16, 24, 32]
    assert preferred("rope-pair", 8, runtime) == [4, 8]


def test_query_groups_stay_on_the_fastest_kernel_where_the_runtime_has_one() -> None:
    for runtime in ("cuda", "portable"):
        assert preferred("query-slot", 8, runtime) == [1, 2, 4, 8]  # type: ignore[arg-type]
        assert preferred("query-slot", 7, runtime) == [1, 2, 4]  # type: ignore[arg-type]
        assert preferred("query-slot", 71, runtime) == [1, 2, 4, 8, 16, 32]  # type: ignore[arg-type]
    assert preferred("query-slot", 8, "cpu") is None


@pytest.mark.parametrize("role", ["kv-head", "expert", "other"])
def test_numbers_of_heads_and_experts_are_free(role: str) -> None:
    assert preferred(role, 256, "portable") is None


# -- what is off the fast path --------------------------------------------------------------------


def test_a_program_on_the_fast_path_has_no_hints() -> None:
    assert lines() == []


MLP, ATTENTION = "model.layers.{0-2}.mlp", "model.layers.{0-2}.self_attn"
FASTEST = "the fastest attention kernel, which takes"


@pytest.mark.parametrize(
    ("removed", "line"),
    [
        ({"ffn": 16}, f"{MLP}: FFN width 304 is no multiple of 64 (cuda, tensorrt)"),
        (
            {"ffn": 1},
            f"{MLP}: FFN width 319 is no multiple of 16 (cpu) and "
            "is no multiple of 64 (cuda, tensorrt)",
        ),
        ({"residual": 16}, "residual: hidden size 48 is no multiple of 64 (cuda, tensorrt)"),
        (
            {"query_slot": 1},
            f"{ATTENTION}: 3 query heads on a KV head leave {FASTEST} 1, 2, 4, 8, 16 or 32 (cuda)",
        ),
        (
            {"rope_pair": 8, "head_dim": 16},
            f"{ATTENTION}: head size 48 leaves {FASTEST} 64, 128 or 256 (cuda)",
        ),
        (
            {"rope_pair": 4, "head_dim": 8},
            f"{ATTENTION}: head size 56 is no multiple of 16, so rotation stays outside of "
            "GroupQueryAttention (cpu, cuda)",
        ),
        (
            {"head_dim": 8},
            f"{ATTENTION}: head size 64 of keys and 56 of values is not one size, which "
            "GroupQueryAttention takes (cpu, cuda)",
        ),
        (
            {"rope_pair": 1, "head_dim": 2},
            f"{ATTENTION}: head size 62 is no multiple of 8, which GroupQueryAttention takes "
            "(cpu, cuda) and is no multiple of 8 (tensorrt)",
        ),
    ],
)
def test_what_a_plan_leaves_is_named_once_for_all_layers(
    removed: dict[str, int], line: str
) -> None:
    assert lines(**removed) == [line]
    assert lines("portable", **removed) == [line]


@pytest.mark.parametrize(
    "removed", [{"ffn": 64}, {"query_slot": 2}, {"query_slot": 3}, {"kv_head": 1}]
)
def test_what_stays_on_the_fast_path_has_no_hints(removed: dict[str, int]) -> None:
    assert lines(**removed) == []


def test_a_runtime_has_the_hints_of_its_own() -> None:
    assert lines("cpu", ffn=16, query_slot=1) == []
    assert lines("cpu", ffn=1) == [f"{MLP}: FFN width 319 is no multiple of 16 (cpu)"]
    assert lines("tensorrt", query_slot=1, head_dim=8) == []
    assert len(lines("cuda", ffn=16, query_slot=1)) == 2


def test_different_sizes_of_layers_are_one_line_that_names_three() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = [nn.Sequential(nn.Linear(64, n), nn.Linear(n, 64)) for n in range(65, 70)]
            self.layers = nn.ModuleList(pairs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for up, down in self.layers:
                x = x + down(torch.relu(up(x)))
            return x

    found = gp.analyze(gp.capture(Stack(), (torch.ones(2, 64),)))
    assert hint_lines(speed_hints(found, "cuda")) == [
        "layers.{0-4}: FFN width 65, 66, 67 or 2 more is no multiple of 64 (cuda)"
    ]


def test_a_partial_rotation_is_measured_by_what_it_turns() -> None:
    # Heads of 8, of which 4 are rotated: once they are 16, only the rotated part is at fault.
    found = coupling_of("gpt-neox")
    rest = {g.name: -8 for g in found.groups if g.name.endswith("query_key_value:head-dim")}
    values = {g.name: -8 for g in found.groups if g.name.endswith("attention:head-dim")}
    (line,) = (x for x in hint_lines(speed_hints(found, "cpu", rest | values)) if "head" in x)
    assert "head size 16 has 4 rotated, no multiple of 16" in line


def test_what_keeps_no_cache_needs_no_kernel_for_decoding() -> None:
    # Heads of 8 in an encoder; the same in a decoder are too small for the fastest kernel.
    assert not any("head size" in line for line in lines("cuda", "bert"))
    assert any("head size 8 leaves the fastest" in line for line in lines("cuda", "gpt2"))
    assert any("head size 6 is no multiple of 8 (" in x for x in lines("cuda", "bert", head_dim=2))
    program = coupling_of("bert").program
    assert query_group_hints(program, [("bert", 3)], "cuda") == []


def test_experts_and_channels_are_named_as_what_they_are() -> None:
    assert any("expert width 24 is no multiple of 64" in line for line in lines("cuda", "mixtral"))
    assert any("number of channels 4 or 8 is no" in line for line in lines("cuda", "resnet"))
