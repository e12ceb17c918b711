"""A pass of another distribution is found, listed, read and run like the built-in ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from distributions import PLUGIN

from graphprune.errors import PipelineError
from graphprune.pipeline import registry
from graphprune.pipeline.pipeline import Pipeline


def test_without_the_distribution_its_pass_is_unknown() -> None:
    with pytest.raises(PipelineError, match="unknown pass 'zero-small'"):
        registry.find("zero-small")


@pytest.mark.usefixtures("plugin")
def test_with_the_distribution_its_pass_is_listed_and_read() -> None:
    assert "zero-small" in registry.names()
    pipeline = Pipeline.parse("zero-small{threshold=0.5},verify")
    assert pipeline.to_text() == "zero-small{threshold=0.5},verify"


@pytest.mark.slow
def test_pip_installs_it(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index"]
    # Built from a copy, so that no build folder is left beside the sources.
    copy = tmp_path / "source"
    subprocess.run(["cp", "-r", str(PLUGIN), str(copy)], check=True)
    subprocess.run([*pip, *alone, "--target", str(tmp_path / "site"), str(copy)], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from graphprune.pipeline.pipeline import Pipeline\n"
        "print(Pipeline.parse('zero-small{threshold=0.5}').passes)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "(ZeroSmall(threshold=0.5),)\n"
