"""Rotary embeddings are read however they are spelled, and what is none is not taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from tiny_models import perturb
from torch import Tensor, nn

from graphprune.analysis.attention.recognize import RecognizedAttention, recognize_attentions
from graphprune.analysis.attention.rotary import Rotary, RotaryReader
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_KV = {"num_key_value_heads": 2}


def llama(**options: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES, **_KV, **options))


def gptj() -> Any:
    config = tf.GPTJConfig(
        vocab_size=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        n_positions=96,
        bos_token_id=0,
        eos_token_id=1,
    )
    return tf.GPTJForCausalLM(config)


def gemma3() -> Any:
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_SIZES, **_KV, **layers, head_dim=16))


_LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
_YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}

_MODELS: dict[str, tuple[Any, int, bool, int]] = {
    # model, rotated width, interleaved, tables that layers share
    "halves": (llama, 16, False, 1),
    "with query and key norms": (
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SIZES, **_KV, head_dim=16)),
        16,
        False,
        1,
    ),
    "neighbors": (lambda: tf.CohereForCausalLM(tf.CohereConfig(**_SIZES, **_KV)), 16, True, 1),
    "a quarter, of joined projections": (
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES)),
        4,
        False,
        1,
    ),
    "neighbors, before heads come first": (gptj, 8, True, 2),
    "two tables": (gemma3, 16, False, 2),
    "scaled positions": (lambda: llama(**_LINEAR), 16, False, 1),
    "scaled angles": (lambda: llama(**_YARN), 16, False, 1),
}


def captured(model: Any) -> Program:
    torch.manual_seed(0)
    return capture(perturb(model.eval()))


def rotations(program: Program, positions: int) -> tuple[list[Rotary | None], RotaryReader]:
    reader = RotaryReader(program, positions)
    found = []
    for site in recognize_attentions(program):
        assert isinstance(site, RecognizedAttention)
        assert site.caches is not None
        found += [reader.read(site.query), reader.read(site.caches[0].new)]
    return found, reader


@pytest.mark.parametrize("name", _MODELS)
def test_every_spelling_is_read(name: str) -> None:
    build, width, interleaved, tables = _MODELS[name]
    found, reader = rotations(captured(build()), 96)
    assert len(found) == 4
    for rotary in found:
        assert rotary is not None
        assert (rotary.width, rotary.interleaved) == (width, interleaved)
        assert rotary.positions == 96
    assert len(reader.tables) == tables


def test_the_angles_are_those_of_the_paper() -> None:
    found, _ = rotations(captured(llama()), 96)
    assert found[0] is not None
    frequency = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angle = torch.arange(96, dtype=torch.float64)[:, None] * frequency
    assert (found[0].cos.double() - angle.cos()).abs().max() < 1e-5
    assert (found[0].sin.double() - angle.sin()).abs().max() < 1e-5


def test_angles_are_read_off_in_parts_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured(llama())
    whole, _ = rotations(program, 96)
    monkeypatch.setattr("graphprune.analysis.attention.rotary._AT_ONCE", 7 * 4 * 16)
    parts, _ = rotations(program, 96)
    assert whole[0] is not None
    assert parts[0] is not None
    assert torch.equal(whole[0].cos, parts[0].cos)


def test_learned_positions_are_none() -> None:
    config = tf.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=96)
    config.bos_token_id, config.eos_token_id = 0, 1
    found, _ = rotations(captured(tf.GPT2LMHeadModel(config)), 96)
    assert found == [None, None]


class Turned(nn.Module):
    """Rotates by angles that grow with the position, and does `spoil` to the result."""

    def __init__(self, spoil: Any) -> None:
        super().__init__()
        self.spoil = spoil
        self.project = nn.Linear(8, 32)
        self.register_buffer("frequency", 1e4 ** (-torch.arange(8.0) / 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (2, 16)).transpose(1, 2)
        angle = torch.arange(x.shape[1])[:, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        first, second = heads[..., :8], heads[..., 8:]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return self.spoil(turned, x)


def read_turned(spoil: Any) -> Rotary | None:
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    module = Turned(spoil).eval()
    program = capture(module, example_inputs=(torch.randn(2, 5, 8),), dynamic_shapes=sizes)
    ((_, node),) = program.output_nodes()
    return RotaryReader(program, 32).read(node)


@pytest.mark.parametrize(
    ("spoil", "read"),
    [
        (lambda turned, x: turned.clone(), True),
        (lambda turned, x: turned + 1e-3, False),
        (lambda turned, x: turned.tanh(), False),
        (lambda turned, x: turned.flip(-1), False),
        (lambda turned, x: turned.cumsum(2), False),
        (lambda turned, x: turned * torch.arange(16), False),
        (lambda turned, x: turned + x.mean((1, 2))[:, None, None, None], False),
    ],
    ids=["copied", "moved", "bent", "reversed", "summed", "weighed", "mixed"],
)
def test_what_is_more_than_a_rotation_is_none(spoil: Any, read: bool) -> None:
    assert (read_turned(spoil) is not None) == read
