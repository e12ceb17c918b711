"""Merging KV heads against models of transformers in which they were averaged by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from architectures import (
    build,
    cache_after,
    coupling_of,
    inputs_of,
    model_of,
    program_of,
    random_plan,
    relative_error,
)
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import MergeError, PlanError
from graphprune.ir.program import PAST, Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Permutation, Step
from graphprune.transforms.heads.kv_heads import find_heads
from graphprune.transforms.heads.merge import merge_of

WIDTH = 8
"""Of every head of every model here."""


class Layout(NamedTuple):
    """Where key and value heads lie: parameters, the place of the first head, how many there are.

    Heads lie one after the other along the first dimension; in a Conv1D along the last.
    """

    names: str
    starts: tuple[int, ...]
    heads: int
    dim: int = 0


LAYOUTS = {
    "llama-mha": Layout(r"\.[kv]_proj\.weight", (0,), 4),
    "llama-gqa": Layout(r"\.[kv]_proj\.weight", (0,), 2),
    "llama-eager": Layout(r"\.[kv]_proj\.weight", (0,), 4),
    "llama-six": Layout(r"\.[kv]_proj\.(weight|bias)", (0,), 6),
    "llama-wide": Layout(r"\.[kv]_proj\.weight", (0,), 4),
    "qwen3": Layout(r"\.[kv]_proj\.weight", (0,), 2),
    "gemma3": Layout(r"\.[kv]_proj\.weight", (0,), 2),
    "mixtral": Layout(r"\.[kv]_proj\.weight", (0,), 2),
    "phi3": Layout(r"\.qkv_proj\.weight", (32, 48), 2),
    "gpt2": Layout(r"\.c_attn\.(weight|bias)", (32, 64), 4, dim=-1),
    "gpt2-eager": Layout(r"\.c_attn\.(weight|bias)", (32, 64), 4, dim=-1),
    "opt": Layout(r"\.[kv]_proj\.(weight|bias)", (0,), 4),
    "bert": Layout(r"\.(key|value)\.(weight|bias)", (0,), 4),
    "vit": Layout(r"attention\.[kv]_proj\.(weight|bias)", (0,), 4),
    "t5": Layout(r"Attention\.[kv]\.weight", (0,), 4),
}


@cache
def merged(name: str, groups: int) -> tuple[Plan, Program]:
    program = program_of(name)
    plan = merging(program, groups)
    return plan, gp.apply(program, plan)


def merging(program: Program, groups: int, only: str = "") -> Plan:
    heads = [heads for heads in find_heads(program) if only in heads.name]
    return Plan((Step(program.fingerprint(), (), tuple(merge_of(h, groups) for h in heads)),))


def held(model: nn.Module, layout: Layout) -> list[Tensor]:
    """The parameters of `layout`, heads along the first dimension; views."""
    found = [p for name, p in model.named_parameters() if re.search(layout.names, name)]
    assert found
    return [parameter.data.movedim(layout.dim, 0) for parameter in found]


def averaged(model: nn.Module, layout: Layout, groups: int) -> nn.Module:
    """`model`, still wide, whose neighboring KV heads all are their mean."""
    for rows in held(model, layout):
        for start in layout.starts:
            block = rows[start : start + layout.heads * WIDTH]
            heads = block.reshape(groups, layout.heads // groups, WIDTH, *rows.shape[1:])
            block.copy_(heads.mean(1, keepdim=True).expand_as(heads).reshape(block.shape))
    return model


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


CASES = [
    (name, groups)
    for name, layout in LAYOUTS.items()
    for groups in range(1, layout.heads)
    if layout.heads % groups == 0
]


# -- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "groups"), CASES)
def test_merging_equals_averaging_the_heads_of_the_wide_model(name: str, groups: int) -> None:
    program = program_of(name)
    plan, narrow = merged(name, groups)
    wide = averaged(build(name), LAYOUTS[name], groups)
    for batch, length in [(1, 1), (3, 9)]:
        inputs = inputs_of(program, batch=batch, length=length, seed=length)
        assert relative_error(logits_of(wide, inputs), narrow(**inputs)["logits"]) <= 1e-4
    report = gp.verify(program, plan, narrow)
    assert report.max_relative_error <= 1e-4
    assert report.max_weight_error <= 1e-6


@pytest.mark.parametrize(
    ("name", "groups"), [("llama-mha", 2), ("llama-wide", 2), ("gpt2", 1), ("gpt2-eager", 2)]
)
def test_padding_is_masked_for_every_query(name: str, groups: int) -> None:
    inputs = inputs_of(program_of(name), batch=2, length=8)
    inputs["attention_mask"] = torch.ones(2, 8, dtype=torch.int64)
    inputs["attention_mask"][1, :3] = 0
    found = merged(name, groups)[1](**inputs)["logits"]
    positions = torch.stack([torch.arange(8), (torch.arange(8) - 3).clamp(min=0)])
    wide = averaged(build(name), LAYOUTS[name], groups)
    expected = logits_of(wide, {**inputs, "position_ids": positions})
    assert relative_error(expected[0], found[0]) <= 1e-4
    assert relative_error(expected[1, 3:], found[1, 3:]) <= 1e-4


@pytest.mark.parametrize(
    ("name", "groups"),
    [("llama-mha", 2), ("llama-wide", 1), ("gemma3", 1), ("gpt2", 2), ("llama-eager", 1)],
)
def test_decoding_on_the_narrow_cache_equals_the_wide_model(name: str, groups: int) -> None:
    narrow = merged(name, groups)[1]
    inputs = inputs_of(program_of(name), batch=2, length=9)
    past: dict[str, Tensor] = {}
    pieces = []
    for start, end in [(0, 4), (4, 7), (7, 8), (8, 9)]:
        outputs = narrow(input_ids=inputs["input_ids"][:, start:end], **past)
        past = cache_after(outputs)
        pieces.append(outputs["logits"])
    wide = averaged(build(name), LAYOUTS[name], groups)
    assert relative_error(logits_of(wide, inputs), torch.cat(pieces, 1)) <= 1e-4
    assert {tensor.shape[:3] for tensor in past.values()} == {(2, groups, 9)}


@pytest.mark.parametrize("name", ["llama-mha", "phi3", "gpt2", "t5"])
def test_merging_equal_heads_loses_nothing(name: str) -> None:
    model = averaged(copy.deepcopy(model_of(name)), LAYOUTS[name], 1)
    program = program_of(name)
    parameters = dict(model.named_parameters())
    equal = program.with_weights({n: parameters[n].detach() for n in parameters})
    narrow = gp.apply(equal, merging(equal, 1))
    inputs = inputs_of(program)
    assert relative_error(equal(**inputs)["logits"], narrow(**inputs)["logits"]) <= 1e-6
    assert narrow.parameter_count() < equal.parameter_count()


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama-mha", 2),
        ("llama-mha", 1),
        ("llama-six", 3),
        ("llama-wide", 2),
        ("qwen3", 1),
        ("gemma3", 1),
        ("mixtral", 1),
        ("phi3", 1),
    ],
)
def test_the_class_itself_with_fewer_kv_heads_holds_the_merged_weights(
    name: str, groups: int
) -> None:
    narrow = merged(name, groups)[1]
    config = copy.deepcopy(build(name).config)
    config.num_key_value_heads = groups
    model = type(build(name))(config).eval()
    model.load_state_dict({n: narrow.weight(n).clone() for n in model.state_dict()})
    inputs = inputs_of(narrow)
    assert relative_error(logits_of(model, inputs), narrow(**inputs)["logits"]) <= 1e-4


@pytest.mark.parametrize(("name", "groups"), [("llama-six", 2), ("gpt2", 2), ("bert", 1)])
def test_only_key_and_value_slices_change_and_to_their_mean(name: str, groups: int) -> None:
    program, layout = program_of(name), LAYOUTS[name]
    narrow = merged(name, groups)[1]
    for weight, before in program.weights.items():
        after = narrow.weights[weight]
        if not re.search(layout.names, weight):
            assert after is before
            continue
        rows, kept = before.movedim(layout.dim, 0), after.movedim(layout.dim, 0)
        expected = [rows[: layout.starts[0]]]
        for start in layout.starts:
            heads = rows[start : start + layout.heads * WIDTH].unflatten(0, (groups, -1, WIDTH))
            expected.append(heads.mean(1).flatten(0, 1))
        assert torch.allclose(kept, torch.cat(expected), atol=1e-7)


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "groups"), [("llama-mha", 2), ("llama-mha", 1), ("gemma3", 1), ("gpt2", 1), ("opt", 2)]
)
def test_caches_shrink_with_the_heads(name: str, groups: int) -> None:
    program, narrow = program_of(name), merged(name, groups)[1]
    caches = [value.shape for value in narrow.inputs if value.name.startswith(PAST)]
    assert {(shape[1], shape[3]) for shape in caches} == {(groups, WIDTH)}
    assert narrow.kv_bytes_per_token() == len(caches) * groups * WIDTH * 4
    heads = LAYOUTS[name].heads
    assert program.kv_bytes_per_token() * groups == narrow.kv_bytes_per_token() * heads


def test_layers_that_are_left_out_keep_their_heads() -> None:
    program = program_of("llama-mha")
    plan = merging(program, 1, only="layers.1.")
    narrow = gp.apply(program, plan)
    gp.verify(program, plan, narrow)
    heads = [value.shape[1] for value in narrow.inputs if value.name.startswith(PAST)]
    assert heads == [4, 4, 1, 1]
    layout = Layout(r"layers\.1\..*\.[kv]_proj\.weight", (0,), 4)
    wide = averaged(build("llama-mha"), layout, 1)
    inputs = inputs_of(program)
    assert relative_error(logits_of(wide, inputs), narrow(**inputs)["logits"]) <= 1e-4


def test_self_and_cross_attention_merge_apart() -> None:
    program = program_of("t5")
    plan = merging(program, 2, only="EncDecAttention")
    narrow = gp.apply(program, plan)
    gp.verify(program, plan, narrow)
    assert len(plan.steps[0].merges) == 2
    wide = averaged(build("t5"), Layout(r"EncDecAttention\.[kv]\.weight", (0,), 4), 2)
    inputs = inputs_of(program)
    assert relative_error(logits_of(wide, inputs), narrow(**inputs)["logits"]) <= 1e-4


@pytest.mark.parametrize("name", ["llama-mha", "gpt2-eager", "bert"])
def test_the_program_is_left_as_it_is(name: str) -> None:
    program = program_of(name)
    before = {key: value.clone() for key, value in program.weights.items()}
    code, fingerprint = str(program.graph), program.fingerprint()
    gp.apply(program, merging(program, 2))
    assert (str(program.graph), program.fingerprint()) == (code, fingerprint)
    assert all(torch.equal(before[key], program.weights[key]) for key in before)


# -- together with other steps --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "llama-eager", "gpt2", "t5"])
def test_merging_in_two_steps_equals_one(name: str) -> None:
    half, middle = merged(name, 2)
    rest = merging(middle, 1)
    last = gp.apply(middle, rest)
    gp.verify(program_of(name), half + rest, last)
    inputs = inputs_of(last)
    once = merged(name, 1)[1]
    assert last.kv_bytes_per_token() == once.kv_bytes_per_token()
    assert relative_error(once(**inputs)["logits"], last(**inputs)["logits"]) <= 1e-4


@pytest.mark.parametrize("name", ["llama-mha", "llama-eager", "phi3", "gpt2", "gpt2-eager", "bert"])
def test_a_merged_program_is_pruned(name: str) -> None:
    first, middle = merged(name, LAYOUTS[name].heads // 2)
    coupling = gp.analyze(middle)
    second = random_plan(coupling)
    assert {"query-slot", "ffn", "residual"} <= {group.role for group in coupling.groups}
    last = gp.apply(middle, second)
    gp.verify(middle, second, last)
    assert gp.verify(program_of(name), first + second, last).max_weight_error <= 1e-6


@pytest.mark.parametrize(
    "name", ["llama-mha", "llama-eager", "phi3", "gpt2", "gpt2-eager", "t5", "opt"]
)
def test_a_pruned_program_is_merged(name: str) -> None:
    program, roles = program_of(name), {"ffn", "head-dim", "rope-pair", "residual"}
    first = random_plan(coupling_of(name), roles=roles)
    middle = gp.apply(program, first)
    second = merging(middle, 1)
    last = gp.apply(middle, second)
    gp.verify(middle, second, last)
    assert gp.verify(program, first + second, last).max_weight_error <= 1e-6


def test_heads_that_became_neighbors_are_merged() -> None:
    program, coupling = program_of("llama-mha"), coupling_of("llama-mha")
    groups = [group for group in coupling.groups if group.role == "kv-head"]
    cuts = tuple(group.cut({(): (1, 2)}) for group in groups)
    first = Plan((Step(program.fingerprint(), cuts),))
    middle = gp.apply(program, first)
    second = merging(middle, 1)
    last = gp.apply(middle, second)
    gp.verify(program, first + second, last)
    model = build("llama-mha")
    for name, parameter in model.named_parameters():
        rows = parameter.data
        if re.search(r"\.[kv]_proj", name):
            rows[:8] = rows[24:] = (rows[:8] + rows[24:]) / 2
        elif "o_proj" in name:
            rows[:, 8:24] = 0
    inputs = inputs_of(program)
    assert relative_error(logits_of(model, inputs), last(**inputs)["logits"]) <= 1e-4


def test_the_plan_of_a_merge_is_read_back_and_applied_again() -> None:
    plan, narrow = merged("gpt2", 2)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    repeated = gp.apply(gp.capture(build("gpt2")), again)
    assert repeated.fingerprint() == narrow.fingerprint()
    assert all(torch.equal(w, repeated.weights[n]) for n, w in narrow.weights.items())


# -- what heads there are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "size", "queries"),
    [("llama-mha", 2, 4, 1), ("llama-wide", 2, 4, 2), ("phi3", 2, 2, 2), ("t5", 6, 4, 1)],
)
def test_every_attention_is_found_with_its_heads(
    name: str, count: int, size: int, queries: int
) -> None:
    found = find_heads(program_of(name))
    assert [(heads.size, heads.queries, heads.refusal) for heads in found] == [
        (size, queries, "")
    ] * count


def test_names_say_where_the_heads_are() -> None:
    names = [heads.name for heads in find_heads(program_of("t5"))]
    assert "decoder.block.1.layer.1.EncDecAttention:kv-head" in names
    assert len(set(names)) == len(names)


def test_a_model_without_attention_has_none() -> None:
    assert find_heads(program_of("resnet")) == ()


def test_one_kv_head_is_nothing_to_merge() -> None:
    assert find_heads(merged("llama-gqa", 1)[1]) == ()


# -- what is refused ------------------------------------------------------------------------------


class OneForBoth(torch.nn.Module):
    """Attention whose queries are its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.value = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.out = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both, value = (
            each(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for each in (self.both, self.value)
        )
        context = torch.nn.functional.scaled_dot_product_attention(both, both, value)
        return self.out(context.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("groups", [3, 0, -2, 8])
def test_groups_that_do_not_divide_the_heads_are_refused(groups: int) -> None:
    (heads, *_) = find_heads(program_of("llama-mha"))
    message = rf"self_attn:kv-head: {groups} groups do not divide 4 KV heads"
    with pytest.raises(MergeError, match=message):
        merge_of(heads, groups)


def test_a_merge_of_other_heads_is_refused() -> None:
    program = program_of("llama-mha")
    (step,) = merging(program, 2).steps
    first, second = step.merges
    for wrong in (replace(first, group="nowhere:kv-head"), replace(first, members=second.members)):
        with pytest.raises(PlanError, match="the plan's KV heads and the program's differ"):
            gp.apply(program, Plan((replace(step, merges=(wrong,)),)))


def test_permutations_that_lose_an_index_are_refused() -> None:
    program = program_of("llama-mha")
    (step,) = merging(program, 2).steps
    reordering = (Permutation("model.layers.0.self_attn.q_proj.weight", 0, (0,) * 32),)
    wrong = Plan((replace(step, merges=(replace(step.merges[0], reordering=reordering),)),))
    with pytest.raises(PlanError, match=r"q_proj\.weight does not name every index once"):
        Plan.from_json(wrong.to_json())


def test_permutations_of_another_size_are_refused() -> None:
    program = program_of("llama-mha")
    (step,) = merging(program, 2).steps
    reordering = (Permutation("model.layers.0.self_attn.q_proj.weight", 0, (1, 0)),)
    wrong = Plan((replace(step, merges=(replace(step.merges[0], reordering=reordering),)),))
    with pytest.raises(PlanError, match=r"q_proj\.weight is 32, not 2"):
        wrong.check(program)
