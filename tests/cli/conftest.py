"""A checkpoint, a text, what `run` made of them, and the command line in this process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from byte_llama import save_checkpoint
from command_line import TEXT, Run, command_line

from graphprune.backends import capture_cache


@pytest.fixture
def graphprune(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    captures: Path,
) -> Run:
    monkeypatch.setenv(capture_cache.FOLDER, str(captures))
    monkeypatch.delenv("COLUMNS", raising=False)
    return command_line(monkeypatch, capsys, checkpoint)


@pytest.fixture(scope="session")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where graphs that were looked at are kept."""
    return tmp_path_factory.mktemp("captures")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture(scope="session")
def smaller(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `run` wrote, in a process of its own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    passes = "prune{target=ffn ratio=0.25 criterion=taylor},verify"
    command = [sys.executable, "-m", "graphprune", "run", checkpoint, "--passes", passes]
    command += ["--calibration", folder / "text.txt", "-o", folder / "smaller"]
    done = subprocess.run(map(str, command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "smaller" in done.stdout
    return folder / "smaller"
