"""Numbers of units that a config refuses by a rule of its own."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from graphprune.analysis.coupling import analyze
from graphprune.backends.huggingface.config_rules import size_rules
from graphprune.backends.huggingface.config_search import Builder, Search
from graphprune.backends.huggingface.save import checkpoint_form
from graphprune.errors import MergeError, SelectionError
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    return capture(tf.LlamaForCausalLM(config).eval())


_SEGFORMER = tf.SegformerConfig(
    num_encoder_blocks=1,
    depths=[1],
    sr_ratios=[1],
    hidden_sizes=[16],
    num_attention_heads=[2],
)


def kept(program: Program, passes: str) -> dict[str, int]:
    """Sizes of the groups that a pipeline cuts, by role."""
    result = Pipeline.parse(passes).run(program)
    assert checkpoint_form(result.program).kind == "plain"
    found = {}
    for step in result.plan.steps:
        found |= {cut.role: cut.size - cut.count for cut in step.cuts}
    return found


def test_heads_must_divide_the_hidden_size_for_a_plain_checkpoint(program: Program) -> None:
    heads = [group for group in analyze(program).groups if group.role == "kv-head"]
    rule = size_rules(program, heads)[heads[0].name]
    assert [count for count in range(1, 9) if not rule(count)] == [1, 2, 4, 8]
    assert rule(6).startswith("the config refuses num_attention_heads 6 and num_key_value_heads 6")


@pytest.mark.parametrize(
    ("ratio", "left"),
    [
        (0.25, 4),  # 6 is refused; 4 and 8 are as near, and 8 would be none gone
        (0.5, 4),
        (0.375, 4),  # 5: 4 is nearer than 8
        (0.7, 4),  # 3: of two as near the larger
    ],
)
def test_a_plain_checkpoint_has_the_nearest_number_of_heads(
    program: Program, ratio: float, left: int
) -> None:
    assert kept(program, f"prune{{target=kv-heads ratio={ratio} criterion=l2 form=plain}}") == {
        "kv-head": left
    }


def test_no_more_than_twice_of_what_was_asked_goes(program: Program) -> None:
    with pytest.raises(
        SelectionError, match="leaves 7 of the 8 units .* num_attention_heads 7.*; 1, 2, 4 would do"
    ):
        Pipeline.parse("prune{target=kv-heads ratio=0.125 criterion=l2 form=plain}").run(program)


def test_a_budget_is_met_by_sizes_that_the_config_accepts(program: Program) -> None:
    passes = "prune{target=kv-heads,ffn params=0.2 criterion=l2 form=plain}"
    before, result = program.parameter_count(), Pipeline.parse(passes).run(program)
    assert result.program.parameter_count() <= 0.8 * before
    assert kept(program, passes)["kv-head"] == 4


def test_the_rule_counts_from_what_earlier_passes_left(program: Program) -> None:
    earlier = (
        "prune{target=ffn ratio=0.25 criterion=l2},prune{target=hidden ratio=0.25 criterion=l2}"
    )
    smaller = Pipeline.parse(earlier).run(program).program  # a hidden size of 48
    heads = [group for group in analyze(smaller).groups if group.role == "kv-head"]
    rule = size_rules(smaller, heads)[heads[0].name]
    assert [count for count in range(1, 9) if not rule(count)] == [1, 2, 3, 4, 6, 8]


def test_the_report_says_what_a_rule_changed(program: Program) -> None:
    passes = "prune{target=kv-heads ratio=0.25 criterion=l2 form=plain}"
    (made,) = Pipeline.parse(passes).run(program).report.passes
    (told,) = made.details["left with, for a plain checkpoint"].values()
    assert told.startswith("4 of 8: the config refuses num_attention_heads 6")


def test_merged_heads_are_as_many_as_a_plain_checkpoint_takes(program: Program) -> None:
    result = Pipeline.parse("merge-kv-heads{groups=3 form=plain}").run(program)
    assert checkpoint_form(result.program).changes == {"num_key_value_heads": 4}
    (made,) = result.report.passes
    told = made.details["left with, for a plain checkpoint"]
    assert told == "4 KV heads: 8 KV heads cannot be merged into 3"
    with pytest.raises(MergeError, match="8 KV heads cannot be merged into 7; 1, 2, 4 would do"):
        Pipeline.parse("merge-kv-heads{groups=7 form=plain}").run(program)


def test_sizes_of_a_config_are_looked_up_once(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [group for group in analyze(program).groups if group.role in ("kv-head", "ffn")]
    size_rules(program, groups)
    monkeypatch.setattr(Builder, "model", lambda *_: pytest.fail("built again"))
    for rule in size_rules(program, groups).values():
        rule(3)


def test_the_reason_names_the_rule_and_what_would_do(program: Program) -> None:
    pruned = Pipeline.parse("prune{target=kv-heads ratio=0.25 criterion=l2}").run(program).program
    found = checkpoint_form(pruned)
    assert found.kind == "remote-code"
    assert "the config refuses num_attention_heads 6 and num_key_value_heads 6" in found.reason
    assert found.reason.endswith("num_attention_heads of 1, 2, 4, 8 would do")


def test_a_size_that_was_not_reached_is_named_and_no_attempt_at_it() -> None:
    builder = Builder(_SEGFORMER, tf.SegformerForImageClassification)
    stage = "segformer.stages.0.blocks.0.attention"
    target = {
        f"{stage}.{name}.weight": shape
        for name, shape in (("q_proj", (4, 16)), ("o_proj", (16, 4)))
    }
    search = Search(builder, target, {}, lambda at: (2, 4))
    assert not list(search.solutions())
    assert search.reason == (
        "no values of hidden_sizes.0 and num_attention_heads.0 give dimension 0 of "
        f"{stage}.q_proj.weight the size 4 and dimension 1 of {stage}.q_proj.weight the size 16"
    )


def test_arithmetic_that_fails_within_a_model_is_said_with_its_sizes() -> None:
    builder = Builder(_SEGFORMER, tf.SegformerForImageClassification)
    assert builder.sizes({"num_attention_heads.0": 32}) is None
    assert builder.failure.endswith("(with num_attention_heads.0 = 32)")
