"""Packages in onnxruntime-genai: the tokens of the program, whatever its layers' sizes.

Its wheel brings an ONNX Runtime of its own, so it lives in an environment of its own, whose
interpreter GRAPHPRUNE_GENAI names: ``pip install onnxruntime-genai`` there. Without it, this is
left out.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune import reference
from graphprune.backends.onnx.package import write_package
from graphprune.backends.onnx.weights.quantize import Quantization

INTERPRETER = os.environ.get("GRAPHPRUNE_GENAI", "")
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], [400]]
NEW = 20

GENERATE = """
import json, sys
import numpy as np
import onnxruntime_genai as og

folder, prompts, new, pad = sys.argv[1], *map(json.loads, sys.argv[2:])
model = og.Model(folder)
print(json.dumps([int(t) for t in og.Tokenizer(model).encode("def main(")]))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=64, batch_size=len(prompts))
generator = og.Generator(model, parameters)
longest = max(map(len, prompts))
ids = [prompt + [pad] * (longest - len(prompt)) for prompt in prompts]
generator.append_tokens(np.array(ids, dtype=np.int32))
for _ in range(new):
    generator.generate_next_token()
found = [[int(t) for t in generator.get_sequence(row)][longest:] for row in range(len(prompts))]
print(json.dumps(found))
"""


def generated(folder: Path, prompts: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """What onnxruntime-genai makes of a text, and its tokens after `prompts`."""
    arguments = [str(folder), *(json.dumps(each) for each in (prompts, NEW, 2))]
    done = subprocess.run(
        [INTERPRETER, "-c", GENERATE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    encoded, found = map(json.loads, done.stdout.splitlines()[-2:])
    return encoded, found


pytestmark = pytest.mark.skipif(not INTERPRETER, reason="GRAPHPRUNE_GENAI names no interpreter")


@pytest.mark.parametrize("target", ["cpu", None])
def test_it_generates_the_tokens_of_the_program(target: str | None, tmp_path: Path) -> None:
    passes = (
        "prune{target=ffn ratio=0.25 criterion=l2},merge-kv-heads{groups=2 skip=model.layers.0.*}"
    )
    result = gp.Pipeline.parse(passes).run(gp.load(reference.checkpoint_dir()), quiet=True)
    write_package(result.program, tmp_path / "out", target=target, plan=result.plan)
    expected = []
    # What is padded on the right is right where attention counts a mask's ones.
    prompts = PROMPTS if target == "cpu" else PROMPTS[:1]
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NEW):
            logits = result.program(input_ids=torch.tensor([ids]))["logits"]
            ids.append(int(logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    encoded, found = generated(tmp_path / "out", prompts)
    assert found == expected
    tokenizer = gp.OnnxRunner(tmp_path / "out").tokenizer
    assert encoded == tokenizer.encode("def main(", add_special_tokens=False)


def test_it_generates_from_quantized_weights(tmp_path: Path) -> None:
    chosen = Quantization("int4", block=16)
    program = gp.load(reference.checkpoint_dir())
    write_package(program, tmp_path / "out", target="cpu", quantization=chosen, check=False)
    runner = gp.OnnxRunner(tmp_path / "out")
    runner.ends = frozenset()
    rows = runner.generate(PROMPTS[:1], max_new_tokens=NEW)
    assert generated(tmp_path / "out", PROMPTS[:1])[1] == [list(row.tokens) for row in rows]
