"""A checkpoint of fewer tokens: weights, tokenizer files, and the ids in its configs."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from graphprune.backends.huggingface.save import write_into
from graphprune.errors import CheckpointError, UsageError, VerificationError, nearest
from graphprune.io.atomic import staged_directory
from graphprune.io.text_sources import read_documents
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.program import PRESENT, Program
from graphprune.ir.sample_inputs import random_inputs
from graphprune.transforms.vocabulary import TOKENS, vocabulary_size, with_tokens
from graphprune.vocabulary.tokenizer_json import TokenizerJson

FILE, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"

MAP = "vocabulary.json"
"""Lists, for every new id, the old one."""

_STALE = ("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model", "*.tiktoken")
"""Files of slow tokenizers, which the trimmed one takes the place of."""

_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Lists of ids that may lose those that go."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a checkpoint, and those of them that stay.

    Parameters
    ----------
    program
        The program, read from a Hugging Face directory.
    tokenizer
        Its tokenizer.
    kept
        The ids that stay, ascending: at once the rows of the embedding.
    """

    program: Program
    tokenizer: TokenizerJson
    kept: tuple[int, ...]

    @property
    def tokens(self) -> list[str]:
        """The tokens that stay, in order."""
        texts = {at: token for token, at in self.tokenizer.ids.items()}
        return [texts[at] for at in self.kept]

    def trimmed(self) -> Program:
        """Return the program for the tokens that stay, proven on random ones.

        Raises
        ------
        RewriteError
            When it does more with tokens than to pick rows by them and to predict them.
        VerificationError
            When its outputs are not those of the program, naming one.
        """
        source = self.program.source
        assert source is not None
        smaller = with_tokens(self.program, self.kept)
        config = copy.deepcopy(source.config)
        _renumber_config(config, self._new)
        generation = copy.deepcopy(source.generation_config)
        if generation is not None:
            _renumber_config(generation, self._new)
        source = dataclasses.replace(source, config=config, generation_config=generation)
        smaller = dataclasses.replace(smaller, source=source)
        self._prove(smaller)
        return smaller

    @cached_property
    def _new(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.kept)}

    def _prove(self, smaller: Program) -> None:
        kept, inputs = torch.tensor(self.kept), random_inputs(smaller)
        wide = {n: kept[each] if n in TOKENS else each for n, each in inputs.items()}
        expected, found = self.program(**wide), smaller(**inputs)
        for name, value in found.items():
            whole = expected[name]
            if not name.startswith(PRESENT) and whole.shape != value.shape:
                whole = whole.index_select(-1, kept.to(whole.device))
            error = relative_error(whole, value)
            if not error <= tolerance_of(value.dtype):
                raise VerificationError(f"{name} is {error:.1e} away for the tokens that stay")

    def save(self, smaller: Program, directory: str | PathLike[str]) -> None:
        """Write `smaller`, which `trimmed` made, with the tokenizer of the tokens that stay.

        Raises
        ------
        BackendError
            When no checkpoint can hold it.
        OutputError
            When the directory is not empty or cannot be written. Nothing is left behind.
        """
        with staged_directory(directory) as staged:
            self.write_into(smaller, staged)

    def write_into(self, smaller: Program, folder: Path) -> None:
        """Do what `save` does in a folder that is there."""
        write_into(smaller, folder)
        for pattern in _STALE:
            for file in folder.glob(pattern):
                file.unlink()
        _write_json(folder / FILE, self.tokenizer.trimmed(self.tokens))
        _write_json(folder / MAP, {"old ids": self.kept})
        if (folder / SETTINGS).is_file():
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            added = settings.get("added_tokens_decoder", {})
            if added:
                moved = {int(old): each for old, each in added.items() if int(old) in self._new}
                settings["added_tokens_decoder"] = {str(self._new[o]): e for o, e in moved.items()}
            _write_json(folder / SETTINGS, settings)
        if (folder / GENERATION).is_file():
            fields = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
            _write_json(folder / GENERATION, _renumbered(fields, self._new))


def vocabulary_of_list(program: Program, wanted: Collection[str]) -> Vocabulary:
    """Return the vocabulary of the tokens `wanted`, and what they are made of.

    Raises
    ------
    UsageError
        When the tokenizer has no such token, or one that is special is not among them.
    CheckpointError
        When there is no tokenizer that can be trimmed.
    """
    tokenizer = _tokenizer_of(program)
    ids = tokenizer.ids
    if unknown := [token for token in wanted if token not in ids]:
        hint = nearest(unknown[0], ids)
        raise UsageError(f"the tokenizer has no token {unknown[0]!r}{hint}")
    texts = {at: token for token, at in ids.items()}
    needed = {*tokenizer.special, *(texts[at] for at in _used_by_configs(program) if at in texts)}
    if missing := sorted(needed - set(wanted), key=ids.__getitem__):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(map(repr, missing[:3]))
        raise UsageError(f"special tokens have to stay, and the list lacks {names}{more}")
    return _vocabulary(program, tokenizer, wanted)


def vocabulary_of_text(
    program: Program, text: str | PathLike[str], count: int | None = None
) -> Vocabulary:
    """Return the vocabulary of the tokens that a text takes, or of the `count` most frequent.

    Special tokens, those that configs name, and what words fall back to stay beside them.

    Raises
    ------
    UsageError
        When `count` is not positive.
    CalibrationError
        When the text cannot be read.
    CheckpointError
        When there is no tokenizer that can be trimmed.
    """
    from tokenizers import Tokenizer

    if count is not None and count < 1:
        raise UsageError(f"count {count} is not positive")
    tokenizer = _tokenizer_of(program)
    whole = Tokenizer.from_str(json.dumps(tokenizer.data))
    whole.no_padding()
    whole.no_truncation()
    seen = Counter[str]()
    for document in read_documents(text):
        words = document if isinstance(document, str) else json.dumps(document)
        seen.update(whole.encode(words, add_special_tokens=False).tokens)
    frequent = [token for token, _ in seen.most_common(count)]
    texts = {at: token for token, at in tokenizer.ids.items()}
    named = [texts[at] for at in _used_by_configs(program) if at in texts]
    return _vocabulary(program, tokenizer, [*frequent, *named])


def _vocabulary(program: Program, tokenizer: TokenizerJson, wanted: Collection[str]) -> Vocabulary:
    rows, ids = vocabulary_size(program), tokenizer.ids
    kept = tuple(ids[token] for token in tokenizer.closed(wanted))
    if rows is not None and kept[-1] >= rows:
        raise CheckpointError(f"the tokenizer has a token {kept[-1]}, and the model {rows} rows")
    return Vocabulary(program, tokenizer, kept)


def _tokenizer_of(program: Program) -> TokenizerJson:
    directory = program.source.directory if program.source else None
    if directory is None:
        raise CheckpointError("a vocabulary is trimmed with its tokenizer: load a directory")
    path = directory / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {FILE}: a tokenizer in Python code cannot be trimmed"
        )
    try:
        return TokenizerJson(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


# -- ids in configs -------------------------------------------------------------------------------


def _used_by_configs(program: Program) -> set[int]:
    """Return the ids that configs name, such as that of the end of a text."""
    assert program.source is not None
    found: set[int] = set()
    for config in (program.source.config, program.source.generation_config):
        fields = {} if config is None else config.to_dict()
        found |= set(_ids_in(fields))
    return found


def _ids_in(fields: Mapping[str, Any]) -> list[int]:
    found: list[int] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            found += _ids_in(value)
        elif _names_ids(name):
            found += [each for each in _as_list(value) if type(each) is int and each >= 0]
    return found


def _names_ids(name: str) -> bool:
    return str(name).endswith(("_token_id", "_token_ids"))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _renumbered(fields: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return fields of a config with the new ids of tokens."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found[name] = _renumbered(value, new)
        elif _names_ids(name) and value is not None:
            ids = [new.get(each, each) for each in _as_list(value)]
            found[name] = ids if isinstance(value, list | tuple) else ids[0]
        elif name in _LISTS and value is not None:
            found[name] = _still_there(value, new)
        else:
            found[name] = value
    return found


def _still_there(value: Sequence[Any], new: Mapping[int, int]) -> list[Any]:
    """Return a list of ids, or of lists of them, without what holds one that goes."""
    if all(isinstance(each, int) for each in value):
        return [new[each] for each in value if each in new]
    inner = [_still_there(each, new) for each in value]
    return [one for one, old in zip(inner, value, strict=True) if len(one) == len(old)]


def _renumber_config(config: Any, new: Mapping[int, int]) -> None:
    """Give a config object the new ids, in its inner configs too."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            _renumber_config(value, new)
        elif (_names_ids(name) or name in _LISTS) and value is not None:
            setattr(config, name, _renumbered({name: value}, new)[name])


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
