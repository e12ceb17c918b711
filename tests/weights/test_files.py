"""Mapped files, scratch files, and sizes of memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphprune.errors import CheckpointError, OutputError, UsageError
from graphprune.weights.deferred import Deferred
from graphprune.weights.files import TensorFile
from graphprune.weights.placement import device_of, memory_of
from graphprune.weights.scratch import FOLDER, spill


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6).bfloat16(), "b": torch.tensor([1.0, torch.inf])}, path)
    return path


def test_tensors_of_a_file_are_views_of_it_in_their_stored_type(file: Path) -> None:
    found = TensorFile(file).tensors()
    assert found["a"].dtype is torch.bfloat16 and isinstance(found["a"], Deferred)
    assert found["a"].made().data_ptr() == found["a"].made().data_ptr()
    assert torch.equal(found["a"], torch.arange(6).bfloat16())


def test_a_weight_that_is_not_finite_is_refused_where_it_is_used(file: Path) -> None:
    found = TensorFile(file, finite=True).tensors()
    assert torch.equal(found["a"], torch.arange(6).bfloat16())
    with pytest.raises(CheckpointError, match=f"{file.parent}: the weight b holds NaN or inf"):
        found["b"] + 1


def test_a_file_that_changes_after_it_was_opened_is_refused(file: Path) -> None:
    found = TensorFile(file).tensors()
    with file.open("r+b") as stream:
        stream.truncate(40)
    with pytest.raises(CheckpointError, match=f"{file} has changed since it was opened"):
        found["a"] + 1


def test_a_file_that_is_replaced_or_removed_is_read_as_it_was(file: Path) -> None:
    found = TensorFile(file).tensors()
    save_file({"a": torch.zeros(6).bfloat16()}, file.with_name("new"))
    file.with_name("new").replace(file)
    assert torch.equal(found["a"], torch.arange(6).bfloat16())


def test_scratch_files_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "scratch"))
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(4).bfloat16()[::2]}
    found = spill(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert isinstance(found["a"], Deferred) and found["b"].dtype is torch.bfloat16
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_process_left_when_it_was_killed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **_piped)
    left = tmp_path / f"graphprune-scratch-{ended.stdout.strip()}-abc.safetensors"
    other = tmp_path / "graphprune-scratch-notes.txt"
    for each in (left, other):
        each.write_text("")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    spill({"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == [other]


_piped = {"capture_output": True, "text": True, "check": True}


def test_a_scratch_disk_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "/dev/full")
    with pytest.raises(OutputError, match="the scratch folder /dev/full cannot be written"):
        spill({"a": torch.ones(1)})


def test_sizes_of_memory_and_devices_are_read_or_refused() -> None:
    assert memory_of("8GB") == 8 * 10**9 and memory_of("512MiB") == 2**29
    assert memory_of(5) == 5 and memory_of(None) is None and device_of(None) is None
    for wrong in ("much", "-1GB", 0, "0GB"):
        with pytest.raises(UsageError, match="is no size of memory"):
            memory_of(wrong)
    for wrong in ("cuda:99", "tpu-9"):
        with pytest.raises(UsageError, match=f"there is no device '{wrong}' here"):
            device_of(wrong)
