"""Types of transformers whose structure is like no other's here, from config to verified plan.

`tools/coverage.py` does this for all of them; what stands here runs every time.
"""

from __future__ import annotations

import warnings

import pytest
from architectures import random_plan
from tiny_models import tiny_model

import graphprune as gp

ROLES = {
    ("causal-lm", "bloom"): {"kv-head", "ffn"},  # ALiBi, [head, 3, d]
    ("causal-lm", "falcon"): {"query-slot", "ffn"},  # multi-query, parallel attention
    ("causal-lm", "mpt"): {"kv-head", "ffn"},
    ("causal-lm", "cohere"): {"kv-head", "query-slot", "ffn"},
    ("causal-lm", "deepseek_v3"): {"query-slot", "ffn", "expert"},  # latent attention
    ("causal-lm", "gpt_oss"): {"kv-head", "expert", "expert-unit"},  # sinks, packed experts
    ("causal-lm", "llama4_text"): {"kv-head", "expert-unit"},  # complex RoPE
    ("causal-lm", "mamba"): {"channel"},
    ("causal-lm", "rwkv"): {"ffn"},
    ("causal-lm", "lfm2"): {"kv-head", "ffn"},  # short convolutions between attention
    ("causal-lm", "recurrent_gemma"): {"ffn"},  # block-diagonal linears
    ("seq2seq-lm", "bart"): {"kv-head", "ffn"},
    ("masked-lm", "albert"): {"kv-head", "ffn"},  # one layer, used again and again
    ("masked-lm", "deberta-v2"): {"kv-head", "ffn"},  # disentangled attention
    ("image-classification", "swin"): {"kv-head", "ffn"},  # windows, bias tables
    ("image-classification", "convnext"): {"ffn"},
    ("image-classification", "mobilenet_v2"): {"channel"},
    ("speech-encoder", "wav2vec2"): {"kv-head", "ffn"},  # waveforms, weight norm
    ("speech-seq2seq", "whisper"): {"kv-head", "ffn"},
}
"""Task and type -> roles that groups of it have, among others."""


@pytest.mark.parametrize(("task", "kind"), ROLES, ids=str)
def test_every_group_can_lose_a_quarter(task: str, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models of transformers warn of what they lack
        program = gp.capture(tiny_model(task, kind))
    coupling = gp.analyze(program)
    assert {group.role for group in coupling.groups} >= ROLES[task, kind]
    plan = random_plan(coupling)
    pruned = gp.apply(program, plan)
    assert pruned.parameter_count() < program.parameter_count()
    assert gp.verify(program, plan, pruned).max_relative_error <= 1e-4
