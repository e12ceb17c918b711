from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import inputs_of, program_of, relative_error

import graphprune as gp
from graphprune.errors import MergeError, PipelineError
from graphprune.pass_manager import Result
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.pipeline import Pipeline
from graphprune.program import PAST, Program


def run(program: Program, *passes: Any) -> Result:
    return Pipeline(passes).run(program)


def kv_heads(program: Program) -> list[int]:
    return [int(value.shape[1]) for value in program.inputs if value.name.startswith(PAST)]


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
@pytest.mark.parametrize("groups", [2, 1])
def test_every_attention_is_left_with_so_many_kv_heads(name: str, groups: int) -> None:
    program = program_of(name)
    result = run(program, MergeKvHeads(groups=groups))
    assert kv_heads(result.program) == [groups] * 4
    assert result.program.kv_bytes_per_token() * 4 == program.kv_bytes_per_token() * groups
    (step,) = result.plan.steps
    assert [(merge.size, merge.groups) for merge in step.merges] == [(4, groups)] * 2
    assert not step.cuts
    assert result.plan.removed == {}


def test_the_report_says_what_was_merged() -> None:
    (record,) = run(program_of("llama-mha"), MergeKvHeads(groups=2)).report.passes
    assert record.details == {
        "merged": {f"model.layers.{layer}.self_attn:kv-head": "4 into 2" for layer in (0, 1)}
    }
    assert record.text == "merge-kv-heads{groups=2}"
    assert record.after.kv_bytes_per_token * 2 == record.before.kv_bytes_per_token


def test_the_seed_and_the_calibration_do_not_matter() -> None:
    program = program_of("gpt2")
    pipeline = Pipeline([MergeKvHeads(groups=2)])
    calibration = gp.Calibration.from_batches([inputs_of(program)])
    first, second = pipeline.run(program), pipeline.run(program, calibration=calibration, seed=3)
    assert first.plan == second.plan
    weights = second.program.weights
    assert all(torch.equal(weight, weights[n]) for n, weight in first.program.weights.items())


# -- skipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "heads"),
    [
        (("model.layers.0.self_attn:kv-head",), [4, 4, 2, 2]),
        (("model.layers.0.*",), [4, 4, 2, 2]),
        (("*layers.1.self_attn.v_proj.weight",), [2, 2, 4, 4]),
        ((), [2, 2, 2, 2]),
    ],
)
def test_what_matches_a_skip_pattern_stays(skip: tuple[str, ...], heads: list[int]) -> None:
    result = run(program_of("llama-mha"), MergeKvHeads(groups=2, skip=skip))
    assert kv_heads(result.program) == heads


def test_a_skip_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(MergeError, match=r"skip pattern 'layers\.7\.\*' matches no KV heads"):
        run(program_of("llama-mha"), MergeKvHeads(groups=2, skip=("*.0.*", "layers.7.*")))


def test_attention_that_cannot_be_merged_may_be_skipped_but_then_nothing_is_left() -> None:
    with pytest.raises(MergeError, match="nothing to merge"):
        run(program_of("gpt-neox"), MergeKvHeads(groups=2, skip=("*",)))


# -- where it stands in a pipeline -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "gpt2-eager"])
def test_it_merges_what_a_pass_before_it_made_smaller(name: str) -> None:
    program = program_of(name)
    passes = [Prune("ffn", 0.25, "l1"), Prune("head-dim", 0.25, "l2"), MergeKvHeads(groups=2)]
    result = run(program, *passes)
    assert kv_heads(result.program) == [2] * 4
    assert len(result.plan.steps) == 3
    assert gp.verify(program, result.plan, result.program).max_relative_error <= 1e-4


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
def test_a_pass_after_it_finds_query_slots_and_prunes_them(name: str) -> None:
    program = program_of(name)
    result = run(program, MergeKvHeads(groups=2), Prune("query-heads", 0.5, "l1"))
    assert kv_heads(result.program) == [2] * 4
    assert len(gp.analyze(result.program).groups) > 0
    again = result.plan.from_json(result.plan.to_json()).apply(program)
    inputs = inputs_of(program)
    assert relative_error(result.program(**inputs)["logits"], again(**inputs)["logits"]) == 0


def test_it_merges_four_into_two_and_two_into_one() -> None:
    program = program_of("llama-eager")
    twice = run(program, MergeKvHeads(groups=2), MergeKvHeads(groups=1)).program
    once = run(program, MergeKvHeads(groups=1)).program
    inputs = inputs_of(program)
    assert relative_error(once(**inputs)["logits"], twice(**inputs)["logits"]) <= 1e-4


# -- refusing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("llama-mha", 3, "model.layers.0.self_attn:kv-head: 3 groups do not divide 4 KV heads"),
        ("llama-mha", 4, "nothing to merge: 4 KV heads are at most 4 or skipped"),
        ("llama-gqa", 2, "nothing to merge: 2 KV heads are at most 2 or skipped"),
        ("llama-gqa", 99, "nothing to merge: 2 KV heads are at most 99 or skipped"),
        ("resnet", 2, "the program has no attention with more than one KV head"),
    ],
)
def test_heads_that_cannot_be_merged_are_refused(name: str, groups: int, message: str) -> None:
    with pytest.raises(MergeError) as caught:
        run(program_of(name), MergeKvHeads(groups=groups))
    assert str(caught.value).startswith("pass 1 (merge-kv-heads): ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("groups=0", MergeError, "groups 0 is not positive"),
        ("groups=-2", MergeError, "groups -2 is not positive"),
        ("groups=two", PipelineError, "option 'groups' wants a whole number, not 'two'"),
        ("skip=x", PipelineError, "needs the option 'groups'"),
        ("groups=2 skp=x", PipelineError, "has no option 'skp'; did you mean 'skip'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Pipeline.parse(f"merge-kv-heads{{{options}}}")
