"""Packages of encoders in optimum and sentence-transformers: the outputs of the program, by name.

Both want an older transformers, so they live in an environment of their own, whose interpreter
GRAPHPRUNE_OPTIMUM names: ``pip install optimum-onnx[onnxruntime] sentence-transformers`` there.
Without it, this is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import graphprune as gp
from graphprune.backends.onnx.package import write_package
from graphprune.backends.onnx.weights.quantize import Quantization

INTERPRETER = os.environ.get("GRAPHPRUNE_OPTIMUM", "")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "eats", "food")
TEXTS = ["a man eats food", "food"]

ENCODE = """
import json, sys
from optimum.onnxruntime import ORTModelForFeatureExtraction
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = ORTModelForFeatureExtraction.from_pretrained(folder)
given = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
found = model(**given).last_hidden_state
whole = SentenceTransformer(folder, backend="onnx")
print(json.dumps([found.tolist(), whole.encode(texts).tolist()]))
"""

pytestmark = pytest.mark.skipif(not INTERPRETER, reason="GRAPHPRUNE_OPTIMUM names no interpreter")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small BERT with its tokenizer, and the mean of its tokens after it."""
    folder = tmp_path / "bert"
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    tf.BertModel(config).save_pretrained(folder)
    tf.BertTokenizer(vocab={word: at for at, word in enumerate(WORDS)}).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    listed = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize("weights", [None, "int8"])
def test_both_give_what_the_program_gives(
    checkpoint: Path, weights: str | None, tmp_path: Path
) -> None:
    program = gp.load(checkpoint)
    chosen = Quantization(weights) if weights else None  # type: ignore[arg-type]
    write_package(program, tmp_path / "out", target="cpu", quantization=chosen)
    given = tf.AutoTokenizer.from_pretrained(checkpoint)(TEXTS, padding=True, return_tensors="pt")
    expected = program(**{v.name: given[v.name] for v in program.inputs})["last_hidden_state"]
    done = subprocess.run(
        [INTERPRETER, "-c", ENCODE, str(tmp_path / "out"), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokens, sentences = (np.array(each) for each in json.loads(done.stdout.splitlines()[-1]))
    allowed = 0.05 if weights else 1e-4
    mask = given["attention_mask"][..., None]
    mean = (expected * mask).sum(1) / mask.sum(1)
    for found, wanted in ((tokens * mask.numpy(), expected * mask), (sentences, mean)):
        assert np.abs(found - wanted.numpy()).max() <= allowed * wanted.abs().max().item()
