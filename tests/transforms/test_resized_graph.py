"""Golden texts of small graphs before and after pruning: what the rewriter writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers as tf
from architectures import printed, random_plan
from tiny_models import perturb
from torch import nn

import graphprune as gp
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan


def llama() -> Program:
    config = tf.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=8,
    )
    return gp.capture(perturb(tf.LlamaForCausalLM(config)))


def convolutions() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.wide = nn.Conv2d(8, 12, 1, groups=4)
            self.norm = nn.GroupNorm(4, 12)
            self.head = nn.Linear(24, 5)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.stem(image)
            x = x + self.deep(x)
            x = self.norm(self.wide(x)).relu()
            pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
            return self.head(pooled)

    return gp.capture(perturb(Net()), example_inputs=(torch.zeros(2, 3, 6, 6),))


@cache
def program_of(name: str) -> Program:
    torch.manual_seed(0)
    return {"llama": llama, "convolutions": convolutions}[name]()


def plan_of(program: Program) -> Plan:
    return random_plan(gp.analyze(program), ratio=0.5)


@pytest.mark.parametrize("name", ["llama", "convolutions"])
def test_a_graph_before_and_after(name: str, golden: Callable[[str, str], None]) -> None:
    program = program_of(name)
    plan = plan_of(program)
    pruned = gp.apply(program, plan)
    gp.verify(program, plan, pruned)
    golden(f"graph-{name}", printed(program))
    golden(f"graph-{name}-pruned", printed(pruned))


@pytest.mark.parametrize("name", ["llama", "convolutions"])
def test_only_sizes_and_means_differ(name: str) -> None:
    program = program_of(name)
    pruned = gp.apply(program, plan_of(program))
    before = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    after = [str(node.target) for node in pruned.graph.nodes if node.op == "call_function"]
    means = sum(target.startswith("aten.mean") for target in before) if name == "llama" else 0
    assert len(after) == len(before) + means
    assert sorted(after) == sorted([*before, *["aten.mul.Tensor"] * means])


def test_an_empty_plan_changes_nothing() -> None:
    program = program_of("llama")
    assert printed(gp.apply(program, Plan())) == printed(program)


def test_the_same_plan_writes_the_same_text() -> None:
    program = program_of("llama")
    plan = plan_of(program)
    again = Plan.from_json(plan.to_json())
    assert printed(gp.apply(program, plan)) == printed(gp.apply(program, again))
