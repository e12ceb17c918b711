"""Encoder-decoders in parts: the tokens of transformers, before and after pruning."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers as tf
from captures import captured
from encoder_decoders import expected, inputs_of
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.attention.recognize import recognize_attentions
from graphprune.backends.onnx.dimension_names import dimension_names
from graphprune.backends.onnx.encoder_decoder import anatomy
from graphprune.backends.onnx.encoder_decoder.anatomy import TOKENS
from graphprune.backends.onnx.encoder_decoder.decoding import Decoding, part_of_program
from graphprune.backends.onnx.encoder_decoder.generation import generated
from graphprune.backends.onnx.encoder_decoder.parts import split
from graphprune.backends.onnx.encoder_decoder.proof import check_parts
from graphprune.backends.onnx.encoder_decoder.rules import Rules, rules_of
from graphprune.backends.onnx.export import export
from graphprune.backends.onnx.package import (
    check_package,
    read_package,
    verify_package,
    write_package,
)
from graphprune.backends.onnx.weights.quantize import Quantization
from graphprune.errors import BackendError, CheckpointError, ParityError, UsageError
from graphprune.ir.nodes import copy_of
from graphprune.ir.program import Program

SPEECH = {"num_mel_bins": 4, "max_source_positions": 10}
BART_LIKE = {
    "vocab_size": 53,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _t5(**changes: Any) -> nn.Module:
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 4, "num_layers": 1}
    config = tf.T5Config(
        **{**sizes, "vocab_size": 53, "decoder_start_token_id": 0, "tie_word_embeddings": False}
        | changes
    )
    return tf.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    config = tf.BartConfig(
        **BART_LIKE, max_position_embeddings=64, forced_eos_token_id=2, forced_bos_token_id=7
    )
    model = tf.BartForConditionalGeneration(config)
    model.generation_config.min_new_tokens = 8
    model.generation_config.no_repeat_ngram_size = 2
    return model


def _whisper() -> nn.Module:
    config = tf.WhisperConfig(**BART_LIKE, **SPEECH, max_target_positions=64)
    model = tf.WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [11, 12]
    model.generation_config.begin_suppress_tokens = [20, 2]
    return model


@cache
def model_of(name: str) -> Any:
    """A model whose tokens differ from one to the next: its weights are much larger than usual."""
    torch.manual_seed(2)
    model = {"t5": _t5, "bart": _bart, "whisper": _whisper}[name]().eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            embeds = "shared" in path or "embed" in path
            weight.copy_(torch.randn_like(weight) * (1.0 if embeds else 0.5))
            if weight.ndim == 1 and path.endswith("weight"):
                weight += 1
    return model


def by_parts(program: Program, rules: Rules, inputs: Mapping[str, Tensor], beams: int) -> Any:
    parts = split(program)
    made = {role: part_of_program(part) for role, part in parts.programs.items()}
    decoding = Decoding(made, parts.layout, inputs)
    found, _ = generated(decoding, rules, 3, 12, beams)
    return [list(row) for row in found]


def rules(model: Any, folder: Path) -> Rules:
    model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)
    return rules_of(folder)


PRUNED = "prune{target=ffn,kv-heads ratio=0.5 criterion=l2}"


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("t5", PRUNED),
        pytest.param("whisper", "", marks=pytest.mark.slow),
        pytest.param("t5", "", marks=pytest.mark.slow),
        pytest.param("bart", "", marks=pytest.mark.slow),
        pytest.param("bart", PRUNED, marks=pytest.mark.slow),
        pytest.param("whisper", PRUNED, marks=pytest.mark.slow),
    ],
)
def test_parts_generate_what_transformers_does(name: str, passes: str, tmp_path: Path) -> None:
    model, program = model_of(name), captured(model_of(name))
    if passes:
        program = gp.Pipeline.parse(passes).run(program, quiet=True).program
        model = program.to_module().eval()
    assert check_parts(program, split(program)) < 1e-5
    inputs, seen = inputs_of(name), set[int]()
    for beams in (1, 3):
        found = by_parts(program, rules(model_of(name), tmp_path), inputs, beams)
        wanted = expected(
            model,
            inputs,
            generation_config=copy.deepcopy(model_of(name).generation_config),
            num_beams=beams,
            max_new_tokens=12,
        )
        assert found == wanted
        seen.update(token for row in found for token in row)
    assert len(seen) > 6


# -- packages --


def test_the_decoder_of_next_tokens_runs_in_onnx_runtime(tmp_path: Path) -> None:
    part = split(captured(model_of("t5"))).programs["next"]
    report = export(part, tmp_path / "decoder.onnx")
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5
    names = dimension_names(part).values()
    assert set(names) == {"batch", "sequence", "past_sequence", "encoder_sequence"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "out"
    write_package(captured(model_of("t5")), folder)
    return folder


@pytest.mark.slow
def test_a_package_generates_what_transformers_does(package: Path) -> None:
    runner = gp.EncoderDecoderRunner(package)
    inputs = inputs_of("t5")
    for beams in (1, 3):
        found = runner.generate(inputs, max_new_tokens=12, beams=beams)
        wanted = expected(model_of("t5"), inputs, num_beams=beams, max_new_tokens=12)
        assert [list(row.tokens) for row in found] == wanted
    assert {row.reason for row in found} <= {"stop", "length"}


@pytest.mark.slow
def test_its_files_and_names_are_those_of_optimum(package: Path) -> None:
    assert read_package(package).parts == {
        "encoder": "encoder_model.onnx",
        "first": "decoder_model.onnx",
        "next": "decoder_with_past_model.onnx",
    }
    runner = gp.EncoderDecoderRunner(package)
    assert list(runner.parts["encoder"].shapes) == ["input_ids", "attention_mask"]
    masked = ["input_ids", "encoder_attention_mask"]
    assert list(runner.parts["first"].shapes) == [*masked, "encoder_hidden_states"]
    shapes = runner.parts["next"].shapes
    assert shapes["past_key_values.0.encoder.key"] == ("batch", 4, "encoder_sequence", 4)
    assert shapes["past_key_values.0.decoder.key"] == ("batch", 4, "past_sequence", 4)


def test_caches_come_in_the_order_by_which_optimum_knows_them() -> None:
    parts = split(captured(model_of("t5"))).programs
    caches = [f"0.{of}.{part}" for of in ("decoder", "encoder") for part in ("key", "value")]
    taken = [value.name for value in parts["next"].inputs]
    assert taken[-4:] == [f"past_key_values.{name}" for name in caches]
    given = [value.name for value in parts["first"].outputs]
    assert given == ["logits", *(f"present.{name}" for name in caches)]


@pytest.mark.slow
def test_it_is_proven_again_and_read_back(package: Path) -> None:
    ran = verify_package(package)
    assert ran.max_relative_error is not None
    assert {"token by token", "next: batch of 3"} <= set(ran.errors)
    program, loaded = captured(model_of("t5")), gp.load(package)
    for name, weight in program.weights.items():
        assert torch.equal(loaded.weight(name), weight)


@pytest.mark.slow
def test_what_it_cannot_do_is_said_at_once(package: Path, tmp_path: Path) -> None:
    runner = gp.EncoderDecoderRunner(package)
    with pytest.raises(UsageError, match="attention_mask: labels is not among them"):
        runner.generate({**inputs_of("t5"), "labels": torch.ones(1)})
    with pytest.raises(CheckpointError, match="tokenizer"):
        runner.generate("a text")
    with pytest.raises(BackendError, match="EncoderDecoderRunner runs them"):
        gp.OnnxRunner(package)
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 2.0}')
    with pytest.raises(BackendError, match=r"asks for repetition_penalty=2\.0"):
        rules_of(tmp_path)


@pytest.mark.slow
def test_a_missing_part_is_named(package: Path, tmp_path: Path) -> None:
    for path in package.iterdir():
        if path.name != "decoder_model.onnx":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"decoder_model\.onnx is missing"):
        read_package(tmp_path)


# -- quantized --


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose embedding, the encoder's as well, is the head."""
    torch.manual_seed(0)
    program = captured(_t5(d_model=32, d_ff=64, d_kv=8, tie_word_embeddings=True).eval())
    tokens = torch.arange(18).reshape(3, 6)
    samples = [{**inputs_of("t5"), "decoder_input_ids": tokens, "labels": (tokens + 1) % 53}]
    folder = tmp_path_factory.mktemp("quantized") / "out"
    chosen = Quantization("int4")
    write_package(program, folder, target="cpu", quantization=chosen, samples=samples)
    return folder


@pytest.mark.slow
def test_a_weight_is_the_same_in_all_parts_and_there_once(quantized: Path) -> None:
    held = [
        {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in initializers}
        for initializers in (
            onnx.load(quantized / file, load_external_data=False).graph.initializer
            for file in (read_package(quantized).parts or {}).values()
        )
    ]
    places = [part["shared.weight.int4.rows"] for part in held]
    places += [part["shared.weight.int4"] for part in held[1:]]
    assert {place["location"] for place in places} == {"model.onnx.data"}
    assert len({place["offset"] for place in places}) == 1
    assert not list(quantized.glob("*coder*.data"))


@pytest.mark.slow
def test_quantized_parts_are_judged_by_labels_proven_and_run(quantized: Path) -> None:
    package = read_package(quantized)
    assert package.quantization is not None
    quality = package.quantization["quality"]
    assert (quality["measure"], quality["samples"]) == ("loss", 3)
    assert quality["quantized"] == pytest.approx(quality["pruned"], rel=0.1)
    ran = verify_package(quantized)
    assert ran.max_relative_error is not None
    assert ran.max_relative_error < 1e-5
    assert any("loss on 3 samples" in note for note in ran.notes)
    (row, *_) = gp.EncoderDecoderRunner(quantized).generate(inputs_of("t5"), max_new_tokens=3)
    assert 1 <= len(row.tokens) <= 3


# -- refused --


def test_what_cannot_be_written_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    why = "cannot run this encoder-decoder: it serves those that take input_features"
    with pytest.raises(BackendError, match=why):
        write_package(captured(model_of("t5")), tmp_path / "out", layout="genai")
    with pytest.raises(UsageError, match="external_data=False: the models of an encoder-decoder"):
        write_package(captured(model_of("t5")), tmp_path / "out", external_data=False)
    with pytest.raises(BackendError, match="takes sounds of 3,000 frames, and the model 20"):
        write_package(captured(model_of("whisper")), tmp_path / "out", layout="genai")
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_parts_are_not_right_for_is_one_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: Any) -> float:
        raise ParityError("its decoder gives other logits token by token")

    def whole(*_: Any, **options: Any) -> None:
        raise KeyError("whole")

    monkeypatch.setattr("graphprune.backends.onnx.encoder_decoder.proof.check_parts", refused)
    monkeypatch.setattr("graphprune.backends.onnx.package.export", whole)
    for check in (True, False):
        with pytest.raises(KeyError, match="whole"):
            write_package(captured(model_of("t5")), tmp_path / "out", check=check)
    with pytest.raises(ParityError, match="token by token"):
        write_package(captured(model_of("t5")), tmp_path / "out", layout="optimum")


def test_a_decoder_that_counts_tokens_by_what_they_are_is_told_so() -> None:
    program = captured(model_of("t5"))
    graph, copies = copy_of(program.graph)
    tokens = copies[next(n for value, n in program.input_nodes() if value.name == TOKENS)]
    with graph.inserting_after(tokens):
        counted = graph.call_function(torch.ops.aten.cumsum.default, (tokens, 1))
    counted.meta = {**tokens.meta}
    tokens.replace_all_uses_with(counted, delete_user_cb=lambda user: user is not counted)
    counting = dataclasses.replace(program, graph_module=torch.fx.GraphModule({}, graph))
    with pytest.raises(BackendError, match="cumsum.* counts tokens by what they are"):
        split(counting)


def test_a_call_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program, seen = dataclasses.replace(captured(model_of("t5"))), []

    def recognized(given: Program) -> Any:
        seen.append(given)
        return recognize_attentions(given)

    monkeypatch.setattr(anatomy, "recognize_attentions", recognized)
    check_package(
        program, target=None, opset=None, layout="optimum", quantization=None, settled=True
    )
    split(program, "optimum")
    assert seen == [program]


def test_a_decoder_that_sees_what_follows_is_refused() -> None:
    program = captured(model_of("t5"))
    parts = split(program)
    graph = program.graph
    (mask,) = [node for node in graph.nodes if str(node.target) == "aten.le.Tensor"]
    mask.target = torch.ops.aten.ge.Tensor
    try:
        seeing = dataclasses.replace(program, graph_module=torch.fx.GraphModule({}, graph))
        with pytest.raises(ParityError, match="token by token than at once"):
            check_parts(seeing, parts)
    finally:
        mask.target = torch.ops.aten.le.Tensor
