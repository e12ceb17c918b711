"""Numbers of units that a config refuses by a rule of its own."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from graphprune.analysis.coupling import analyze
from graphprune.backends.huggingface.config_rules import accepted_sizes
from graphprune.backends.huggingface.save import checkpoint_form
from graphprune.errors import SelectionError
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


def test_heads_must_divide_the_hidden_size_for_a_plain_checkpoint(program: Program) -> None:
    heads = [group for group in analyze(program).groups if group.role == "kv-head"]
    assert accepted_sizes(program, heads) == {heads[0].name: [1, 2, 4, 8]}
    with pytest.raises(SelectionError, match="kept in one of 1, 2, 4, 8"):
        Pipeline.parse("prune{target=kv-heads ratio=0.25 criterion=l2 form=plain}").run(program)


def test_the_reason_names_the_rule_and_what_would_do(program: Program) -> None:
    pruned = Pipeline.parse("prune{target=kv-heads ratio=0.25 criterion=l2}").run(program).program
    found = checkpoint_form(pruned)
    assert found.kind == "remote-code"
    assert "the config refuses num_attention_heads 6 and num_key_value_heads 6" in found.reason
    assert found.reason.endswith("num_attention_heads of 1, 2, 4, 8 would do")
