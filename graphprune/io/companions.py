"""Files beside a checkpoint's weights that do not depend on sizes, such as its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from graphprune.errors import CheckpointError, first_line
from graphprune.io.whole_files import refuse_stand_in

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
"""Files that a tokenizer is made of."""

_COMPANIONS = (
    *_TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a checkpoint that do not depend on the sizes of the model."""


_NEVER_EMPTY = (".json", ".model", ".tiktoken")


def has_tokenizer(directory: Path) -> bool:
    """Return whether there is a file in `directory` that a tokenizer is made of."""
    return any(next(directory.glob(pattern), None) for pattern in _TOKENIZER)


def check_companions(source: Path) -> None:
    """Refuse files beside weights that nothing can read, so that they are not passed on.

    Raises
    ------
    CheckpointError
        Naming a file that is empty, a pointer of Git LFS, or no JSON where its name says so; a
        ``tokenizer.json`` has to hold a model of tokens.
    """
    for file in _companions(source):
        if file.stat().st_size or file.suffix in _NEVER_EMPTY:
            refuse_stand_in(file, CheckpointError)
        if file.suffix == ".json":
            try:
                held = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
            if file.name == "tokenizer.json" and not (isinstance(held, dict) and held.get("model")):
                raise CheckpointError(f"{file} is no tokenizer: it holds no model of tokens")


def copy_companions(source: Path | None, directory: Path) -> None:
    """Copy tokenizer, templates, processors and licenses of the checkpoint at `source`, if any.

    What comes after the model, as ``modules.json`` of sentence-transformers lists it, goes along:
    it takes what the model gives, whose size stays.

    Raises
    ------
    CheckpointError
        When one cannot be read, as `check_companions` says.
    """
    if source is None:
        return
    check_companions(source)
    for file in _companions(source):
        shutil.copyfile(file, directory / file.name)
    for module in _modules_after(source):
        shutil.copytree(source / module, directory / module, dirs_exist_ok=True)


def _companions(source: Path) -> Iterator[Path]:
    for pattern in _COMPANIONS:
        yield from (file for file in sorted(source.glob(pattern)) if file.is_file())


def _modules_after(source: Path) -> Iterator[str]:
    """Yield the directories of the modules that ``modules.json`` lists, where it lists any."""
    try:
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in listed]
    except (OSError, ValueError, TypeError, KeyError):
        return
    for path in paths:
        inside = Path(path).name == path  # a name, neither empty nor one that leads elsewhere
        if path and inside and (source / path).is_dir():
            yield path
