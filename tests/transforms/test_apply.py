from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    EAGER,
    build,
    cache_after,
    coupling_of,
    inputs_of,
    program_of,
    random_cuts,
    random_plan,
    relative_error,
)
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.groups import Group
from graphprune.errors import PlanError
from graphprune.ir.program import PAST, Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.transforms.apply import apply_step

SIZES = [(1, 1), (2, 5), (5, 11)]


def zeroed(model: nn.Module, removed: Mapping[str, Mapping[int, list[int]]]) -> nn.Module:
    """`model` with the slices of a plan set to zero in its own parameters and buffers."""
    held = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, dims in removed.items():
            for dim, indices in dims.items():
                held[name].index_fill_(dim, torch.tensor(indices), 0)
    return model


def first_output(outputs: Mapping[str, Tensor]) -> Tensor:
    return next(iter(outputs.values()))


def lengths_of(program: Program) -> list[tuple[int, int]]:
    fixed = any(v.name == "pixel_values" for v in program.inputs)
    return SIZES[:1] + SIZES[2:] if fixed else SIZES


@pytest.mark.parametrize("name", [*ARCHITECTURES, *EAGER])
def test_a_quarter_of_every_group_at_once_equals_the_masked_original(name: str) -> None:
    program, coupling = program_of(name), coupling_of(name)
    plan = random_plan(coupling)
    assert len(plan.steps[0].cuts) == len(coupling.groups) > 0
    report = gp.verify(program, plan, gp.apply(program, plan))
    assert report.max_relative_error <= 1e-4
    assert report.max_weight_error == 0


@pytest.mark.parametrize("name", [*ARCHITECTURES, *EAGER])
def test_removal_equals_zeroing_the_model_of_transformers(name: str) -> None:
    program, coupling = program_of(name), coupling_of(name)
    approximate = {group.role for group in coupling.groups if group.exactness == "approximate"}
    plan = random_plan(coupling, seed=1, without={*approximate, "expert"})
    pruned = gp.apply(program, plan)
    model = zeroed(build(name), plan.removed)
    for batch, length in lengths_of(program):
        inputs = inputs_of(program, batch=batch, length=length, seed=length)
        with torch.no_grad():
            expected = model(**inputs)
        found = first_output(pruned(**inputs))
        assert relative_error(expected[0] if name == "t5" else expected["logits"], found) <= 1e-4


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2", "gpt-neox", "mixtral"])
def test_decoding_on_a_narrow_cache_equals_the_full_pass(name: str) -> None:
    program = program_of(name)
    pruned = gp.apply(program, random_plan(coupling_of(name), seed=2))
    assert pruned.kv_bytes_per_token() < program.kv_bytes_per_token()
    inputs = inputs_of(program, batch=2, length=9)
    full = pruned(**inputs)["logits"]
    past: dict[str, Tensor] = {}
    pieces = []
    for start, end in [(0, 4), (4, 7), (7, 8), (8, 9)]:
        outputs = pruned(input_ids=inputs["input_ids"][:, start:end], **past)
        past = cache_after(outputs)
        pieces.append(outputs["logits"])
    assert relative_error(full, torch.cat(pieces, 1)) <= 1e-4


def shrunk(group: Group, count: int, shape: tuple[int, ...], dim: int) -> int:
    size = shape[dim]
    assert size * (group.size - count) % group.size == 0
    return size * (group.size - count) // group.size


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "t5", "resnet"])
def test_parameters_shrink_as_the_plan_says(name: str) -> None:
    program, coupling = program_of(name), coupling_of(name)
    plan = random_plan(coupling)
    pruned = gp.apply(program, plan)
    for weight, before in program.weights.items():
        removed = plan.removed.get(weight, {})
        expected = [size - len(removed.get(dim, ())) for dim, size in enumerate(before.shape)]
        assert list(pruned.weights[weight].shape) == expected
        kept = before
        for dim, indices in removed.items():
            stays = [i for i in range(before.shape[dim]) if i not in set(indices)]
            kept = kept.index_select(dim, torch.tensor(stays))
        assert torch.equal(kept, pruned.weights[weight])
    assert pruned.parameter_count() < program.parameter_count()


def test_one_group_shrinks_by_the_sizes_of_its_members() -> None:
    program, coupling = program_of("llama-gqa"), coupling_of("llama-gqa")
    group = coupling.group("model.layers.1.mlp:ffn")
    step = Step(program.fingerprint(), random_cuts(coupling, ratio=0.5, roles={"ffn"})[1:])
    pruned = apply_step(program, step)
    hidden, units = 32, group.size // 2
    assert program.parameter_count() - pruned.parameter_count() == 3 * hidden * units
    assert (
        pruned.weights["model.layers.0.mlp.up_proj.weight"]
        is (program.weights["model.layers.0.mlp.up_proj.weight"])
    )


@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "resnet"])
def test_the_program_and_the_model_are_left_as_they_are(name: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program = gp.capture(model)
    code, fingerprint = str(program.graph), program.fingerprint()
    values = {n: dict(n.meta) for n in program.graph.nodes}
    weights = {key: value.clone() for key, value in program.weights.items()}
    gp.apply(program, random_plan(gp.analyze(program)))
    assert (str(program.graph), program.fingerprint()) == (code, fingerprint)
    assert {n: dict(n.meta) for n in program.graph.nodes} == values
    assert all(torch.equal(weights[key], value) for key, value in program.weights.items())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_plan_applied_to_a_fresh_copy_gives_the_same_bits() -> None:
    plan = random_plan(coupling_of("qwen3"), seed=3)
    first = gp.apply(program_of("qwen3"), plan)
    second = gp.apply(gp.capture(build("qwen3")), Plan.from_json(plan.to_json()))
    assert first.fingerprint() == second.fingerprint()
    assert list(first.weights) == list(second.weights)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    inputs = inputs_of(first)
    assert torch.equal(first(**inputs)["logits"], second(**inputs)["logits"])


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("llama-gqa", "gpt2", "resnet")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_a_rewritten_program_is_analysed_and_pruned_again(name: str) -> None:
    program, coupling = program_of(name), coupling_of(name)
    first = random_plan(coupling)
    middle = gp.apply(program, first)
    again = gp.analyze(middle)
    assert {g.role for g in again.groups} <= {g.role for g in coupling.groups}
    second = random_plan(again, ratio=0.4, seed=1)
    last = gp.apply(middle, second)
    both = first + second
    gp.verify(middle, second, last)
    report = gp.verify(program, both, last)
    assert report.max_weight_error == 0
    for weight, before in program.weights.items():
        kept = before
        for dim, indices in both.removed.get(weight, {}).items():
            stays = [i for i in range(before.shape[dim]) if i not in set(indices)]
            kept = kept.index_select(dim, torch.tensor(stays))
        assert torch.equal(kept, last.weights[weight])


def test_means_keep_their_divisor_through_two_steps() -> None:
    program, coupling = program_of("llama-gqa"), coupling_of("llama-gqa")
    first = random_plan(coupling, roles={"residual"})
    middle = gp.apply(program, first)
    second = random_plan(gp.analyze(middle), seed=5, roles={"residual"})
    last = gp.apply(middle, second)
    model = zeroed(build("llama-gqa"), (first + second).removed)
    inputs = inputs_of(program)
    with torch.no_grad():
        assert relative_error(model(**inputs).logits, last(**inputs)["logits"]) <= 1e-4


def test_a_step_for_another_program_is_refused() -> None:
    plan = random_plan(coupling_of("llama-gqa"))
    other = program_of("llama-mha")
    with pytest.raises(PlanError, match=other.fingerprint()):
        gp.apply(other, plan)
    with pytest.raises(PlanError, match=plan.steps[0].fingerprint):
        plan.check(other)


def test_a_meta_program_is_rewritten_without_weights() -> None:
    with torch.device("meta"):
        model = build("llama-gqa")
    program = gp.capture(model)
    pruned = gp.apply(program, random_plan(gp.analyze(program)))
    real = gp.apply(program_of("llama-gqa"), random_plan(coupling_of("llama-gqa")))
    assert {n: w.shape for n, w in pruned.weights.items()} == {
        n: w.shape for n, w in real.weights.items()
    }
    assert all(w.is_meta for n, w in pruned.weights.items() if pruned.kinds[n] == "parameter")


def test_cache_inputs_and_outputs_have_the_new_sizes() -> None:
    program, coupling = program_of("llama-gqa"), coupling_of("llama-gqa")
    pruned = gp.apply(program, random_plan(coupling, roles={"kv-head"}, ratio=0.5))
    shapes = [value.shape for value in pruned.inputs if value.name.startswith(PAST)]
    assert [shape[1] for shape in shapes] == [1] * len(shapes)
    assert [shape[3] for shape in shapes] == [8] * len(shapes)
