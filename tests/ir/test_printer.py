from __future__ import annotations

import pytest
import torch

from graphprune import capture
from graphprune.ir.printer import program_text
from graphprune.ir.program import Program


@pytest.fixture(scope="module")
def decoder() -> Program:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return capture(LlamaForCausalLM(config).eval())


def test_every_operator_has_a_line_with_its_type(decoder: Program) -> None:
    lines = program_text(decoder).splitlines()
    operators = [line for line in lines if line.startswith("%")]
    inner = [node for node in decoder.graph.nodes if node.op == "call_function"]
    assert len(operators) == len(inner)
    assert not [line for line in operators if ": None = " in line and "assert" not in line]


def test_weights_inputs_and_outputs_go_by_their_own_names(decoder: Program) -> None:
    lines = program_text(decoder).splitlines()
    assert "weight model.layers.0.self_attn.k_proj.weight: f32[16, 32]" in lines
    assert any(line.startswith("input past_key_values.0.key: f32[") for line in lines)
    assert lines[-1].startswith("return logits=%")
    projection = [line for line in lines if "model.layers.0.self_attn.k_proj.weight)" in line]
    assert len(projection) == 1


def test_no_address_or_other_chance_is_in_the_text(decoder: Program) -> None:
    assert " at 0x" not in program_text(decoder)
    assert "<" not in program_text(decoder).replace("<=", "")


@pytest.mark.parametrize(
    ("dtype", "text"),
    [(torch.bfloat16, "bf16"), (torch.int64, "i64"), (torch.uint8, "u8"), (torch.bool, "bool")],
)
def test_element_types_are_short(dtype: torch.dtype, text: str) -> None:
    module = torch.nn.Flatten()
    example = torch.zeros(2, 3, dtype=dtype)
    assert f"input input: {text}[" in program_text(capture(module, example_inputs=(example,)))
