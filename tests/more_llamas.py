"""Llamas of other head counts than `architectures` has, for what is merged."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as tf
from architectures import VOCABULARY, build, perturb, program_of
from torch import nn

import graphprune as gp
from graphprune.ir.program import Program

_LLAMAS: dict[str, dict[str, Any]] = {
    "llama-six": {"hidden_size": 48, "num_attention_heads": 6, "attention_bias": True},
    "llama-wide": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4},
}
"""Six heads with biases, which three groups divide; and eight queries on four KV heads."""


def fresh(name: str) -> nn.Module:
    if name not in _LLAMAS:
        return build(name)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=VOCABULARY, **{**sizes, **_LLAMAS[name]})
    return perturb(tf.LlamaForCausalLM(config))


@cache
def captured(name: str) -> Program:
    return gp.capture(fresh(name)) if name in _LLAMAS else program_of(name)
