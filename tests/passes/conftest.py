"""What the tests of passes share: a plugin."""

from __future__ import annotations

import pytest
from distributions import PLUGIN, plugin_passes, write_metadata


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution of `tests/plugin`, as if it were installed."""
    site = tmp_path_factory.mktemp("site")
    write_metadata(site, "example-passes", plugin_passes())
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(PLUGIN)
