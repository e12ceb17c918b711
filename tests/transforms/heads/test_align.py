"""Aligned heads of real architectures: exact where users can undo what heads differ by."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from architectures import coupling_of, inputs_of, program_of, relative_error
from torch import Tensor

import graphprune as gp
from graphprune.analysis.matrices import contractions
from graphprune.analysis.types import Types
from graphprune.errors import CalibrationError
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.transforms.heads.align import Aligned, align
from graphprune.transforms.heads.grouping import group_by_weights
from graphprune.transforms.heads.kv_heads import find_heads
from graphprune.transforms.heads.layout import HeadMap, Unmapped, map_heads
from graphprune.transforms.heads.merge import merge_of


def calibration(program: Program) -> gp.Calibration:
    batches = [inputs_of(program, batch=2, length=length, seed=length) for length in (12, 9)]
    plain = [{k: v for k, v in batch.items() if "past" not in k} for batch in batches]
    return gp.Calibration.from_batches(plain)


@cache
def types_of(name: str) -> Types:
    return coupling_of(name).types


@cache
def maps_of(name: str) -> list[HeadMap]:
    program = program_of(name)
    held = contractions(program)
    return [map_heads(types_of(name), held, heads) for heads in find_heads(program)]


def aligned(name: str, program: Program, groups: int, **options: object) -> tuple[Aligned, Plan]:
    heads = find_heads(program)
    found = align(program, types_of(name), heads, groups, calibration(program), **options)  # type: ignore[arg-type]
    merges = tuple(merge_of(each, groups, found.reordering[each.name]) for each in heads)
    return found, Plan((Step(program.fingerprint(), (), merges),))


def with_related_heads(name: str) -> Program:
    """Head u + n / 2 is head u, turned in every plane and mapped otherwise: n / 2 heads suffice."""
    program = program_of(name)
    weights = dict(program.weights)
    for at, found in enumerate(maps_of(name)):
        _, key, value, _ = found.projections
        width = key.indices.shape[2]
        turn = torch.zeros(width, width)
        angles = torch.linspace(0.5, 3, len(found.planes))
        for (a, b), angle in zip(found.planes.tolist(), angles, strict=True):
            turn[a, a] = turn[b, b] = angle.cos()
            turn[a, b], turn[b, a] = -angle.sin(), angle.sin()
        generator = torch.Generator().manual_seed(at)
        fixed = found.fixed[:, None], found.fixed
        turn[fixed] = torch.randn(len(found.fixed), len(found.fixed), generator=generator)
        other = torch.eye(width) + torch.randn(width, width, generator=generator) / 4
        half = found.heads.size // 2
        for projection, change in ((key, 1.5 * turn), (value, other)):
            rows = projection.indices[:, 0]
            for weight in filter(None, (projection.matrix.weight, projection.bias)):
                held = weights[weight].clone()
                vector = held.ndim == 1
                whole = held[:, None] if vector else projection.matrix.read(held)[0]
                for unit in range(half):
                    whole[rows[unit + half]] = change @ whole[rows[unit]]
                weights[weight] = held if vector else projection.matrix.write(held, whole[None])
    return program.with_weights(weights)


ROTATED = ["llama-mha", "llama-eager", "llama-gqa", "llama-wide", "phi3", "gpt-neox", "mixtral"]
PLAIN = ["gpt2", "gpt2-eager", "opt", "bert", "vit", "t5"]


@pytest.mark.parametrize("name", [*ROTATED, *PLAIN])
def test_heads_that_differ_by_what_their_users_can_undo_merge_without_loss(name: str) -> None:
    program = with_related_heads(name)
    heads = find_heads(program)
    half = heads[0].size // 2
    found, plan = aligned(name, program, half)
    narrow = gp.apply(found.program, plan)
    inputs = inputs_of(program, batch=2, length=8, seed=1)
    output = program.outputs[0].name
    expected = program(**inputs)[output]
    # Where heads cannot be reordered, those that differ are not neighbors.
    tied = {note.partition(":")[0] for note in found.notes.values()}
    assert tied <= {"heads stay in order"}
    errors = [found.errors[each.name] for each in heads if each.name not in found.notes]
    assert errors
    assert all(max(each["keys"], each["values"]) <= 1e-4 for each in errors)
    if not tied:
        assert relative_error(expected, narrow(**inputs)[output]) <= 2e-2
    report = gp.verify(found.program, plan, narrow)
    assert report.max_relative_error <= 1e-4


@pytest.mark.parametrize("name", [*ROTATED, *PLAIN])
def test_the_edited_program_holds_equal_heads_and_merging_it_is_exact(name: str) -> None:
    program = program_of(name)
    found, plan = aligned(name, program, 1)
    for heads in find_heads(program):
        for weight, dim, slices in heads.slices():
            rows = found.program.weights[weight].movedim(dim, 0)
            assert all(torch.equal(rows[at], rows[slices[0]]) for at in slices)
    narrow = gp.apply(found.program, plan)
    inputs = inputs_of(program, batch=2, length=7, seed=2)
    for output, expected in found.program(**inputs).items():
        if not output.startswith("present."):
            assert relative_error(expected, narrow(**inputs)[output]) <= 1e-5


@pytest.mark.parametrize("name", ["llama-mha", "gpt-neox", "opt", "t5"])
def test_aligned_heads_are_nearer_than_their_mean(name: str) -> None:
    program = program_of(name)
    heads = find_heads(program)
    found, plan = aligned(name, program, 1)
    plain = Plan((Step(program.fingerprint(), (), tuple(merge_of(h, 1) for h in heads)),))
    inputs = calibration(program).batches[0]
    output = program.outputs[0].name
    expected = program(**inputs)[output]

    def error(narrow: Program) -> float:
        return float((narrow(**inputs)[output] - expected).square().sum())

    assert error(gp.apply(found.program, plan)) < 0.5 * error(gp.apply(program, plain))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_keys_with_a_norm_are_averaged_and_the_report_says_so(name: str) -> None:
    program = program_of(name)
    found, plan = aligned(name, program, 1)
    heads = find_heads(program)
    reason = "keys: more is done with them than to rotate them by position"
    assert found.notes == {each.name: reason for each in heads}
    key, value = next(heads[0].slices()), list(heads[0].slices())[1]
    rows = program.weights[key[0]]
    mean = torch.stack([rows[at] for at in key[2]]).mean(0)
    assert torch.allclose(found.program.weights[key[0]][key[2][0]], mean, atol=1e-6)
    assert "values" in found.errors[heads[0].name]
    changed = found.program.weights[value[0]]
    assert not torch.allclose(changed, program.weights[value[0]], atol=1e-3)
    gp.verify(found.program, plan, gp.apply(found.program, plan))


class Gated(torch.nn.Module):
    """Attention whose result is gated before the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate, self.out = (torch.nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            each(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        attended = context.transpose(1, 2).reshape(x.shape)
        result: Tensor = self.out(attended * self.gate(x).sigmoid())
        return result


def test_values_behind_a_gate_are_averaged_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    program = gp.capture(Gated().eval(), (torch.randn(2, 6, 16),))
    (heads,) = find_heads(program)
    batch = {program.inputs[0].name: torch.randn(2, 6, 16)}
    data = gp.Calibration.from_batches([batch])
    found = align(program, gp.analyze(program).types, [heads], 2, data)
    assert found.notes[heads.name].startswith("values: ")
    assert set(found.errors[heads.name]) == {"keys", "outputs"}


def test_data_that_is_not_finite_is_refused() -> None:
    program = program_of("llama-mha")
    name = "model.layers.0.self_attn.k_proj.weight"
    broken = program.with_weights({name: torch.full_like(program.weights[name], torch.inf)})
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn:kv-head: its heads are not"):
        aligned("llama-mha", broken, 2)


# -- where heads lie ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ROTATED, *PLAIN])
def test_planes_and_places_follow_from_the_types(name: str) -> None:
    rotated = {"gpt-neox": 2}.get(name, 4 if name in ROTATED else 0)
    for found in maps_of(name):
        query, key, value, output = found.projections
        assert len(found.planes) == rotated
        assert len(found.fixed) == 8 - 2 * rotated
        assert key.indices.shape == value.indices.shape == (found.heads.size, 1, 8)
        assert (
            query.indices.shape
            == output.indices.shape
            == (found.heads.size, found.heads.queries, 8)
        )
        if query.matrix.weight == key.matrix.weight:
            assert not set(query.indices.flatten().tolist()) & set(key.indices.flatten().tolist())
        every = [set(each.indices.flatten().tolist()) for each in found.projections]
        assert [len(each) for each in every] == [each.indices.numel() for each in found.projections]


def test_rotary_halves_are_a_plane() -> None:
    found = maps_of("llama-mha")[0]
    assert found.planes.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_heads_of_which_no_attention_is_plain_are_not_mapped() -> None:
    program = program_of("llama-mha")
    heads = find_heads(program)[0]
    several = dataclasses.replace(heads, attentions=heads.attentions * 2)
    other = dataclasses.replace(heads, attentions=find_heads(program)[1].attentions)
    with pytest.raises(Unmapped, match="of which 0 are plain"):
        map_heads(types_of("llama-mha"), contractions(program), other)
    assert map_heads(types_of("llama-mha"), contractions(program), several).heads is several


# -- groups without data --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "llama-wide", "gpt2", "gpt-neox"])
def test_similar_heads_become_neighbors_and_nothing_else_changes(name: str) -> None:
    program = program_of(name)
    weights = dict(program.weights)
    heads = find_heads(program)
    for each in heads:
        for weight, dim, slices in each.slices():
            held = weights[weight].clone()
            rows = held.movedim(dim, 0)
            rows[slices[2]], rows[slices[3]] = rows[slices[1]].clone(), rows[slices[0]].clone()
            weights[weight] = held
    related = program.with_weights(weights)
    merges = []
    for each in heads:
        way = group_by_weights(related, types_of(name), each, 2)
        assert (way.groups, way.in_order) == (((0, 3), (1, 2)), "")
        merges.append(merge_of(each, 2, way.reordering))
    plan = Plan((Step(related.fingerprint(), (), tuple(merges)),))
    narrow = gp.apply(related, plan)
    inputs = inputs_of(program, batch=2, length=7, seed=2)
    assert relative_error(related(**inputs)["logits"], narrow(**inputs)["logits"]) <= 1e-5
    assert gp.verify(related, plan, narrow).max_weight_error <= 1e-6
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert "reordered" in str(plan)


def test_heads_that_another_attention_orders_too_stay() -> None:
    program = program_of("t5")
    heads = find_heads(program)[0]
    way = group_by_weights(program, types_of("t5"), heads, 2)
    assert (way.groups, way.reordering) == (((0, 1), (2, 3)), ())
    assert way.in_order == "another attention has its heads in the same order"
