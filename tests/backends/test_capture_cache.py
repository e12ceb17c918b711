"""A graph that was kept is the one that capture gives, and is never used for anything else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import model_of
from byte_llama import save_checkpoint

import graphprune as gp
from graphprune.backends import capture_cache, load
from graphprune.backends.load import look
from graphprune.errors import CheckpointError
from graphprune.report.overview import overview_json


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "llama"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(capture_cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse(*_: Any) -> Any:
    raise AssertionError("it is captured again")


def test_the_second_look_captures_nothing_and_sees_the_same(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = look(checkpoint)
    monkeypatch.setattr(load, "read_structure", refuse)
    second, whole = look(checkpoint), gp.load(checkpoint)
    assert all(weight.is_meta for weight in second.weights.values())
    assert first.stand_ins == second.stand_ins
    assert repr(first) == repr(second)
    seen = [overview_json(gp.analyze(program)) for program in (first, second, whole)]
    assert seen[0] == seen[1] == seen[2]
    weight = "model.layers.0.mlp.up_proj.weight"
    told = [gp.analyze(program).explain(weight, 0) for program in (first, second, whole)]
    assert told[0] == told[1] == told[2]
    assert second.context_length == whole.context_length
    with pytest.raises(AssertionError, match="captured again"):
        look(checkpoint, cache=False)


def test_the_graph_of_an_encoder_is_kept_with_its_dynamic_sizes(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "bert"
    model_of("bert").save_pretrained(saved)
    first = look(saved)
    monkeypatch.setattr(load, "read_structure", refuse)
    second = look(saved)
    assert all(weight.is_meta for weight in second.weights.values())
    assert repr(first) == repr(second)
    assert "s" in str(second.inputs[0].shape)
    assert {str(k): str(v) for k, v in first.ranges.items()} == {
        str(k): str(v) for k, v in second.ranges.items()
    }
    seen = [overview_json(gp.analyze(program)) for program in (first, second)]
    assert seen[0] == seen[1]
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    told = [gp.analyze(program).explain(weight, 0) for program in (first, second)]
    assert told[0] == told[1]


def test_reading_a_kept_graph_loads_neither_compiler_nor_transformers(
    checkpoint: Path, folder: Path
) -> None:
    look(checkpoint)
    code = (
        "import sys, pathlib; from graphprune.backends.load import look;"
        "import graphprune.analysis.coupling as coupling;"
        f"coupling.analyze(look(pathlib.Path({str(checkpoint)!r})));"
        "print([name for name in ('torch._dynamo', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_is_applied_to_a_kept_graph_as_to_the_model(checkpoint: Path, folder: Path) -> None:
    whole = gp.load(checkpoint)
    result = gp.Pipeline.parse(
        "prune{target=ffn,kv-heads ratio=0.5 criterion=l2},merge-kv-heads{groups=1}"
    ).run(whole)
    look(checkpoint)
    after = gp.apply(look(checkpoint), result.plan)
    sizes = {name: weight.shape for name, weight in result.program.weights.items()}
    assert {name: weight.shape for name, weight in after.weights.items()} == sizes


def test_whatever_a_graph_follows_from_is_in_its_name(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [capture_cache.cache_file(checkpoint)]
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    names.append(capture_cache.cache_file(checkpoint))
    (checkpoint / "modeling.py").write_text("# code")
    names.append(capture_cache.cache_file(checkpoint))
    code = folder.parent / "modeling_llama.py"
    code.write_text("# another release of the model")
    monkeypatch.setattr(capture_cache, "_model_code", lambda _: [code])
    names.append(capture_cache.cache_file(checkpoint))
    monkeypatch.setattr(capture_cache.metadata, "version", lambda _: "9.9")
    capture_cache._environment.cache_clear()
    names.append(capture_cache.cache_file(checkpoint))
    capture_cache._environment.cache_clear()
    assert None not in names
    assert len(set(names)) == 5
    assert capture_cache._model_code("llama") == [code]


def test_the_code_of_the_model_is_found_without_importing_it() -> None:
    names = {path.name for path in capture_cache._model_code("llama")}
    assert {"modeling_llama.py", "configuration_llama.py", "masking_utils.py"} <= names


@pytest.mark.parametrize("damage", ["", "{}", "cut", "graph", "weights"])
def test_a_damaged_file_is_as_good_as_none(checkpoint: Path, folder: Path, damage: str) -> None:
    expected = look(checkpoint).fingerprint()
    (file,) = folder.iterdir()
    whole = file.read_text()
    kept = json.loads(whole)
    if damage == "graph":
        kept["graph"] = kept["graph"].replace("aten.mul", "aten.add")
    elif damage == "weights":
        kept["weights"][0][2][0] += 1
    cut = {"cut": whole[: len(whole) // 2], "": "", "{}": "{}"}
    file.write_text(cut.get(damage, json.dumps(kept)))
    assert capture_cache.read_capture(file, checkpoint) is None
    assert look(checkpoint).fingerprint() == expected
    assert file.read_text() == whole


def test_nothing_is_kept_where_nothing_is_to_be(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(capture_cache.FOLDER, "")
    assert capture_cache.cache_file(checkpoint) is None
    monkeypatch.setenv(capture_cache.FOLDER, str(checkpoint / "config.json" / "below"))
    assert look(checkpoint).weights  # a folder that cannot be made is no reason to fail


def test_a_checkpoint_that_is_cut_short_is_refused_all_the_same(
    checkpoint: Path, folder: Path
) -> None:
    look(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        look(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        look(checkpoint)
