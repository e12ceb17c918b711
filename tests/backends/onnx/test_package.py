"""Packages: everything that runs a model in one directory, proven at once and wherever it is."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
import transformers as tf
from architectures import program_of, relative_error
from byte_llama import byte_llama
from command_line import command_line
from torch import nn

import graphprune as gp
from graphprune import reference
from graphprune.backends.onnx.last_logits import last_only
from graphprune.backends.onnx.package import read_package, verify_package, write_package
from graphprune.backends.onnx.parity import REFUSED, SHARED
from graphprune.backends.onnx.runtime.genai_config import genai_config
from graphprune.errors import BackendError, CheckpointError, OutputError, ParityError
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program
from graphprune.pipeline.pass_manager import Result

CHECKS = {
    *(f"prompt of {batch} x {length}" for batch in (1, 3) for length in (1, 3, 17)),
    "8 tokens after it",
    "padded on the right",
    "padded on the left",
    "chunk on a filled cache",
    "16 tokens by choice",
}


@pytest.fixture(scope="module")
def original() -> Program:
    return gp.load(reference.checkpoint_dir())


@pytest.fixture(scope="module")
def result(original: Program) -> Result:
    """Layers that differ in KV heads, and zeros that no index map tells of."""
    passes = (
        "prune{target=ffn ratio=0.25 criterion=l2},merge-kv-heads{groups=4 skip=model.layers.0.*},"
        "sparsify{pattern=0.3 criterion=magnitude}"
    )
    return gp.Pipeline.parse(passes).run(original, quiet=True)


@pytest.fixture(scope="module")
def package(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "out"
    write_package(result.program, folder, plan=result.plan, target="cpu")
    return folder


def test_it_holds_what_a_user_and_onnxruntime_genai_need(package: Path, original: Program) -> None:
    names = {path.name for path in package.iterdir()}
    assert names >= {"model.onnx", "config.json", "generation_config.json", "genai_config.json"}
    assert names >= {"tokenizer.json", "plan.json", "parity.json", "program.json", "graph.json"}
    described = json.loads((package / "genai_config.json").read_text())
    inner = described["model"].pop("decoder")
    assert described["model"] == {
        "type": "decoder",
        "bos_token_id": 0,
        "eos_token_id": [1],
        "pad_token_id": 2,
        "vocab_size": 2048,
        "context_length": 1024,
    }
    assert described["search"]["past_present_share_buffer"] is True
    assert (inner["num_key_value_heads"], inner["num_hidden_layers"]) == (8, 4)
    model = onnx.load(package / "model.onnx")
    inputs = {value.name for value in model.graph.input}
    named = inner["inputs"]
    expected = {named["input_ids"], named["attention_mask"]}
    for layer in range(4):
        expected |= {named["past_key_names"] % layer, named["past_value_names"] % layer}
    assert inputs == expected
    assert inner["outputs"]["logits"] in {value.name for value in model.graph.output}


def test_fixed_sizes_are_integers_for_each_layer(package: Path) -> None:
    shapes = {v.name: v.shape for v in onnx_ir.load(package / "model.onnx").graph.inputs}
    heads = [shapes[f"past_key_values.{layer}.key"][1] for layer in range(4)]
    assert heads == [8, 4, 4, 4]


def test_the_record_names_every_check_and_version(package: Path) -> None:
    record = json.loads((package / "parity.json").read_text())
    assert set(record["parity"]) == {*CHECKS, SHARED}
    assert 0 < max(record["parity"].values()) < 1e-5
    assert record["versions"].keys() >= {"graphprune", "torch", "onnx", "transformers"}
    assert REFUSED in record["notes"]
    found = read_package(package)
    assert (found.padding, found.shares_buffers, found.target) == ("right", True, "cpu")


def test_its_program_comes_back_whole(package: Path, result: Result, original: Program) -> None:
    loaded = gp.load(package)
    assert loaded.weights.keys() == result.program.weights.keys()
    for name, weight in result.program.weights.items():
        assert torch.equal(loaded.weight(name), weight)
    shrunk = gp.apply(original, gp.Plan.load(package / "plan.json"))
    assert {n: w.shape for n, w in shrunk.weights.items()} == {
        n: w.shape for n, w in loaded.weights.items()
    }


def test_its_config_has_the_sizes_that_are_left(package: Path) -> None:
    config = json.loads((package / "config.json").read_text())
    layers = config["per_layer_config"]
    assert [layers[str(layer)].get("num_key_value_heads", 8) for layer in range(4)] == [8, 4, 4, 4]
    assert {layer["intermediate_size"] for layer in layers.values()} == {336}
    assert (package / "modeling_graphprune.py").is_file()


def test_parity_is_proven_again(package: Path) -> None:
    ran = verify_package(package)
    assert set(ran.errors) == {*CHECKS, SHARED}
    assert ran.max_relative_error is not None
    assert ran.max_relative_error < 1e-5


def test_the_command_line_proves_it_too(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command_line(monkeypatch, capsys, package)("verify", package)
    assert done.status == 0
    out = done.out
    assert "8 tokens after it: max relative error" in out
    assert REFUSED in out
    assert out.splitlines()[-1].startswith(f"verified: {package} gives what its program gives")


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in package.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_model_that_was_changed_is_refused_and_the_blame_is_said(copied: Path) -> None:
    model = onnx.load(copied / "model.onnx")
    attention = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    scale = next(a for a in attention.attribute if a.name == "scale")
    scale.f *= 1.5
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(ParityError) as caught:
        verify_package(copied)
    assert "(prompt of 1 x 3)" in str(caught.value)
    assert "without fused operators the largest error is" in str(caught.value)


def test_a_provider_that_is_not_here_is_refused(package: Path) -> None:
    with pytest.raises(BackendError, match="NoSuchProvider"):
        verify_package(package, provider="NoSuchProvider")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the provider runs here")
def test_a_provider_that_would_fall_back_is_refused(package: Path) -> None:
    with pytest.raises(BackendError, match="CUDAExecutionProvider does not run here"):
        verify_package(package, provider="CUDAExecutionProvider")


@pytest.mark.parametrize("name", ["model.onnx", "parity.json", "graph.json"])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        verify_package(copied)


def test_a_damaged_record_is_named(copied: Path) -> None:
    (copied / "parity.json").write_text('{"format": "graphprune-onnx", "version": 1}')
    with pytest.raises(CheckpointError, match=r"parity\.json is damaged"):
        read_package(copied)


def test_a_directory_in_use_is_left_as_it_was(result: Result, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        write_package(result.program, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_left_padding_is_right_where_no_operator_counts(tmp_path: Path) -> None:
    program = capture(byte_llama())
    write_package(program, tmp_path / "out", target="portable")
    record = read_package(tmp_path / "out")
    assert (record.padding, record.shares_buffers) == ("both", False)
    assert record.parity["padded on the left"] < 1e-5
    assert SHARED not in record.parity


def test_what_is_no_decoder_has_no_genai_config(tmp_path: Path) -> None:
    report = write_package(program_of("bert"), tmp_path / "out", target="cpu")
    assert "no genai_config.json: it is not a decoder with a cache" in report.notes
    assert not (tmp_path / "out" / "genai_config.json").exists()
    assert set(verify_package(tmp_path / "out").errors) == {"batch of 3", "batch of 1"}


def test_any_module_becomes_a_package(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    program = capture(module, example_inputs=(torch.randn(2, 8),))
    write_package(program, tmp_path / "out")
    assert verify_package(tmp_path / "out").max_relative_error is not None
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_decoder_that_names_no_end_has_no_genai_config() -> None:
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    program = capture(tf.LlamaForCausalLM(config).eval())
    found, why = genai_config(program, shares_buffers=True)
    assert found is None
    assert "names a token that ends a text" in why


def test_keys_and_values_of_unlike_sizes_are_not_for_genai() -> None:
    program = program_of("llama-gqa")
    unlike = tuple(
        dataclasses.replace(value, shape=(*value.shape[:3], 4))
        if value.name == "past_key_values.1.value"
        else value
        for value in program.inputs
    )
    assert genai_config(program, shares_buffers=False)[1] == ""
    found, why = genai_config(dataclasses.replace(program, inputs=unlike), shares_buffers=False)
    assert found is None
    assert re.match(r"keys have size \d+ and values 4", why)


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_what_takes_other_inputs_is_told_why_not(name: str) -> None:
    program: Any = program_of(name)
    found, why = genai_config(program, shares_buffers=False)
    assert found is None
    assert why


# -- logits of the last token ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2", "opt"])
def test_logits_of_the_last_token_are_those_of_all(name: str) -> None:
    program: Any = program_of(name)
    last = last_only(program)
    assert last.outputs[0].shape[1] == 1
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    logits = program.outputs[0].name
    whole = program(input_ids=ids, attention_mask=mask)
    found = last(input_ids=ids, attention_mask=mask)
    for row, place in enumerate((6, 2, 6)):
        assert relative_error(whole[logits][row, place], found[logits][row, 0]) < 1e-5
    caches = {f"past{name.removeprefix('present')}" for name in found if name != logits}
    past = {n: found[n.replace("past", "present", 1)] for n in caches}
    past = {n.replace("past.", "past_key_values."): tensor for n, tensor in past.items()}
    step = {"input_ids": ids[:, :1], "attention_mask": torch.cat((mask, mask[:, :1] | 1), 1)}
    assert relative_error(program(**step, **past)[logits], last(**step, **past)[logits]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_a_package_of_last_logits_generates_the_same(target: Any, tmp_path: Path) -> None:
    program = capture(byte_llama(num_hidden_layers=1))
    found = []
    for logits in ("all", "last"):
        write_package(program, tmp_path / logits, target=target, logits=logits)  # type: ignore[arg-type]
        runner = gp.OnnxRunner(tmp_path / logits)
        runner.ends = frozenset()
        prompts = [[72, 101, 108], [7, 250, 31, 0, 5, 9]]
        found.append([row.tokens for row in runner.generate(prompts, max_new_tokens=12)])
    assert found[0] == found[1]
    shape = onnx_ir.load(tmp_path / "last" / "model.onnx").graph.outputs[0].shape
    assert shape is not None
    assert shape[1] == 1


def test_what_is_no_decoder_has_no_last_token() -> None:
    with pytest.raises(BackendError, match="for a decoder with a cache"):
        last_only(program_of("bert"))
