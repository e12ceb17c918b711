"""What all tests share: one thread, verification around every pass, captures, golden texts."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import captures
import pytest
import torch
from cpu_time import pytest_runtest_makereport as pytest_runtest_makereport
from cpu_time import pytest_runtest_setup as pytest_runtest_setup
from cpu_time import pytest_terminal_summary as pytest_terminal_summary

from graphprune.pipeline.instruments import PassPosition, VerifyEach
from graphprune.pipeline.pass_base import Context, Outcome
from graphprune.pipeline.pass_manager import PassManager, Result

os.environ["GRAPHPRUNE_CACHE"] = ""  # graphs that an earlier run kept are not looked at
# The models are tiny: more threads cost more than they give.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


ENTRIES = (
    "graphprune.frontend.capture.capture_transformers",
    "graphprune.backends.huggingface.read.capture_transformers",
)

run_passes = PassManager.run


@dataclasses.dataclass(frozen=True)
class VerifyUnverified(VerifyEach):
    """Verify after every pass, but where the pipeline itself does so next."""

    def after_pass(self, position: PassPosition, outcome: Outcome, context: Context) -> None:
        following = position.pipeline[position.number : position.number + 1]
        if [str(each) for each in following] != ["verify"]:
            super().after_pass(position, outcome, context)


def run_verified(manager: PassManager, context: Context) -> Result:
    """Run the passes of `manager` and verify and audit each, whether that was asked for or not.

    A program with numbers for its dynamic sizes is not run.
    """
    if context.original.stand_ins:
        return run_passes(dataclasses.replace(manager, audit=True), context)
    instruments = (VerifyUnverified(), *manager.instruments)
    return run_passes(dataclasses.replace(manager, instruments=instruments, audit=True), context)


@pytest.fixture(autouse=True, scope="session")
def shared_and_verified() -> Iterator[None]:
    """Share what is captured between tests, and verify every pass that any of them runs."""
    with pytest.MonkeyPatch.context() as patch:
        for entry in ENTRIES:
            patch.setattr(entry, captures.remembered)
        patch.setattr(PassManager, "run", run_verified)
        yield


@pytest.fixture(autouse=True)
def as_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take either back for tests of that itself."""
    if request.node.get_closest_marker("captures_anew"):
        for entry in ENTRIES:
            monkeypatch.setattr(entry, captures.capture_transformers)
    if request.node.get_closest_marker("unverified"):
        monkeypatch.setattr(PassManager, "run", run_passes)


@pytest.fixture(autouse=True, scope="session")
def seeds_of_what_is_there() -> Iterator[None]:
    """Seed the processor alone where there is nothing else.

    Torch keeps a formatted stack for every kind of device that may still be started.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.accelerator.is_available():
            patch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        yield


gc.disable()  # imports leave hardly any garbage


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later collection of garbage, and collect it rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()


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
