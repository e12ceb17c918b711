"""Files beside a checkpoint's weights that do not depend on sizes: tokenizer, templates."""

from __future__ import annotations

import shutil
from pathlib import Path

_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*preprocessor_config.json",
    "processor_config.json",
)
"""Files of a checkpoint that do not depend on the sizes of the model."""


def copy_companions(source: Path | None, directory: Path) -> None:
    """Copy tokenizer, templates and processors of the checkpoint at `source`, if there is one."""
    if source is None:
        return
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
