"""The longest text of an ONNX package, and the tokens that end one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphprune.errors import CheckpointError, first_line
from graphprune.ir.provenance import declared_length


def limits_of(directory: Path) -> tuple[int | None, frozenset[int]]:
    """Return how many tokens a text may have, if a config says so, and the tokens that end one.

    ``genai_config.json`` is asked first, then ``generation_config.json`` and ``config.json``.

    Raises
    ------
    CheckpointError
        When one of these is no JSON object.
    """
    model = read_json(directory / "genai_config.json").get("model", {})
    generation = read_json(directory / "generation_config.json")
    config = read_json(directory / "config.json")
    text = config.get("text_config") or {}
    written = model.get("context_length")
    context = written if isinstance(written, int) else declared_length(text, config)
    given = (place.get("eos_token_id") for place in (model, generation, config, text))
    ends: Any = next((each for each in given if each is not None), [])
    return context, frozenset(ends if isinstance(ends, list) else [ends])


def read_json(path: Path) -> dict[str, Any]:
    """Return what the JSON file at `path` holds; nothing where there is none.

    Raises
    ------
    CheckpointError
        When it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
