"""How calibration data was drawn, as `Calibration.describe` tells it, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def drawn_text(told: Mapping[str, Any]) -> str:
    """Say in a few words what `told` says; older files hold the digest alone.

    Examples
    --------
    >>> told = {"samples": 10, "length": 64, "first tokens": [1], "sha256": "0f" * 32}
    >>> drawn_text({**told, "source": "code.txt"})
    '10 windows of 64 tokens of code.txt, beginning with 1, digest 0f0f0f0f0f0f'
    """
    words = [f"digest {told['sha256'][:12]}"] if told.get("sha256") else []
    if told.get("tokenizer"):
        words.insert(0, f"tokenizer {told['tokenizer']}")
    if told.get("first tokens"):
        words.insert(0, f"beginning with {', '.join(map(str, told['first tokens']))}")
    if told.get("length") is not None:
        source = f" of {told['source']}" if told.get("source") else ""
        words.insert(0, f"{told['samples']} windows of {told['length']} tokens{source}")
    elif told.get("samples") is not None:
        words.insert(0, f"{told['samples']} samples")
    return ", ".join(words)
