"""A checkpoint, a text, what `run` made of them, and the command line in this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_llama import save_checkpoint
from command_line import TEXT, Done, Run

from graphprune.backends import capture_cache
from graphprune.cli import console
from graphprune.cli import main as cli

_USUAL = {"dtype": "auto", "device": None, "memory": None}
_loaded: dict[str, Any] = {}
"""Programs by directory. They are never edited, and capturing one takes most of a verb's time."""


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """The checkpoint is loaded once for all tests; what tests write is loaded as it is."""
    from graphprune.backends import load as loading

    load = loading.load

    def remember(directory: str, **options: Any) -> Any:
        if Path(directory) != checkpoint or options != _USUAL:
            return load(directory, **options)
        if directory not in _loaded:
            _loaded[directory] = load(directory, **options)
        return _loaded[directory]

    monkeypatch.setattr(loading, "load", remember)


@pytest.fixture
def graphprune(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    remembered: None,
    captures: Path,
) -> Run:
    monkeypatch.setenv(capture_cache.FOLDER, str(captures))
    monkeypatch.delenv(console.TRACEBACK, raising=False)
    for name in (
        "TRANSFORMERS_VERBOSITY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TOKENIZERS_PARALLELISM",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "1" if "HUB" in name else "error"))

    def invoke(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["graphprune", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return Done(status, *capsys.readouterr())

    return invoke


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
