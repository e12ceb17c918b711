"""What all tests share: one thread, verification around every pass, captures, golden texts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from captures import remembered

from graphprune.pipeline.instruments import VerifyEach
from graphprune.pipeline.pass_base import Context
from graphprune.pipeline.pass_manager import PassManager, Result

# The models are tiny: more threads cost more than they give.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def captures_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share what was captured, except with the tests of capture itself."""
    if request.node.get_closest_marker("captures_anew") is None:
        monkeypatch.setattr("graphprune.frontend.capture.capture_transformers", remembered)


@pytest.fixture(autouse=True)
def verified(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify and audit every pass that any test runs, whether it asks for it or not."""
    if request.node.get_closest_marker("unverified") is not None:
        return
    run = PassManager.run

    def verified_run(manager: PassManager, context: Context) -> Result:
        instruments = (VerifyEach(), *manager.instruments)
        return run(dataclasses.replace(manager, instruments=instruments, audit=True), context)

    monkeypatch.setattr(PassManager, "run", verified_run)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the one kept in `tests/golden`, or rewrite that (`--update-golden`)."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text + "\n", encoding="utf-8")
        assert path.is_file(), f"{path.name} is missing: run pytest --update-golden"
        assert path.read_text(encoding="utf-8") == text + "\n"

    return compare
