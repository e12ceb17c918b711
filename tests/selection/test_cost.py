"""Costs in closed form are those of the programs that the rewriter leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build, coupling_of, program_of, random_plan
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import graphprune as gp
from graphprune.ir.sample_inputs import random_inputs
from graphprune.selection.cost import Costs, Kernel

TOKENS = 24


def counted(program: gp.Program) -> float:
    """Multiply-accumulates that torch itself counts in one run."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        program(**random_inputs(program, batch=1, length=TOKENS))
    return counter.get_total_flops() / 2


def lost(plan: gp.Plan) -> dict[str, int]:
    return {cut.group: cut.count for step in plan.steps for cut in step.cuts}


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert", "vit", "resnet", "t5", "opt"])
@pytest.mark.parametrize("seed", range(2))
def test_costs_after_cuts_are_those_of_the_rewritten_program(name: str, seed: int) -> None:
    coupling = coupling_of(name)
    costs, plan = Costs(coupling, tokens=TOKENS), random_plan(coupling, seed=seed)
    pruned, counts = gp.apply(program_of(name), plan), lost(plan)
    assert costs.after("macs", {}) == counted(program_of(name))
    assert costs.after("macs", counts) == counted(pruned)
    assert costs.after("params", counts) == pruned.parameter_count()
    assert costs.after("kv_bytes", counts) == pruned.kv_bytes_per_token()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "vit", "resnet", "t5"])
def test_kernels_have_the_sizes_that_the_costs_count(name: str) -> None:
    coupling = coupling_of(name)
    costs = Costs(coupling, tokens=TOKENS)
    for counts in ({}, lost(random_plan(coupling, seed=0))):
        total = 0
        for kernel, times in costs.kernels(counts).items():
            first, second, third, *rest = kernel.sizes
            macs = first * second * third * (rest[0] if kernel.kind == "product" else sum(rest))
            total += times * macs
        assert total == costs.after("macs", counts)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral", "gemma3"])
def test_a_decoder_captured_without_weights_costs_the_same(name: str) -> None:
    with torch.device("meta"):
        coupling = gp.analyze(gp.capture(build(name)))
    for cost in ("params", "macs", "kv_bytes"):
        real = Costs(coupling_of(name), tokens=TOKENS).after(cost, {})
        assert Costs(coupling, tokens=TOKENS).after(cost, {}) == real


class Mixed(nn.Module):
    """What the architectures above have not: transposed and grouped convolutions, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.mix = nn.Parameter(torch.randn(6, 5, 7))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.grouped(self.first(image)).relu()).relu()
        return torch.einsum("bchw,cdw->bdh", hidden[..., :7], self.mix)


def test_convolutions_and_einsum_cost_what_torch_counts() -> None:
    program = gp.capture(Mixed(), (torch.zeros(2, 3, 12, 12),))
    assert Costs(gp.analyze(program)).after("macs", {}) == counted(program)


def test_a_recurrent_layer_costs_its_matrices_for_every_step() -> None:
    program = gp.capture(Recurrent(), (torch.zeros(2, 5, 4),))
    assert (
        Costs(gp.analyze(program), tokens=5).after("macs", {})
        == 5 * (4 * 6 * 4 + 4 * 6 * 6) + 5 * 6 * 3
    )


class Attending(nn.Module):
    """Attention of one tensor to itself, or with its keys as values too, under a mask."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone
        self.queries, self.keys = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, keys = (
            each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.queries, self.keys)
        )
        if self.alone:
            return functional.scaled_dot_product_attention(keys, keys, keys)
        mask = x.sum(-1)[:, None, None].expand(-1, -1, x.shape[1], -1)
        return functional.scaled_dot_product_attention(queries, keys, keys, mask)


@pytest.mark.parametrize("alone", [True, False])
def test_attention_counts_what_is_given_twice(alone: bool) -> None:
    costs = Costs(gp.analyze(gp.capture(Attending(alone), (torch.zeros(2, 5, 6),))), tokens=5)
    projections = (1 if alone else 2) * 5 * 6 * 8
    assert costs.after("macs", {}) == projections + 2 * 5 * 5 * (4 + 4)
    assert Kernel("attention", (2, 5, 5, 4, 4)) in costs.kernels({})


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(steps)[0])
