"""Projections in which queries, keys and values are interleaved: permuted, then merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import build, inputs_of, program_of, random_plan, relative_error
from tiny_models import perturb
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Merge, Permutation, Step
from graphprune.transforms.heads.deinterleave import deinterleave
from graphprune.transforms.heads.kv_heads import find_heads
from graphprune.transforms.heads.merge import merge_of

HEADS, WIDTH, HIDDEN = 4, 6, 20

Parts = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each ``[batch, head, length, width]``."""


def by_split(fused: Tensor) -> Parts:
    """As GPT-NeoX: ``(head [query + key + value])``."""
    heads = fused.unflatten(-1, (HEADS, 3 * WIDTH)).transpose(1, 2)
    query, key, value = heads.split(WIDTH, -1)
    return query, key, value


def by_select(fused: Tensor) -> Parts:
    """As BLOOM: ``(head three width)``."""
    heads = fused.view(*fused.shape[:2], HEADS, 3, WIDTH)
    query, key, value = (heads[..., part, :].transpose(1, 2) for part in range(3))
    return query, key, value


def by_unbind(fused: Tensor) -> Parts:
    """As ModernBERT: ``(three head width)``."""
    heads = fused.view(*fused.shape[:2], 3, HEADS, WIDTH)
    query, key, value = heads.transpose(1, 3).unbind(2)
    return query, key, value


def by_blocks(fused: Tensor) -> Parts:
    """As CodeGen: ``(block [(head query) + (head value) + (head key)])``."""
    blocks = fused.reshape(*fused.shape[:2], 2, -1)
    query, value, key = blocks.split(HEADS // 2 * WIDTH, -1)
    parts = (part.reshape(*part.shape[:2], HEADS, WIDTH) for part in (query, key, value))
    query, key, value = (part.permute(0, 2, 1, 3) for part in parts)
    return query, key, value


def by_slice(fused: Tensor) -> Parts:
    """Batch and length exchanged, and keys with their width before their heads."""
    heads = fused.transpose(0, 1).unflatten(-1, (HEADS, 3 * WIDTH)).permute(1, 3, 2, 0)
    query, key, value = (heads[:, at : at + WIDTH] for at in range(0, 3 * WIDTH, WIDTH))
    return query.permute(0, 2, 3, 1), key.permute(0, 2, 3, 1), value.permute(0, 2, 3, 1)


TAKING: dict[str, Callable[[Tensor], Parts]] = {
    "split": by_split,
    "select": by_select,
    "unbind": by_unbind,
    "blocks": by_blocks,
    "slice": by_slice,
}


class Attention(nn.Module):
    """One attention over a fused projection."""

    def __init__(self, take: Callable[[Tensor], Parts], bias: bool = True) -> None:
        super().__init__()
        self.take = take
        self.fused = nn.Linear(HIDDEN, 3 * HEADS * WIDTH, bias=bias)
        self.out = nn.Linear(HEADS * WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.take(self.fused(x))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Averaged(Attention):
    """The same with neighboring heads of keys and values made equal."""

    groups = HEADS

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.take(self.fused(x))
        each = HEADS // self.groups
        means = [
            part.unflatten(1, (self.groups, each)).mean(2).repeat_interleave(each, 1)
            for part in (key, value)
        ]
        mixed = F.scaled_dot_product_attention(query, *means, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def attention(name: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return perturb(Attention(TAKING[name], bias))


def sample(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, HIDDEN, generator=torch.Generator().manual_seed(batch))


def captured(model: nn.Module) -> Program:
    return gp.capture(model.eval(), example_inputs=(sample(),))


def merging(program: Program, groups: int) -> Plan:
    merges = tuple(merge_of(heads, groups) for heads in find_heads(program))
    return Plan((Step(program.fingerprint(), (), merges),))


# -- equal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TAKING)
def test_laying_out_changes_no_value(name: str, bias: bool) -> None:
    model = attention(name, bias)
    program = captured(model)
    other, orders = deinterleave(program, {"fused.weight"})
    assert {order.weight for order in orders["fused.weight"]} == {
        "fused.weight",
        *(["fused.bias"] if bias else []),
    }
    for order in orders["fused.weight"]:
        rows = torch.tensor(order.sources)
        assert torch.equal(other.weights[order.weight], program.weights[order.weight][rows])
    x = sample(3)
    with torch.no_grad():
        assert relative_error(model(x), next(iter(other(x).values()))) <= 1e-6


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("name", TAKING)
def test_merging_an_interleaved_projection_equals_averaging_its_heads(
    name: str, groups: int
) -> None:
    model = attention(name)
    program = captured(model)
    plan = merging(program, groups)
    narrow = gp.apply(program, plan)
    assert len(narrow.weights["fused.weight"]) == (HEADS + 2 * groups) * WIDTH
    wide = Averaged(TAKING[name])
    wide.load_state_dict(model.state_dict())
    wide.groups = groups
    x = sample(3)
    with torch.no_grad():
        assert relative_error(wide(x), next(iter(narrow(x).values()))) <= 1e-5
        assert relative_error(model(x), next(iter(narrow(x).values()))) > 1e-2
    report = gp.verify(program, plan, narrow)
    assert max(report.max_relative_error, report.max_weight_error) <= 1e-5


def test_the_rows_are_laid_out_part_by_part() -> None:
    _, orders = deinterleave(captured(attention("split")), {"fused.weight"})
    heads = torch.arange(3 * HEADS * WIDTH).view(HEADS, 3, WIDTH)
    assert orders["fused.weight"][0].sources == tuple(heads.transpose(0, 1).flatten().tolist())
    _, orders = deinterleave(captured(attention("unbind")), {"fused.weight"})
    assert orders["fused.weight"][0].sources == tuple(range(3 * HEADS * WIDTH))


@pytest.mark.parametrize("groups", [2, 1])
def test_a_decoder_of_transformers_is_merged_and_keeps_a_narrow_cache(groups: int) -> None:
    program = program_of("gpt-neox")
    plan = merging(program, groups)
    narrow = gp.apply(program, plan)
    assert narrow.kv_bytes_per_token() * HEADS == program.kv_bytes_per_token() * groups
    assert gp.verify(program, plan, narrow).max_relative_error <= 1e-4
    model = copy.deepcopy(build("gpt-neox"))
    for name, parameter in model.named_parameters():
        if "query_key_value" in name:
            heads = parameter.data.unflatten(0, (groups, HEADS // groups, 3, -1))
            heads[:, :, 1:] = heads[:, :, 1:].mean(1, keepdim=True)
    inputs = inputs_of(program)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert relative_error(expected, narrow(**inputs)["logits"]) <= 1e-4


# -- together with other steps --------------------------------------------------------------------


def test_pruning_merging_and_pruning_again_is_one_plan() -> None:
    program = captured(attention("split"))
    first = random_plan(gp.analyze(program))
    assert first.steps[0].cuts
    middle = gp.apply(program, first)
    second = merging(middle, 1)
    narrow = gp.apply(middle, second)
    third = random_plan(gp.analyze(narrow))
    assert third.steps[0].cuts
    last = gp.apply(narrow, third)
    plan = Plan.from_json((first + second + third).to_json())
    assert gp.verify(program, plan, last).max_relative_error <= 1e-4
    again = gp.apply(program, plan)
    assert all(torch.equal(weight, again.weights[n]) for n, weight in last.weights.items())


def test_what_is_removed_after_a_merge_is_told_in_the_first_program_s_rows() -> None:
    program = captured(attention("split"))
    plan = merging(program, 1)
    narrow = gp.apply(program, plan)
    coupling = gp.analyze(narrow)
    slots = next(group for group in coupling.groups if group.role == "query-slot")
    cut = slots.cut({(): (1,)})
    whole = plan + Plan((Step(narrow.fingerprint(), (cut,)),))
    query = range(3 * WIDTH, 3 * WIDTH + WIDTH)  # of head 1, which lies behind head 0's three parts
    assert whole.removed["fused.weight"] == {0: list(query)}


# -- refused --------------------------------------------------------------------------------------


class Reading(Attention):
    """Something else is made of the fused result than its parts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fused(x).sum(-1, keepdim=True)


class Overlapping(Attention):
    def forward(self, x: Tensor) -> Tensor:
        heads = self.fused(x).unflatten(-1, (HEADS, 3 * WIDTH)).transpose(1, 2)
        query, key, value = heads[..., :WIDTH], heads[..., 1 : WIDTH + 1], heads[..., -WIDTH:]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [Reading, Overlapping])
def test_a_projection_that_is_not_taken_apart_stays_as_it_is(kind: type[Attention]) -> None:
    program = captured(kind(by_split))
    other, orders = deinterleave(program, {"fused.weight"})
    assert other is program
    assert orders == {}


def test_projections_of_one_weight_are_taken_apart_alike_or_not_at_all() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            self.take = self.second
            return super().forward(x)

    model = Twice(by_split)
    model.second = by_split
    assert set(deinterleave(captured(model), {"fused.weight"})[1]) == {"fused.weight"}
    model = Twice(by_split)
    model.second = by_unbind
    assert deinterleave(captured(model), {"fused.weight"})[1] == {}


def test_another_order_than_the_plan_s_is_refused() -> None:
    program = captured(attention("split"))
    (step,) = merging(program, 2).steps
    (merge,) = step.merges
    turned = tuple(Permutation(p.weight, p.dim, p.sources[::-1]) for p in merge.deinterleaving)
    wrong = Merge(merge.group, merge.size, merge.groups, merge.members, turned)
    with pytest.raises(PlanError, match="the plan's KV heads and the program's differ"):
        gp.apply(program, Plan((Step(step.fingerprint, (), (wrong,)),)))


@pytest.mark.parametrize(
    ("places", "why"),
    [((0, 0, 1), "does not name every index once"), ((0, 1, 2), "is 72, not 3")],
)
def test_an_order_that_is_none_is_refused(places: tuple[int, ...], why: str) -> None:
    program = captured(attention("split"))
    order = Permutation("fused.weight", 0, places)
    plan = Plan((Step(program.fingerprint(), (), (Merge("kv", 4, 2, (), (order,)),)),))
    with pytest.raises(PlanError, match=why):
        Plan.from_json(plan.to_json()).check(program)


# -- written --------------------------------------------------------------------------------------


def test_a_merged_decoder_runs_in_onnx_runtime(tmp_path: Path) -> None:
    """BLOOM, whose mask is as long as cache and tokens together."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=4)
    program = gp.capture(perturb(BloomForCausalLM(config)))
    narrow = gp.apply(program, merging(program, 2))
    report = narrow.export_onnx(tmp_path / "model.onnx")
    assert report.max_relative_error is not None
    assert report.max_relative_error <= 1e-4
