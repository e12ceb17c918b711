"""Packages of encoder-decoders in optimum and onnxruntime-genai: the tokens of transformers.

Both live in environments of their own, whose interpreters GRAPHPRUNE_OPTIMUM and GRAPHPRUNE_GENAI
name: ``pip install optimum-onnx[onnxruntime]`` and ``pip install onnxruntime-genai`` there. Without
them, this is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import graphprune as gp
from graphprune.backends.onnx.package import write_package
from graphprune.backends.onnx.weights.quantize import Quantization

OPTIMUM = os.environ.get("GRAPHPRUNE_OPTIMUM", "")
GENAI = os.environ.get("GRAPHPRUNE_GENAI", "")
NEW = 6

TRANSLATE = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM
model = ORTModelForSeq2SeqLM.from_pretrained(sys.argv[1], use_merged=False)
ids = torch.tensor(json.loads(sys.argv[2]))
mask = torch.ones_like(ids)
found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=int(sys.argv[3]))
print(json.dumps(found[:, 1:].tolist()))
"""

HEAR = """
import json, sys
import numpy as np
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
sound, start = np.load(sys.argv[2]), json.loads(sys.argv[3])
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(start) + int(sys.argv[4]), batch_size=1, num_beams=1)
generator = og.Generator(model, params)
generator.set_model_input("audio_features", sound)
generator.append_tokens(np.array([start], dtype=np.int32))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)][len(start):]))
"""


def enlarged(model: Any) -> Any:
    """`model` with weights so large that its tokens differ from one to the next."""
    torch.manual_seed(3)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (1.0 if "embed" in path else 0.4))
            if weight.ndim == 1 and path.endswith("weight"):
                weight += 1
    return model.eval()


def tokens_of(interpreter: str, code: str, *given: str) -> Any:
    done = subprocess.run(
        [interpreter, "-c", code, *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not OPTIMUM, reason="GRAPHPRUNE_OPTIMUM names no interpreter")
@pytest.mark.parametrize("weights", [None, "int8"])
def test_optimum_generates_what_the_package_does(weights: Any, tmp_path: Path) -> None:
    config = tf.T5Config(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        vocab_size=53,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    program = gp.capture(enlarged(tf.T5ForConditionalGeneration(config)))
    chosen = Quantization(weights) if weights else None
    write_package(program, tmp_path / "out", target="cpu", quantization=chosen)
    ids = torch.randint(3, 53, (2, 7))
    rows = gp.EncoderDecoderRunner(tmp_path / "out").generate(
        {"input_ids": ids}, max_new_tokens=NEW
    )
    found = tokens_of(OPTIMUM, TRANSLATE, str(tmp_path / "out"), json.dumps(ids.tolist()), str(NEW))
    assert [row[: len(ours.tokens)] for row, ours in zip(found, rows, strict=True)] == [
        list(ours.tokens) for ours in rows
    ]
    assert len({token for row in found for token in row}) > 2


@pytest.mark.skipif(not GENAI, reason="GRAPHPRUNE_GENAI names no interpreter")
def test_genai_turns_sound_into_the_tokens_of_transformers(tmp_path: Path) -> None:
    config = tf.WhisperConfig(
        vocab_size=53,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=80,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = enlarged(tf.WhisperForConditionalGeneration(config))
    write_package(gp.capture(model), tmp_path / "out", target="cpu")
    sound = torch.randn(1, 80, 3000)
    np.save(tmp_path / "sound.npy", sound.numpy())
    wanted = tf.GenerationMixin.generate(
        model, input_features=sound, do_sample=False, max_new_tokens=NEW
    )[0, 1:]
    found = tokens_of(
        GENAI, HEAR, str(tmp_path / "out"), str(tmp_path / "sound.npy"), "[1]", str(NEW)
    )
    assert found[: len(wanted)] == wanted.tolist()
    assert len(set(found)) > 2
