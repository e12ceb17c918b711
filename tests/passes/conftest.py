"""What the tests of passes share: a plugin, and verification around every pass."""

from __future__ import annotations

import dataclasses

import pytest
from distributions import PLUGIN, plugin_passes, write_metadata

from graphprune.pipeline.instruments import VerifyEach
from graphprune.pipeline.pass_base import Context
from graphprune.pipeline.pass_manager import PassManager, Result


@pytest.fixture(autouse=True)
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify and audit every pass that any test here runs, whether it asks for it or not."""
    run = PassManager.run

    def verified_run(manager: PassManager, context: Context) -> Result:
        instruments = (VerifyEach(), *manager.instruments)
        return run(dataclasses.replace(manager, instruments=instruments, audit=True), context)

    monkeypatch.setattr(PassManager, "run", verified_run)


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution of `tests/plugin`, as if it were installed."""
    site = tmp_path_factory.mktemp("site")
    write_metadata(site, "example-passes", plugin_passes())
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(PLUGIN)
