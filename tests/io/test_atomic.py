"""Outputs are complete or absent."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphprune.errors import GraphPruneError, OutputError
from graphprune.io.atomic import staged_directory, staged_file

Stage = Callable[[Path], AbstractContextManager[Path]]


def everything(folder: Path) -> list[str]:
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    with staged_directory(target) as staged:
        assert not target.exists()
        assert staged.parent == target.parent
        assert staged.name.startswith(".")
        (staged / "file").write_text("x")
        (staged / "sub").mkdir()
        (staged / "sub" / "file").write_text("y")
    assert everything(tmp_path) == [
        "a",
        "a/b",
        "a/b/out",
        "a/b/out/file",
        "a/b/out/sub",
        "a/b/out/sub/file",
    ]
    assert target.stat().st_mode == target.parent.stat().st_mode


def test_an_empty_directory_is_filled_and_stays_the_same_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    before = target.stat().st_ino
    with staged_directory(target) as staged:
        (staged / "file").write_text("x")
        assert not (target / "file").exists()
    assert everything(tmp_path) == ["out", "out/file"]
    assert target.stat().st_ino == before


def test_the_current_directory_can_be_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with staged_directory(".") as staged:
        (staged / "file").write_text("x")
    assert os.listdir(".") == ["file"]


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_no_trace_of_a_directory(
    tmp_path: Path, error: type[BaseException], existed: bool
) -> None:
    if existed:
        (tmp_path / "a").mkdir()
    before = everything(tmp_path)
    target = tmp_path / "a" if existed else tmp_path / "a" / "b" / "out"
    with pytest.raises(error), staged_directory(target) as staged:
        (staged / "half").write_text("x")
        raise error
    assert everything(tmp_path) == before


def test_a_file_appears_when_it_is_complete_with_what_lies_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with staged_file(target) as staged:
        assert staged.name == target.name
        staged.write_text("x")
        staged.with_name("model.onnx.data").write_text("y")
        assert not target.exists()
    assert everything(tmp_path) == ["model.onnx", "model.onnx.data"]


def test_a_folder_is_made_for_a_file_and_goes_with_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file"
    with pytest.raises(ValueError), staged_file(target) as staged:
        staged.write_text("half")
        raise ValueError
    assert everything(tmp_path) == []
    with staged_file(target) as staged:
        staged.write_text("x")
    assert everything(tmp_path) == ["a", "a/b", "a/b/file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_a_file_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error), staged_file(target, overwrite=True) as staged:
        staged.write_text("half")
        raise error
    assert everything(tmp_path) == ["file"]
    assert target.read_text() == "old"


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(OutputError, match="file exists already"), staged_file(target):
        pytest.fail("must not be entered")
    with staged_file(target, overwrite=True) as staged:
        staged.write_text("new")
    assert target.read_text() == "new"


def test_what_lies_beside_a_file_is_not_replaced_either(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_text("old")
    with (
        pytest.raises(OutputError, match=r"model.onnx.data exists already"),
        staged_file(tmp_path / "model.onnx") as staged,
    ):
        staged.write_text("x")
        staged.with_name("model.onnx.data").write_text("y")
    assert everything(tmp_path) == ["model.onnx.data"]
    assert (tmp_path / "model.onnx.data").read_text() == "old"


def test_a_file_that_nobody_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nothing was written"), staged_file(tmp_path / "file"):
        pass
    assert everything(tmp_path) == []


@pytest.mark.parametrize("stage", [staged_directory, staged_file])
def test_a_parent_that_is_a_file_is_refused(tmp_path: Path, stage: Stage) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "out", tmp_path / "file" / "sub" / "out"):
        with pytest.raises(OutputError) as caught, stage(target):
            pytest.fail("must not be entered")
        assert str(target) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert everything(tmp_path) == ["file"]


def test_places_that_are_taken_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    before = everything(tmp_path)
    refused: list[tuple[Stage, Path, str]] = [
        (staged_directory, tmp_path / "full", "not empty"),
        (staged_directory, tmp_path / "full" / "file", "is a file"),
        (staged_file, tmp_path / "full", "is a directory"),
    ]
    for stage, target, why in refused:
        with pytest.raises(OutputError, match=why), stage(target):
            pytest.fail("must not be entered")
    assert everything(tmp_path) == before


def test_a_directory_that_was_taken_meanwhile_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="out cannot be written"),
        staged_directory(target) as staged,
    ):
        (staged / "mine").write_text("x")
        target.mkdir()
        (target / "theirs").write_text("y")
    assert everything(tmp_path) == ["out", "out/theirs"]


@pytest.mark.parametrize("stage", [staged_directory, staged_file])
def test_a_full_disk_is_one_line_and_other_errors_pass(tmp_path: Path, stage: Stage) -> None:
    with pytest.raises(OutputError, match="No space left"), stage(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), stage(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "no such file", "input")
    assert everything(tmp_path) == []
    assert issubclass(OutputError, GraphPruneError)


@pytest.mark.parametrize("write", [torch.save, lambda held, path: save_file({"a": held}, path)])
def test_a_disk_that_is_full_for_a_writer_of_another_language_is_one_line(
    tmp_path: Path, write: Callable[[torch.Tensor, Path], None]
) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OutputError, match="out cannot be written: File too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, most[1]))
        try:
            with staged_file(tmp_path / "out") as staged:
                write(torch.zeros(1 << 15), staged)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
    with pytest.raises(RuntimeError, match="another reason"), staged_file(tmp_path / "out"):
        raise RuntimeError("another reason")
    assert everything(tmp_path) == []


def test_torch_is_not_imported() -> None:
    code = "import sys, graphprune.io.atomic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_killed_process_left_of_the_same_work_is_there_again(tmp_path: Path) -> None:
    left = tmp_path / ".out.some-key.partial"
    left.mkdir()
    (left / "shard").write_text("whole")
    with staged_directory(tmp_path / "out", key="another") as staged:
        assert list(staged.iterdir()) == []
        (staged / "file").write_text("")
    (tmp_path / "out/file").unlink()
    (tmp_path / "out").rmdir()
    with staged_directory(tmp_path / "out", key="some-key") as staged:
        assert (staged / "shard").read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
