"""Names of the runtimes that a program can be made for."""

from __future__ import annotations

from typing import Literal

Runtime = Literal["portable", "cpu", "cuda", "tensorrt"]
"""What a program is to run on; "portable" is any of the others."""

RUNTIMES: tuple[Runtime, ...] = ("cpu", "cuda", "tensorrt")
"""The runtimes that facts are known of."""
