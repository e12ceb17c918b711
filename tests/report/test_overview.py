"""Repeated layers are one row, and what they stand for can be read off it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from architectures import coupling_of, program_of
from byte_llama import byte_llama
from rich.console import Console
from torch import Tensor, nn

import graphprune as gp
from graphprune.report.overview import collapse_names, overview, overview_json


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], "a.{0-2}.b"),
        (["a.0.b", "a.2.b", "a.3.b"], "a.{0,2-3}.b"),
        (["a.0.1", "a.1.1"], "a.{0-1}.1"),
        (["a.7.b"], "a.7.b"),
        (["fc1", "fc1"], "fc1"),
        (["11", "2"], "{2,11}"),
    ],
)
def test_standing_numbers_become_ranges(names: list[str], folded: str) -> None:
    assert collapse_names(names) == folded


def test_the_overview_of_a_llama() -> None:
    program = gp.capture(byte_llama())
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(overview("tiny", program, gp.analyze(program)))
    text = captured.get()
    rows = {" ".join(line.replace("│", " ").split()) for line in text.splitlines()}
    assert "tiny: LlamaForCausalLM" in rows
    assert "33,952 parameters in 23 weights, 512 bytes of KV cache per token" in rows
    assert "2 model.layers.{0-1}.mlp:ffn 48 3 96 exact" in rows
    assert "2 model.layers.{0-1}.self_attn:kv-head 4 4 1,024 exact" in rows
    assert "model.layers.{0-1}.mlp.down_proj.weight 32 x 48 [hidden, ffn]" in rows
    assert "residual is rescaled: mean over it" in text
    hint = "model.layers.{0-1}.mlp: FFN width 48 is no multiple of 64 (cuda, tensorrt)"
    assert [line for line in rows if "FFN width" in line] == [hint]
    assert "speed hints" in rows


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral", "bert", "resnet"])
def test_the_overview_is_the_golden_text(name: str, golden: Callable[[str, str], None]) -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(overview(name, program_of(name), coupling_of(name)))
    lines = (line.rstrip() for line in captured.get().splitlines())
    golden(f"overview-{name}", "\n".join(lines))


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral", "bert", "resnet"])
def test_what_explain_says_is_the_golden_text(
    name: str, golden: Callable[[str, str], None]
) -> None:
    coupling = coupling_of(name)
    chosen = {
        member.weight: member.dim for group in coupling.groups for member in group.members[:1]
    }
    golden(
        f"explain-{name}",
        "\n\n".join(coupling.explain(weight, dim) for weight, dim in chosen.items()),
    )


def test_a_model_of_no_family_has_an_overview_too() -> None:
    import torch
    from torch import nn

    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    program = gp.capture(module, (torch.ones(2, 4),))
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(overview("net", program, gp.analyze(program)))
    assert "net: program" in captured.get()
    assert "KV cache" not in captured.get()


def test_speed_hints_are_data_too_and_a_program_may_have_none() -> None:
    def analyzed(width: int) -> gp.Coupling:
        layers = nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)
        return gp.analyze(gp.capture(nn.Sequential(*layers), (torch.ones(2, 4),)))

    odd, even = analyzed(24), analyzed(64)
    assert json.loads(overview_json(odd)) == {
        **json.loads(odd.to_json()),
        "speed_hints": [
            {
                "where": "0",
                "what": "FFN width 24",
                "reasons": {
                    "is no multiple of 16": ["cpu"],
                    "is no multiple of 64": ["cuda", "tensorrt"],
                },
            }
        ],
    }
    assert json.loads(overview_json(even))["speed_hints"] == []
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(overview("net", even.program, even))
    assert "every size is on the fast path (cpu, cuda, tensorrt)" in captured.get()


class Exponential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.linalg.matrix_exp(self.a(x)))


def test_operators_without_a_rule_are_shown_with_what_they_cost() -> None:
    program = gp.capture(Exponential(), (torch.randn(3, 4, 6),))
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(overview("net", program, gp.analyze(program)))
    cost = 4 * 6 + 4 + 5 * 4  # all but the last bias lies along what it freezes
    found = f"aten.linalg_matrix_exp.default has no rule: it freezes axes of {cost} parameters"
    assert found in captured.get()
