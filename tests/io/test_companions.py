"""What lies beside weights goes along with a smaller checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphprune.errors import CheckpointError
from graphprune.io.companions import copy_companions


def test_licenses_and_the_modules_after_a_model_go_along_and_weights_do_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("1_Pooling/config.json", "other/config.json", "LICENSE.txt", "tokenizer.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text('{"model": {"type": "BPE"}}')
    (source / "model.safetensors").write_text("weights")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}, {"path": "2_Gone"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "outside").mkdir()
    target.mkdir()
    copy_companions(source, target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {"1_Pooling/config.json", "LICENSE.txt", "modules.json", "tokenizer.json"}


@pytest.mark.parametrize("text", ["[1]", '{"path": 1}', "[{}]"])
def test_a_list_of_modules_that_is_none_lists_nothing(tmp_path: Path, text: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "modules.json").write_text(text)
    copy_companions(source, target)
    assert [path.name for path in target.iterdir()] == ["modules.json"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", "{", "cannot be read: Expecting property name"),
        ("tokenizer.json", "", "is empty"),
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        ("preprocessor_config.json", "size: 3", "cannot be read"),
        ("tokenizer.model", "", "is empty"),
    ],
)
def test_what_nothing_can_read_is_not_passed_on(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"^{source / name} .*{words}"):
        copy_companions(source, target)
    assert not any(target.iterdir())
