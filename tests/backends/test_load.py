"""Loading: what a checkpoint must be, and the one line that says what it is not."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import build, relative_error
from byte_llama import byte_llama, save_checkpoint
from safetensors.torch import load_file, save_file

from graphprune.backends.huggingface.read import _left_in_files, _loaded
from graphprune.backends.huggingface.save import save_pretrained
from graphprune.backends.load import load, load_unrun, look
from graphprune.errors import CheckpointError, UsageError
from graphprune.ir.program import Program
from graphprune.weights.deferred import Deferred
from graphprune.weights.models import leave_zeros, stored_weights, values_lent


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint")


def _digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def _refused(directory: Path | str, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def _edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_loads_and_leaves_the_directory_as_it_was(checkpoint: Path) -> None:
    before = _digests(checkpoint)
    program = load(checkpoint)
    assert _digests(checkpoint) == before
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = byte_llama()(input_ids=ids).logits
    assert torch.allclose(program(input_ids=ids)["logits"], expected, atol=1e-5)
    assert program.source is not None
    assert program.source.directory == checkpoint
    assert program.source.stored_dtype is torch.float32
    assert program.source.model_class.__name__ == "LlamaForCausalLM"


def test_dtype_is_what_it_computes_in(checkpoint: Path) -> None:
    program = load(checkpoint, dtype="bfloat16", cache=False)
    assert program.weight("lm_head.weight").dtype is torch.bfloat16
    same = load(checkpoint, dtype=torch.bfloat16, cache=False)
    assert same.weight("lm_head.weight").dtype is torch.bfloat16
    assert not program.is_decoder
    with pytest.raises(CheckpointError, match="'floaty'"):
        load(checkpoint, dtype="floaty")


def _in_half(checkpoint: Path) -> Path:
    weights = load_file(checkpoint / "model.safetensors")
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(half, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def test_weights_keep_their_stored_type_and_arithmetic_is_in_float32(checkpoint: Path) -> None:
    _in_half(checkpoint)
    program, wide = load(checkpoint, cache=False), load(checkpoint, dtype="float32", cache=False)
    assert program.weight("lm_head.weight").dtype is torch.bfloat16
    assert wide.weight("lm_head.weight").dtype is torch.float32
    ids = torch.arange(12).reshape(2, 6)
    logits = program(input_ids=ids)["logits"]
    assert logits.dtype is torch.float32
    assert torch.equal(logits, wide(input_ids=ids)["logits"])


def test_a_memory_limit_is_at_least_a_weight(checkpoint: Path) -> None:
    program = load(checkpoint, memory="1MB", cache=False)
    assert program.placement.memory == 1_000_000
    assert isinstance(program.weights["lm_head.weight"], Deferred)
    with pytest.raises(UsageError, match=r"1,000 bytes is too low: .* alone takes 32,768"):
        load(checkpoint, memory=1000, cache=False)
    with pytest.raises(UsageError, match="there is no device 'cuda:99' here"):
        load(checkpoint, device="cuda:99")


def test_with_a_limit_a_value_that_is_no_number_is_refused_when_it_is_used(
    checkpoint: Path,
) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    program = load(checkpoint, memory="1MB", cache=False)
    with pytest.raises(CheckpointError, match=r"the weight model\.norm\.weight holds NaN"):
        program(input_ids=torch.arange(4).view(1, 4))


@pytest.mark.parametrize("name", ["llama-mha", "gemma3", "gpt2", "mixtral", "bert", "t5", "resnet"])
def test_weights_left_in_files_are_those_that_transformers_loads(name: str, tmp_path: Path) -> None:
    model = build(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    with _left_in_files():
        lazy, info = _loaded(tmp_path, model.config, type(model), torch.float32)
    leave_zeros(lazy)
    eager, expected = _loaded(tmp_path, model.config, type(model), torch.float32)
    assert info == expected
    stored = stored_weights(lazy)
    assert stored.keys() == eager.state_dict().keys()
    with values_lent(lazy):
        found = dict(lazy.named_buffers()) | lazy.state_dict()
    for own, weight in (dict(eager.named_buffers()) | eager.state_dict()).items():
        assert torch.equal(found[own], weight), own
        assert own not in stored or stored[own].dtype in (torch.bfloat16, torch.int64)
    ties = [n for n, p in lazy.named_parameters()]
    assert ties == [n for n, p in eager.named_parameters()]


def test_reads_what_program_save_wrote(checkpoint: Path, tmp_path: Path) -> None:
    program = load(checkpoint)
    program.save(tmp_path / "archive")
    again = load(tmp_path / "archive")
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(again(input_ids=ids)["logits"], program(input_ids=ids)["logits"])


def test_a_missing_directory(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "nowhere")
    _refused("./no/such/place", "there is no directory ./no/such/place")


def test_a_name_of_the_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no network\nno more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    _refused("someone/some-model", "someone/some-model", "no network")


def test_a_file(checkpoint: Path) -> None:
    _refused(checkpoint / "config.json", "is a file")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    _refused(checkpoint, "config.json")


def test_a_malformed_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    _refused(checkpoint, "config.json cannot be read")


def test_an_invalid_config(checkpoint: Path) -> None:
    _edit(checkpoint, num_attention_heads=5)
    _refused(checkpoint, "config.json is no valid config", "multiple of the number of attention")


@pytest.mark.parametrize("read", [load, load_unrun, look])
def test_weights_that_the_config_has_no_place_for_are_said(
    checkpoint: Path, read: Callable[[Path], Program]
) -> None:
    assert not any(note.kind == "unread-weights" for note in read(checkpoint).notes)
    _edit(checkpoint, num_hidden_layers=1)
    (text,) = [note.text for note in read(checkpoint).notes if note.kind == "unread-weights"]
    assert text.startswith("its files hold 9 weights that its config has no place for, such as")
    assert "model.layers.1.input_layernorm.weight" in text


@pytest.mark.parametrize("read", [load, look])
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_hidden_layers", -1, "num_hidden_layers is -1, not a number from 1 on"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0, not a number from 1 on"),
        ("num_hidden_layers", 3, "lacks the weight model.layers.2."),
        ("hidden_size", 0, "hidden_size is 0, not a number from 1 on"),
        ("vocab_size", -64, "vocab_size is -64, not a number from 1 on"),
        ("num_attention_heads", 0, "(num_attention_heads is 0)"),
        ("num_key_value_heads", 0, "(num_key_value_heads is 0)"),
        ("intermediate_size", -1, "(intermediate_size is -1)"),
        ("intermediate_size", 0, "its config makes it ("),
        ("hidden_size", "32", "expected int, got str"),
    ],
)
def test_sizes_that_no_model_has(
    checkpoint: Path,
    field: str,
    value: object,
    words: str,
    read: Callable[[Path], Program],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", "")
    _edit(checkpoint, **{field: value})
    with pytest.raises(CheckpointError) as caught:
        read(checkpoint)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_type(checkpoint: Path) -> None:
    _edit(checkpoint, model_type="lama")
    _refused(checkpoint, "config.json", "does not know the model type 'lama'")


def test_an_unknown_architecture_falls_back_to_its_type(checkpoint: Path) -> None:
    _edit(checkpoint, architectures=None)
    assert "lm_head.weight" in load(checkpoint).weights


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    _refused(checkpoint, "holds no model.safetensors")


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_truncated_file(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    _refused(checkpoint, "model.safetensors", "cut short")


def _pickled(checkpoint: Path) -> Path:
    file = checkpoint / "pytorch_model.bin"
    torch.save(load_file(checkpoint / "model.safetensors"), file)
    (checkpoint / "model.safetensors").unlink()
    return file


@pytest.mark.parametrize("read", [load, look])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: whole[: len(whole) // 2], "is cut short or damaged"),
        (lambda whole: whole[:-10], "is cut short or damaged"),
        (lambda whole: b"hello", "is cut short or damaged"),
        (lambda whole: pickle.dumps([1, 2]), "holds other things than tensors"),
        (lambda whole: _saved([torch.ones(2)]), "holds no tensors by name, but a list"),
        (lambda whole: _saved({"step": 3}), "holds no tensors by name: 'step' is a int"),
        (lambda whole: _POINTER, "is a pointer of Git LFS"),
    ],
)
def test_a_pickle_that_holds_no_weights(
    checkpoint: Path, content: Callable[[bytes], bytes], words: str, read: Callable[[Path], Program]
) -> None:
    file = _pickled(checkpoint)
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"^{file} .*{words}"):
        read(checkpoint)


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"


def _saved(held: object) -> bytes:
    stream = io.BytesIO()
    torch.save(held, stream)
    return stream.getvalue()


def test_a_pickle_is_read_and_keeps_its_type(checkpoint: Path, tmp_path: Path) -> None:
    _pickled(_in_half(checkpoint))
    program = load(checkpoint, cache=False)
    assert program.source is not None
    assert program.source.stored_dtype is torch.bfloat16
    save_pretrained(program, tmp_path / "out")
    assert {w.dtype for w in load_file(tmp_path / "out/model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "is a pointer of Git LFS"),
        ("config.json", "is a pointer of Git LFS"),
        ("model.safetensors.index.json", "is a pointer of Git LFS"),
    ],
)
def test_a_pointer_in_the_place_of_a_file(checkpoint: Path, name: str, words: str) -> None:
    if name.endswith("index.json"):
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(_POINTER)
    _refused(checkpoint, f"{checkpoint / name} {words}")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    _refused(tmp_path, "holds an adapter and no model", "merge_and_unload")


def test_a_damaged_header(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\xfe\x00\x01"
    file.write_bytes(bytes(content))
    _refused(checkpoint, "model.safetensors has no readable safetensors header")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number(checkpoint: Path, value: float) -> None:
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, file, metadata={"format": "pt"})
    _refused(checkpoint, str(checkpoint), "model.layers.1.mlp.up_proj.weight", "NaN or infinity")


def test_missing_weights_are_never_made_up(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"], weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    _refused(checkpoint, "lacks the weight lm_head.weight and 1 more")


def test_weights_of_another_size(checkpoint: Path) -> None:
    _edit(checkpoint, intermediate_size=40)
    _refused(checkpoint, "the weight ", " its config makes it (")


def test_shards(checkpoint: Path, tmp_path: Path) -> None:
    byte_llama().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    assert load(tmp_path / "shards").parameter_count() == load(checkpoint).parameter_count()
    files[0].unlink()
    _refused(tmp_path / "shards", files[0].name, "is missing")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    _refused(tmp_path / "shards", "index.json has no weight_map of names to files")


def test_foreign_code_is_not_run(checkpoint: Path) -> None:
    (checkpoint / "modeling_odd.py").write_text("raise SystemExit('it ran')")
    auto = {"AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    _edit(checkpoint, architectures=["OddForCausalLM"], auto_map=auto)
    _refused(checkpoint, "OddForCausalLM", "not run")


def test_our_modeling_file_is_not_run_once_edited(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from graphprune.backends.huggingface.layers.modeling_file import FILE, pruned_class
    from graphprune.frontend.capture import capture

    config = byte_llama().config
    config.graphprune = {"layers": {"model.layers.0": {"intermediate_size": 40}}}
    torch.manual_seed(0)
    save_pretrained(capture(pruned_class(LlamaForCausalLM)(config).eval()), tmp_path / "uneven")
    assert load(tmp_path / "uneven").weight("model.layers.0.mlp.up_proj.weight").shape == (40, 32)
    with (tmp_path / "uneven" / FILE).open("a") as stream:
        stream.write("raise SystemExit('it ran')\n")
    _refused(tmp_path / "uneven", FILE, "not run")


@pytest.mark.captures_anew
def test_an_encoder_from_a_directory_takes_types_of_tokens(tmp_path: Path) -> None:
    """Its weights lie in files, so that what types do must be tried with what is stored."""
    model = build("bert")
    model.save_pretrained(tmp_path)
    pair = {
        "input_ids": torch.tensor([[1, 5, 7, 2, 9, 3]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]]),
        "attention_mask": torch.ones((1, 6), dtype=torch.int64),
    }
    with torch.no_grad():
        expected = model(**pair).logits
    assert relative_error(load(tmp_path)(**pair)["logits"], expected) < 1e-5
