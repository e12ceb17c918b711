"""A checkpoint has the structure of its program, whatever weights both have now or later."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import relative_error
from torch import Tensor, nn

from graphprune.backends.huggingface import trial
from graphprune.backends.huggingface.layers.modeling_file import pruned_class
from graphprune.backends.huggingface.model import difference
from graphprune.backends.huggingface.save import checkpoint_form, save_pretrained
from graphprune.backends.huggingface.trial import Trial
from graphprune.backends.load import load
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program
from graphprune.ir.sample_inputs import random_inputs
from graphprune.pipeline.pipeline import Pipeline

_TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_HEADS = "prune{target=*:kv-head,*:head-dim* ratio=0.5 criterion=l2}"


def _distilbert() -> nn.Module:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": 61}
    return tf.DistilBertForMaskedLM(tf.DistilBertConfig(**sizes, max_position_embeddings=32))


def _segformer() -> nn.Module:
    config = tf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    return tf.SegformerForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_TEXT)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_TEXT, pad_token_id=0)),
    "distilbert": _distilbert,
    "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**_TEXT, embedding_size=16)),
    "segformer": _segformer,
}


@cache
def pruned(name: str, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(dtype)
    return Pipeline.parse(_HEADS).run(capture(model)).program


def reloaded(program: Program, folder: Path) -> Any:
    save_pretrained(program, folder)
    assert program.source is not None
    auto = getattr(tf, program.source.model_class.__name__)
    remote = (folder / "modeling_graphprune.py").is_file()
    model_class = pruned_class(auto) if remote else auto
    return model_class.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bert", torch.float32),
        ("bert", torch.bfloat16),
        *((name, torch.float16) for name in MODELS),
    ],
)
def test_heads_and_their_size_cut_together_stay_what_they_are(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    program = pruned(name, dtype)
    model = reloaded(program, tmp_path / "out")
    words = ("query", "key", "q_lin", "k_lin", "q_proj", "k_proj")
    # As training may make them: a wrong number of heads shows once attention is sharp.
    sharp = {n: w.float() if w.is_floating_point() else w for n, w in program.weights.items()}
    found = [n for n in sharp if any(f".{word}." in n for word in words)]
    assert found
    sharp |= {n: sharp[n] * 20 for n in found}
    program = pruned(name)
    model = model.float()
    state = {n: sharp[program.aliases.get(n, n)] for n in model.state_dict()}
    model.load_state_dict(state)
    inputs = program.fill(random_inputs(program, batch=2, length=7))
    ours = program.run(sharp, inputs)
    with torch.no_grad():
        theirs = model(**inputs)
    assert relative_error(ours["logits"], theirs["logits"]) < 1e-4


def test_a_trial_tells_apart_what_the_weights_of_now_do_not() -> None:
    program = pruned("bert")
    quiet_weights = {n: w * 0.01 for n, w in program.weights.items() if ".query." in n}
    program = program.with_weights(quiet_weights)
    runs = Trial(program)
    right, wrong = (_with_heads(program, heads) for heads in (2, 1))
    assert difference(program, right) == difference(program, wrong) == ""
    assert runs.difference(right) == ""
    assert "differ by" in runs.difference(wrong)
    # The model has its own weights again.
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(right.get_parameter(name), program.weights[name])


def _with_heads(program: Program, heads: int) -> Any:
    assert program.source is not None
    torch.manual_seed(0)
    model: Any = MODELS["bert"]().eval()
    attention = model.bert.encoder.layer[0].attention
    attention.self.num_attention_heads = heads
    attention.self.attention_head_size = attention.self.all_head_size = 8
    attention.self.attention_head_size = 8 // heads
    for path, weight in program.weights.items():
        parent, _, last = path.rpartition(".")
        held = model.get_submodule(parent)
        if last in held._parameters:
            held._parameters[last] = nn.Parameter(weight)
    return model


def test_weights_that_lie_in_files_are_drawn_one_operator_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MODELS["bert"]().save_pretrained(tmp_path)
    pipeline = Pipeline.parse("prune{target=ffn ratio=0.5 criterion=l2}")
    program = pipeline.run(load(tmp_path), quiet=True).program
    drawn: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    draw = trial._draw

    def watched(*arguments: Any) -> Tensor:
        held.append(sum(each() is not None for each in drawn))
        found = draw(*arguments)
        drawn.append(weakref.ref(found))
        return found

    monkeypatch.setattr(trial, "_draw", watched)
    assert checkpoint_form(program).kind == "plain"
    parameters = sum(kind == "parameter" for kind in program.kinds.values())
    assert len(drawn) >= 2 * parameters
    assert max(held) == 1  # a layer has a matrix and a bias
