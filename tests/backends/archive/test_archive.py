"""Archives: what is loaded is what was saved, and damage is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from byte_llama import byte_llama, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphprune
from graphprune.backends.archive import archive
from graphprune.errors import BackendError, CheckpointError, OutputError
from graphprune.frontend.capture import capture
from graphprune.ir.program import Note, Program
from graphprune.ir.provenance import module_path, source_line

FILES = ["graph.json", "program.json", "weights.safetensors"]


class Mixed(nn.Module):
    """Weights of every kind, an operator with unused results, a change in place."""

    running: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.again = self.linear
        self.register_buffer("running", torch.tensor(3))
        self.register_buffer("scale", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.again(self.linear(x)) * self.scale + self.running
        hidden.add_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        return {"hidden": hidden, "unique": torch.unique(x), "x": x}


@pytest.fixture(scope="module")
def mixed() -> Program:
    torch.manual_seed(0)
    return capture(Mixed(), (torch.randn(2, 4),))


@pytest.fixture(scope="module")
def llama() -> Program:
    return capture(byte_llama(num_hidden_layers=1))


@pytest.fixture
def saved(mixed: Program, tmp_path: Path) -> Path:
    mixed.save(tmp_path / "archive")
    return tmp_path / "archive"


def assert_equal(loaded: Program, program: Program, **inputs: Tensor) -> None:
    assert loaded.fingerprint() == program.fingerprint()
    assert loaded.inputs == program.inputs
    assert loaded.outputs == program.outputs
    assert dict(loaded.kinds) == dict(program.kinds)
    assert list(loaded.weights) == list(program.weights)
    assert dict(loaded.aliases) == dict(program.aliases)
    assert loaded.notes == program.notes
    assert {str(k): v for k, v in loaded.ranges.items()} == {
        str(k): v for k, v in program.ranges.items()
    }
    ours, theirs = program(**inputs), loaded(**inputs)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for before, after in zip(program.graph.nodes, loaded.graph.nodes, strict=True):
        assert after.name == before.name
        assert (after.op, after.target) == (before.op, before.target)
        assert str((after.args, after.kwargs)) == str((before.args, before.kwargs))
        assert module_path(after) == module_path(before)
        assert source_line(after) == source_line(before)
        if isinstance(before.meta.get("val"), Tensor):
            assert str(after.meta["val"].shape) == str(before.meta["val"].shape)


def test_any_module_comes_back_equal(mixed: Program, saved: Path) -> None:
    assert set(mixed.kinds.values()) == {"parameter", "buffer", "derived", "constant"}
    loaded = archive.load(saved)
    assert_equal(loaded, mixed, x=torch.randn(5, 4))
    assert loaded.source is None
    assert sorted(entry.name for entry in saved.iterdir()) == FILES


def test_a_decoder_comes_back_whole_without_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    program = graphprune.load(checkpoint)
    program.save(tmp_path / "archive")
    for entry in checkpoint.iterdir():
        entry.unlink()
    loaded = graphprune.load(tmp_path / "archive")
    assert_equal(loaded, program, input_ids=torch.randint(0, 256, (3, 6)))
    assert loaded.kv_bytes_per_token() == program.kv_bytes_per_token()
    assert program.source is not None
    assert loaded.source is not None
    assert loaded.source.model_class is program.source.model_class
    assert loaded.source.config.to_dict() == program.source.config.to_dict()
    assert loaded.source.stored_dtype == program.source.stored_dtype
    assert loaded.source.directory == tmp_path / "archive"
    assert (tmp_path / "archive" / "tokenizer.json").is_file()

    before, after = graphprune.analyze(program), graphprune.analyze(loaded)
    assert before.groups
    assert after.to_json() == before.to_json()

    report = loaded.export_onnx(tmp_path / "model.onnx")
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5

    loaded.save(tmp_path / "again")
    assert_equal(archive.load(tmp_path / "again"), program, input_ids=torch.zeros(1, 2).long())


def test_views_of_one_storage_are_saved_apart(mixed: Program, tmp_path: Path) -> None:
    both = torch.randn(4, 8)
    sliced = mixed.with_weights({"linear.weight": both[:, :4], "linear.bias": both[0, 4:]})
    sliced.save(tmp_path / "archive")
    assert_equal(archive.load(tmp_path / "archive"), sliced, x=torch.randn(3, 4))


def test_notes_keep_their_kinds_and_old_ones_are_read(llama: Program, tmp_path: Path) -> None:
    noted = dataclasses.replace(llama, notes=(Note("fixed-size", "at 7"),))
    noted.save(tmp_path / "archive")
    assert archive.load(tmp_path / "archive").notes == noted.notes
    path = tmp_path / "archive" / "program.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "notes": ["as it once was"]}))
    assert archive.load(tmp_path / "archive").notes == (Note("", "as it once was"),)


def test_an_unknown_source_leaves_a_note(llama: Program, tmp_path: Path) -> None:
    llama.save(tmp_path / "archive")
    path = tmp_path / "archive" / "program.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "LlamaOfTomorrow"))
    loaded = archive.load(tmp_path / "archive")
    assert loaded.source is None
    assert "LlamaOfTomorrow" in loaded.notes[-1].text
    ids = torch.arange(4)[None]
    assert torch.equal(loaded(input_ids=ids)["logits"], llama(input_ids=ids)["logits"])


def test_a_source_outside_transformers_is_not_imported(llama: Program, tmp_path: Path) -> None:
    llama.save(tmp_path / "archive")
    path = tmp_path / "archive" / "program.json"
    described = json.loads(path.read_text())
    described["source"]["config_class"] = "antigravity:Config"
    path.write_text(json.dumps(described))
    loaded = archive.load(tmp_path / "archive")
    assert loaded.source is None
    assert "antigravity is not part of transformers" in loaded.notes[-1].text


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        archive.load(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_a_truncated_file_is_named(saved: Path, name: str, part: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError) as caught:
        archive.load(saved)
    assert str(saved / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 3}', "\x00\x01", "null"])
def test_a_foreign_file_is_named(saved: Path, name: str, text: str) -> None:
    (saved / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        archive.load(saved)
    assert str(saved / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_two_archives_do_not_mix(saved: Path, tmp_path: Path) -> None:
    other = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    other.save(tmp_path / "other")
    weights = saved / "weights.safetensors"
    before = load_file(weights)
    save_file({**before, "linear.bias": torch.zeros(7)}, weights)
    with pytest.raises(
        CheckpointError, match=r"linear.bias is \(7,\), where the graph wants \(4,\)"
    ):
        archive.load(saved)
    save_file({name: t for name, t in before.items() if name != "linear.bias"}, weights)
    with pytest.raises(CheckpointError, match=r"has no tensor 'linear.bias'"):
        archive.load(saved)
    save_file(before, weights)
    archive.load(saved)
    (saved / "graph.json").write_bytes((tmp_path / "other" / "graph.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"graph\.json is not the graph that"):
        archive.load(saved)


def test_an_archive_of_another_version_is_refused(saved: Path) -> None:
    path = saved / "program.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(CheckpointError, match="version 99, and this release reads 1"):
        archive.load(saved)


@pytest.mark.parametrize("code", ["__import__('os').getcwd()", "(getattr)(1, 'real')"])
def test_sizes_are_not_run_as_code(saved: Path, code: str) -> None:
    path = saved / "graph.json"
    graph = json.loads(path.read_text())
    pending, changed = [graph], 0
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "expr_str" in item:
                item["expr_str"], changed = code, changed + 1
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    assert changed
    path.write_text(json.dumps(graph))
    described = json.loads((saved / "program.json").read_text())
    described["graph_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (saved / "program.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"graph\.json is damaged: .* in the size"):
        archive.load(saved)


def test_only_archives_are_taken_for_one(saved: Path, tmp_path: Path) -> None:
    assert archive.is_archive(saved)
    assert not archive.is_archive(tmp_path)
    assert not archive.is_archive(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="holds no archive"):
        archive.load(tmp_path)


def test_a_full_directory_and_a_program_without_weights_are_refused(
    mixed: Program, saved: Path, tmp_path: Path
) -> None:
    before = (saved / "program.json").read_bytes()
    with pytest.raises(OutputError, match="not empty"):
        mixed.save(saved)
    assert (saved / "program.json").read_bytes() == before
    with torch.device("meta"):
        program = capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    with pytest.raises(BackendError, match="on the meta device"):
        program.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [RuntimeError("full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    mixed: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("graphprune.backends.archive.archive.write_file", fail)
    with pytest.raises(type(error)):
        mixed.save(tmp_path / "a" / "archive")
    assert list(tmp_path.iterdir()) == []
