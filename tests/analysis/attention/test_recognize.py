"""Attention is read from graphs with its meaning: heads, cache, scale, soft cap, kind of mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import program_of
from byte_llama import byte_llama
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.analysis.attention.attentions import attentions
from graphprune.analysis.attention.recognize import (
    Recognition,
    RecognizedAttention,
    UnrecognizedAttention,
    recognize_attentions,
)
from graphprune.analysis.inference import infer
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program


def sites_of(program: Program) -> list[RecognizedAttention]:
    found = []
    for site in recognize_attentions(program):
        assert isinstance(site, RecognizedAttention), site.why
        found.append(site)
    return found


@cache
def gemma2() -> Program:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = tf.Gemma2Config(
        **sizes,
        **heads,
        sliding_window=4,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return capture(tf.Gemma2ForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("llama-gqa", ["causal and padding"] * 2),
        ("gpt2", ["causal and padding"] * 2),
        ("gpt2-eager", ["causal and padding"] * 2),
        ("gemma3", ["window 4 and padding", "causal and padding", "window 4 and padding"]),
        ("bert", ["none and padding"] * 2),
        ("vit", ["none"] * 2),
        ("t5", ["bias"] * 2 + ["bias", "none and padding"] * 2),
    ],
)
def test_the_kind_of_a_mask_is_found_by_trying_it(name: str, masks: list[str]) -> None:
    assert [str(site.mask) for site in sites_of(program_of(name))] == masks


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gemma3", "qwen3"])
def test_keys_are_read_before_they_are_repeated_and_with_their_cache(name: str) -> None:
    program = program_of(name)
    inputs = dict(map(reversed, program.input_nodes()))  # type: ignore[arg-type]
    for layer, site in enumerate(sites_of(program)):
        assert (site.heads, site.kv_heads, site.sizes) == (4, 2, (8, 8))
        assert site.caches is not None
        for kind, cached in zip(("key", "value"), site.caches, strict=True):
            assert cached.name == f"present.{layer}.{kind}"
            assert inputs[cached.past].name == f"past_key_values.{layer}.{kind}"
        assert (site.key, site.value) == tuple(cached.joined for cached in site.caches)


def test_spelled_out_attention_has_its_scale_and_soft_cap() -> None:
    full, window = sites_of(gemma2())
    assert (full.softcap, full.scale) == (5.0, 0.25)
    assert [str(site.mask) for site in (full, window)] == [
        "window 4 and padding",
        "causal and padding",
    ]
    eager, fused = sites_of(program_of("llama-eager"))[0], sites_of(program_of("llama-mha"))[0]
    assert (eager.scale, eager.sizes, eager.softcap) == (fused.scale, fused.sizes, None)


def test_a_sink_is_a_score_of_each_head() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = tf.GptOssConfig(**sizes, **heads, num_local_experts=4, sliding_window=4)
    program = capture(tf.GptOssForCausalLM(config).eval())
    named = {node: name for name, node in program.weight_nodes()}
    found = sites_of(program)
    for layer, site in enumerate(found):
        assert site.sink is not None
        assert named[site.sink] == f"model.layers.{layer}.self_attn.sinks"
    assert [site.mask.window for site in found] == [4, None]


def test_merged_heads_are_read_as_the_heads_there_are() -> None:
    from graphprune.passes.merge_kv_heads import MergeKvHeads
    from graphprune.pipeline.pipeline import Pipeline

    program = capture(byte_llama())
    for groups in (2, 1):
        merged = Pipeline([MergeKvHeads(groups=groups)]).run(program).program
        assert [(site.heads, site.kv_heads) for site in sites_of(merged)] == [(4, groups)] * 2


class Heads(nn.Module):
    """Attention over a sequence of 4 heads of 8, masked as `allowed(query, key)` says."""

    def __init__(self, allowed: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.allowed = allowed

    def heads(self, hidden: Tensor) -> tuple[Tensor, ...]:
        parts = self.project(hidden).chunk(3, -1)
        return tuple(part.unflatten(-1, (4, 8)).transpose(1, 2) for part in parts)

    def mask(self, hidden: Tensor) -> Tensor | None:
        at = torch.arange(hidden.shape[1])
        return None if self.allowed is None else self.allowed(at[:, None], at[None])

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.heads(hidden)
        return self.attend(query, key, value, self.mask(hidden)).transpose(1, 2).flatten(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)


def read_one(module: nn.Module) -> Recognition:
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    (found,) = recognize_attentions(
        capture(module, (torch.randn(2, 6, 32),), dynamic_shapes=shapes)
    )
    return found


@pytest.mark.parametrize(
    ("allowed", "kind"),
    [
        (lambda q, k: k <= q, "causal"),
        (lambda q, k: (k <= q) & (q - k < 300), "window 300"),
        (lambda q, k: (k <= q) & (k > q - 2), "window 2"),
        (lambda q, k: (q - k).abs() < 3, "bias"),  # a window on both sides
        (lambda q, k: (k <= q) & (q // 4 == k // 4), "bias"),  # chunks
        (lambda q, k: (k <= q) | (k < 2), "bias"),  # a prefix that all attend to
        (lambda q, k: k < q + 1 - (q > 7) * 2, "bias"),  # causal on short sequences only
        (lambda q, k: torch.where(k <= q, 0.0, -1e9), "causal"),
        (lambda q, k: torch.where(k <= q, 0.0, -10.0), "bias"),  # a score may outweigh it
        (lambda q, k: torch.where(k <= q, (k - q) * 0.5, -1e9), "bias"),  # ALiBi
    ],
)
def test_only_what_holds_on_every_trial_is_called_by_a_name(
    allowed: Callable[[Tensor, Tensor], Tensor], kind: str
) -> None:
    site = read_one(Heads(allowed))
    assert isinstance(site, RecognizedAttention)
    assert str(site.mask) == kind


class ByContent(Heads):
    def mask(self, hidden: Tensor) -> Tensor:
        return (hidden.sum(-1) > -1e9)[:, None, None]


class Repeated(Heads):
    """Two KV heads for four queries: next to one another, or in turn."""

    def __init__(self, in_turn: bool) -> None:
        super().__init__()
        self.in_turn = in_turn

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        key, value = key[:, :2], value[:, :2]
        if self.in_turn:
            key, value = key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)
        else:
            key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(query, key, value)


class Causal(Heads):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def test_a_mask_that_depends_on_what_is_read_is_not_taken_for_a_kind() -> None:
    site = read_one(ByContent())
    assert isinstance(site, RecognizedAttention)
    assert site.mask.kind == "bias"


def test_heads_repeated_in_turn_are_not_taken_for_groups() -> None:
    grouped, in_turn = read_one(Repeated(False)), read_one(Repeated(True))
    assert isinstance(grouped, RecognizedAttention)
    assert isinstance(in_turn, RecognizedAttention)
    assert (grouped.kv_heads, in_turn.kv_heads) == (2, 4)


def test_causal_attention_without_a_mask_is_causal() -> None:
    site = read_one(Causal())
    assert isinstance(site, RecognizedAttention)
    assert (str(site.mask), site.mask.node) == ("causal", None)


class Spelled(Heads):
    """Attention with something between its product and its softmax."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self.between(query @ key.transpose(-1, -2)).softmax(-1) @ value


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda s: s.relu(), "aten.relu.default lies between"),
        (lambda s: 5 * (s / 4).tanh(), "capped in a way"),
        (lambda s: s.transpose(-1, -2), "lies between"),
    ],
)
def test_what_is_not_attention_is_left_with_a_reason(between: Any, why: str) -> None:
    found = read_one(Spelled(between))
    assert isinstance(found, UnrecognizedAttention)
    assert why in found.why


def test_a_softmax_that_weighs_no_values_is_none_of_its_business() -> None:
    class Router(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.softmax(-1) * 2

    assert recognize_attentions(capture(Router(), (torch.randn(2, 6),))) == ()


def test_probabilities_that_are_also_returned_are_of_an_attention() -> None:
    class Told(Heads):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            query, key, value = self.heads(hidden)
            probabilities = (query @ key.transpose(-1, -2)).softmax(-1)
            return (probabilities @ value).transpose(1, 2).flatten(2), probabilities

    found = read_one(Told())
    assert isinstance(found, UnrecognizedAttention)
    assert "probabilities are read elsewhere too" in found.why
    assert len(attentions(infer(capture(Told(), (torch.randn(2, 6, 32),))))) == 1
