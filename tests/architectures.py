"""Tiny models of transformers with random weights, and their captured programs.

Norms, biases and running statistics are moved off their initial ones and zeros, so that a slip in
any of them shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
import transformers as tf
from captures import captured
from tiny_models import perturb
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.residual.branches import Branches
from graphprune.calibration.data import Calibration
from graphprune.ir.printer import program_text
from graphprune.ir.program import PAST, PRESENT, Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Cut, Step
from graphprune.transforms.branches import remove_branches

VOCABULARY = 61

_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_BERT_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _llama(**changes: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**_LLAMA_LIKE, **changes}))


def _gpt2(**changes: Any) -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCABULARY, **sizes, **_TOKENS, **changes))


def _gemma3() -> nn.Module:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {**_LLAMA_LIKE, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 4}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**config, layer_types=layers))


def _gpt_neox() -> nn.Module:
    config = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**config, rotary_pct=0.5))


def _opt() -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = tf.OPTConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **sizes,
        **_TOKENS,
    )
    return tf.OPTForCausalLM(config)


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=2, **sizes)
    return tf.T5ForConditionalGeneration(config)


def _resnet() -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**sizes, layer_type="bottleneck"))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama-mha": lambda: _llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama-gqa": _llama,
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA_LIKE, head_dim=8)),
    "gemma3": _gemma3,
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_LLAMA_LIKE)),
    "gpt2": _gpt2,
    "gpt-neox": _gpt_neox,
    "opt": _opt,
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**{**_LLAMA_LIKE, "intermediate_size": 24}, num_local_experts=4)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=VOCABULARY, **_BERT_LIKE)),
    "t5": _t5,
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(**_BERT_LIKE, image_size=16, patch_size=4)
    ),
    "resnet": _resnet,
    "llama-six": lambda: _llama(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=6, attention_bias=True
    ),
    "llama-wide": lambda: _llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=4),
    "llama-eager": lambda: _llama(num_key_value_heads=4, attn_implementation="eager"),
    "gpt2-eager": lambda: _gpt2(attn_implementation="eager"),
}

WIDER = ("llama-six", "llama-wide")
"""For what is merged: six heads with biases, which three groups divide; eight queries on four."""

EAGER = ("llama-eager", "gpt2-eager")
ARCHITECTURES = tuple(name for name in _BUILDERS if name not in WIDER + EAGER)
DECODERS = tuple(name for name in ARCHITECTURES if name not in ("bert", "t5", "vit", "resnet"))


def build(name: str) -> nn.Module:
    """A fresh model, the same one each time."""
    torch.manual_seed(0)
    return perturb(_BUILDERS[name]())


@cache
def model_of(name: str) -> nn.Module:
    """The model called `name`, which no test may edit."""
    return build(name)


@cache
def program_of(name: str) -> Program:
    """The captured model called `name`."""
    return captured(model_of(name))


@cache
def coupling_of(name: str) -> Coupling:
    """Its analysis."""
    return gp.analyze(program_of(name))


def inputs_of(
    program: Program, batch: int = 3, length: int = 9, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of other sizes than those of the captured run."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for value in program.inputs:
        if value.name.endswith("input_ids"):
            shape = (batch, length)
            inputs[value.name] = torch.randint(3, VOCABULARY, shape, generator=generator)
        elif value.name == "pixel_values":
            inputs[value.name] = torch.randn((batch, *value.shape[1:]), generator=generator)
    return inputs


def inputs_to(model: nn.Module, path: str, batch: dict[str, Tensor]) -> Tensor:
    """What comes into a linear layer of `model`, ``[tokens, in]``."""
    seen: list[Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(**{key: value for key, value in batch.items() if "past" not in key})
    handle.remove()
    return torch.cat(seen)


def without_branches(name: str, *places: int) -> tuple[Program, Plan]:
    """The program without some of its residual branches, by their places, and the plan of it."""
    branches = Branches(coupling_of(name).types)
    records = branches.records([branches.all[at].name for at in places])
    plan = Plan((Step(branches.program.fingerprint(), branches=records),))
    return remove_branches(branches.program, records, branches), plan


def renamed_outputs(program: Program, names: dict[str, str]) -> Program:
    """The program with other names for some of its outputs."""
    outputs = (
        dataclasses.replace(value, name=names.get(value.name, value.name))
        for value in program.outputs
    )
    return dataclasses.replace(program, outputs=tuple(outputs))


def cache_after(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cache that a run leaves, as inputs of the next."""
    return {
        PAST + name.removeprefix(PRESENT): tensor
        for name, tensor in outputs.items()
        if name.startswith(PRESENT)
    }


def random_cuts(
    coupling: Coupling,
    ratio: float | None = 0.25,
    seed: int = 0,
    roles: Collection[str] | None = None,
    without: Collection[str] = (),
) -> tuple[Cut, ...]:
    """Cut random units of every group, other ones under every parent; as many stay as must.

    Without a ratio every group loses another number of units.
    """
    chosen = random.Random(seed)
    sizes = {group.name: group.size for group in coupling.groups}
    cuts = []
    for group in coupling.groups:
        if group.role in without or (roles is not None and group.role not in roles):
            continue
        count = min(
            max(1, int(group.size * (ratio or chosen.random()))), group.size - group.min_units
        )
        places = itertools.product(*(range(sizes[parent]) for parent in group.parents))
        units = {place: tuple(chosen.sample(range(group.size), count)) for place in places}
        cuts.append(group.cut(units))
    return tuple(cuts)


def random_plan(coupling: Coupling, **options: Any) -> Plan:
    """A plan of one step with `random_cuts`."""
    return Plan((Step(coupling.program.fingerprint(), random_cuts(coupling, **options)),))


def printed(program: Program) -> str:
    """The program with its dynamic sizes called s0, s1 and so on."""
    text = program_text(program)
    symbols = dict.fromkeys(re.findall(r"\bs\d+\b", text))
    names = {symbol: f"s{index}" for index, symbol in enumerate(symbols)}
    return re.sub(r"\bs\d+\b", lambda match: names[match[0]], text)


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest value expected."""
    assert expected.shape == found.shape
    return float((expected - found).abs().max() / expected.abs().max())


BATCHES = (2, 1, 3)
LENGTH = 9
"""Of the calibration batches."""


@cache
def calibration_of(name: str) -> Calibration:
    sizes = enumerate(BATCHES)
    return Calibration.from_batches(
        [inputs_of(program_of(name), batch=rows, length=LENGTH, seed=i) for i, rows in sizes]
    )
