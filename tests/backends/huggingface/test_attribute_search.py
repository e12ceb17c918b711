"""Sizes that no config field sets: what layers of torch and the code of models keep of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.utils import parametrizations

from graphprune.backends.huggingface import model as hf_model
from graphprune.backends.huggingface.attribute_search import of_layers
from graphprune.backends.huggingface.layers.modeling_file import pruned_class
from graphprune.backends.huggingface.model import difference
from graphprune.backends.huggingface.save import save_pretrained
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline

_TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_MARIAN = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
_MAMBA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 4,
    "head_dim": 16,
    "expand": 2,
    "n_groups": 1,
    "state_size": 8,
    "chunk_size": 8,
}


def _gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 61}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes))


def _resnet() -> Any:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**sizes, layer_type="bottleneck"))


def _mobilenet() -> Any:
    config = tf.MobileNetV1Config(image_size=32, depth_multiplier=0.25, min_depth=8)
    return tf.MobileNetV1ForImageClassification(config)


def _vit_mae() -> Any:
    encoder = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    decoder = {f"decoder_{name}": value for name, value in encoder.items()}
    heads = {"num_attention_heads": 2, "decoder_num_attention_heads": 2}
    return tf.ViTMAEForPreTraining(
        tf.ViTMAEConfig(**encoder, **decoder, **heads, image_size=16, patch_size=4)
    )


def _t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=61, decoder_start_token_id=0, **sizes)
    )


_BUILT = {
    "gpt2": _gpt2,
    "luke": lambda: tf.LukeForMaskedLM(tf.LukeConfig(**_TEXT, entity_vocab_size=8)),
    "mamba2": lambda: tf.Mamba2ForCausalLM(tf.Mamba2Config(**_MAMBA)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_MARIAN)),
    "mobilenet": _mobilenet,
    "resnet": _resnet,
    "t5": _t5,
    "vit-mae": _vit_mae,
}


@cache
def program_of(name: str) -> Program:
    torch.manual_seed(0)
    model = _BUILT[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.add_(0.2 * torch.rand_like(buffer))
    return capture(model)


def pruned(name: str, target: str, ratio: float = 0.25) -> Program:
    text = f"prune{{target={target} ratio={ratio} criterion=l2}}"
    return Pipeline.parse(text).run(program_of(name)).program


def reloaded(program: Program, directory: Path) -> tuple[Any, dict[str, Any]]:
    """The model in the directory, which computes what the program does, and what differs in it."""
    save_pretrained(program, directory)
    assert program.source is not None
    base: Any = program.source.model_class
    changes = json.loads((directory / "config.json").read_text()).get("graphprune", {})
    model = (pruned_class(base) if changes else base).from_pretrained(directory).eval()
    assert difference(program, model) == ""
    return model, changes


def test_a_model_of_images_has_no_input_embeddings() -> None:
    assert difference(program_of("resnet"), _BUILT["resnet"]().eval()).startswith("logits of")


def test_running_statistics_are_resized(tmp_path: Path) -> None:
    model, changes = reloaded(pruned("resnet", "channels"), tmp_path / "out")
    layer = "resnet.encoder.stages.1.layers.1.layer.0"
    assert changes["shapes"][f"{layer}.normalization.running_mean"] == [6]
    assert changes["attributes"][f"{layer}.normalization"] == {"num_features": 6}
    convolution = model.get_submodule(f"{layer}.convolution")
    assert (convolution.in_channels, convolution.out_channels) == (32, 6)


def test_depthwise_convolutions_keep_a_group_for_each_channel(tmp_path: Path) -> None:
    model, changes = reloaded(pruned("mobilenet", "channels"), tmp_path / "out")
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert layers
    assert any("groups" in attributes for attributes in changes["attributes"].values())
    for layer in layers:
        assert layer.groups == layer.in_channels == layer.out_channels == len(layer.weight)


@pytest.mark.parametrize(
    ("name", "path", "attributes"),
    [
        ("gpt2", "transformer.h.0.attn", {"split_size": 24}),
        (
            "luke",
            "luke.encoder.layer.0.attention.self",
            {"num_attention_heads": 3, "all_head_size": 24},
        ),
    ],
)
def test_numbers_that_code_reads_follow_sizes(
    name: str, path: str, attributes: dict[str, int], tmp_path: Path
) -> None:
    _, changes = reloaded(pruned(name, "kv-heads"), tmp_path / "out")
    assert changes["attributes"][path] == attributes


def test_a_number_that_the_code_scales_by_stays_what_it_was(tmp_path: Path) -> None:
    text = "prune{target=ffn,residual,kv-heads ratio=0.25 criterion=l2}"
    _, changes = reloaded(Pipeline.parse(text).run(program_of("t5")).program, tmp_path / "out")
    # The logits are divided by the square root of the width, which is now another one.
    assert changes["attributes"][""] == {"model_dim": 32}


def test_what_draws_at_random_draws_the_same_on_both_sides(tmp_path: Path) -> None:
    model, _ = reloaded(pruned("vit-mae", "ffn"), tmp_path / "out")
    assert type(model).__name__ == "ViTMAEForPreTraining"


@pytest.mark.slow
def test_a_folded_norm_and_numbers_change_together(tmp_path: Path) -> None:
    _, changes = reloaded(pruned("mamba2", "channels"), tmp_path / "out")
    mixer = changes["attributes"]["backbone.layers.0.mixer"]
    assert {"conv_dim", "intermediate_size"} <= mixer.keys()
    assert "chunk_size" not in mixer  # one of the sizes by chance, and none in truth
    assert changes["attributes"]["backbone.layers.0.mixer.norm"]["variance_epsilon"] > 1e-5


def test_positions_that_code_would_compute_are_stored(tmp_path: Path) -> None:
    program = pruned("marian", "ffn")
    model, changes = reloaded(program, tmp_path / "out")
    assert not changes
    name = "model.encoder.embed_positions.weight"
    assert torch.equal(model.get_parameter(name), program.weight(name))


def test_resized_ties_stay_ties() -> None:
    shape = [61, 24]
    config = tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61)
    config.graphprune = {"shapes": {"transformer.wte.weight": shape}}
    model = pruned_class(tf.GPT2LMHeadModel)(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert list(model.lm_head.weight.shape) == shape


def test_outputs_within_outputs_are_found() -> None:
    held = {"mems": (torch.zeros(1), torch.ones(2)), "inner": {"scores": torch.ones(3)}}
    assert hf_model._output(held, "mems.1") is held["mems"][1]
    assert hf_model._output(held, "inner.scores") is held["inner"]["scores"]
    assert hf_model._output(held, "mems.7") is None
    assert hf_model._output(held, "absent.0") is None


def test_a_layer_whose_weight_is_computed_says_its_sizes() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 6, 3)))
    program = capture(model, (torch.randn(2, 4, 8),))
    model[0].out_channels = 9
    assert of_layers(program, model, {"0.bias"}) == {"0": {"out_channels": 6}}
