"""Quantized BART and Whisper: the tokens of transformers with the values that weights stand for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from captures import captured
from encoder_decoders import expected, inputs_of
from torch import nn

import graphprune as gp
from graphprune.backends.onnx.package import read_package, write_package
from graphprune.backends.onnx.weights.quantize import Quantization
from graphprune.errors import UsageError

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 53,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
"""Both tie the head to the embedding of the decoder, and BART to that of the encoder."""


def model_of(name: str) -> Any:
    torch.manual_seed(2)
    model: nn.Module
    if name == "bart":
        config = tf.BartConfig(**SIZES, max_position_embeddings=64, forced_eos_token_id=None)
        model = tf.BartForConditionalGeneration(config)
    else:
        speech = {"num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 64}
        config = tf.WhisperConfig(**SIZES, **speech, suppress_tokens=None)
        model = tf.WhisperForConditionalGeneration(config)
        model.generation_config.begin_suppress_tokens = None
    with torch.no_grad():  # so that tokens differ from one to the next
        for path, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (1.0 if "embed" in path else 0.4))
            if weight.ndim == 1 and path.endswith("weight"):
                weight += 1
    return model.eval()


@pytest.mark.parametrize("name", ["bart", "whisper"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_tokens_are_those_of_what_the_weights_stand_for(
    name: str, weights: Any, tmp_path: Path
) -> None:
    model, inputs = model_of(name), inputs_of(name)
    samples = [
        {**inputs, "decoder_input_ids": torch.tensor([row] * 3), "labels": torch.tensor([row] * 3)}
        for row in ([1, 5, 9, 13], [1, 20, 3, 40])
    ]
    folder, chosen = tmp_path / "out", Quantization(weights, activations="float")
    report = write_package(
        captured(model), folder, target="cpu", quantization=chosen, samples=samples
    )
    limit = {"int8": 0.01, "int4": 0.15}[weights]
    assert len(report.quantized) == 17  # twelve of three attentions, four of FFNs, the embedding
    assert all(0 < lost < limit for lost in report.quantized.values())
    package = read_package(folder)
    assert package.quantization is not None
    quality = package.quantization["quality"]
    assert quality["quantized"] == pytest.approx(quality["pruned"], rel=limit)
    stands_for = gp.load(folder).to_module().eval()
    runner, seen = gp.EncoderDecoderRunner(folder), set[int]()
    for beams in (1, 3):
        rows = [list(row.tokens) for row in runner.generate(inputs, max_new_tokens=12, beams=beams)]
        rules = copy.deepcopy(model.generation_config)
        assert rows == expected(
            stands_for, inputs, generation_config=rules, num_beams=beams, max_new_tokens=12
        )
        seen.update(token for row in rows for token in row)
    assert len(seen) > 3


def test_blocks_that_do_not_divide_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    program = captured(model_of("whisper"))
    with pytest.raises(UsageError, match=r"blocks of 128 do not divide the 32 columns of .*: 32 d"):
        write_package(
            program, tmp_path / "out", target="cpu", quantization=Quantization("int8", block=128)
        )
    assert not (tmp_path / "out").exists()
