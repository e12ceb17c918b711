from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.backends.huggingface.shorter_lists import numbered, renumbered, shortened
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.named = nn.ModuleDict({f"expert_{i}": nn.Linear(4, 4) for i in range(12)})

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.experts, *self.named.values()):
            x = module(x)
        return x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def captured() -> Program:
    return gp.capture(Stack(), (torch.randn(2, 4),))


def without(program: Program, *modules: str) -> Program:
    """`program` as it is told of when `modules` have gone: their weights are in it no more."""
    kept = {n: w for n, w in program.weights.items() if not n.startswith(modules)}
    return dataclasses.replace(program, weights=kept, kinds={n: program.kinds[n] for n in kept})


def named(program: Program, parent: str) -> list[str]:
    names: Any = (n for n in program.weights if n.startswith(parent) and n.endswith("weight"))
    return [name.removeprefix(parent).removesuffix(".weight") for name in names]


def test_what_is_left_of_a_list_takes_the_first_numbers() -> None:
    program = captured()
    gone = "layers.0.experts.0.", "layers.1.experts.1.", "layers.1.named.expert_3."
    found = renumbered(without(program, *gone), program.weights)
    assert named(found, "layers.0.experts.") == ["0", "1"]
    assert named(found, "layers.1.experts.") == ["0", "1"]
    assert named(found, "layers.1.named.") == [f"expert_{i}" for i in range(11)]
    assert named(found, "layers.0.named.") == [f"expert_{i}" for i in range(12)]
    assert found.weights["layers.0.experts.0.bias"] is program.weights["layers.0.experts.1.bias"]
    assert set(found.kinds) == set(found.weights)


def test_nodes_say_that_they_are_from_the_modules_of_the_new_names() -> None:
    program = captured()
    found = renumbered(without(program, "layers.0.experts.0."), program.weights)
    before, after = (
        [module_path(node) for node in each.graph.nodes if node.op == "call_function"]
        for each in (program, found)
    )
    assert before[:3] == [f"layers.0.experts.{i}" for i in range(3)]
    assert after[1:3] == ["layers.0.experts.0", "layers.0.experts.1"]
    assert after[3:] == before[3:]


def test_a_program_that_has_all_modules_stays_as_it_is() -> None:
    program = captured()
    assert renumbered(program, program.weights) is program


def test_parts_of_a_layer_are_no_list_whatever_their_names() -> None:
    parts = ["0.attention.weight", "1.mlp.weight", "2.experts.0.w", "2.experts.1.w"]
    layers = [f"layers.{at}.{part}" for at in (0, 1) for part in ("ln_1.w", "ln_2.w", *parts)]
    experts = {f"layers.{at}.2.experts": ["0", "1"] for at in (0, 1)}
    assert numbered(layers) == {"layers": ["0", "1"], **experts}
    left = [name for name in layers if "attention" not in name and "ln_1" not in name]
    assert shortened(layers, left) == {}
    assert shortened(layers, [n for n in layers if "1.2.experts.0" not in n]) == {
        "layers.1.2.experts": [1]
    }
