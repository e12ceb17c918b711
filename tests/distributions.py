"""Distributions that are installed for one test: metadata on the path, as pip would leave it."""

from __future__ import annotations

import tomllib
from pathlib import Path

PLUGIN = Path(__file__).parent / "plugin"


def write_metadata(
    site: Path, name: str, entries: dict[str, str], group: str = "graphprune.passes"
) -> None:
    """Write what makes `importlib.metadata` see a distribution that provides `entries`."""
    folder = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (folder / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))


def plugin_passes() -> dict[str, str]:
    """The entry points of the plugin under `tests/plugin`."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    return project["entry-points"]["graphprune.passes"]
