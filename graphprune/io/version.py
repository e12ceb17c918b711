"""The version of this release, which files that are written carry."""

from __future__ import annotations

__version__ = "0.1.0"
