"""Tokenizers with fewer tokens, as the JSON of the `tokenizers` library.

A text that took none of the tokens that go is cut into the same tokens as before: of byte-pair
encodings all merges stay by which a token that stays is made, and of the other models a token that
goes was not chosen there. What words fall back to stays: bytes, single characters of ASCII, the
unknown token.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphprune.errors import UsageError

_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")

Merge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class TokenizerJson:
    """The content of a ``tokenizer.json``.

    Raises
    ------
    UsageError
        When its model is of a kind that cannot be trimmed.
    """

    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        model = self.data.get("model") or {}
        if model.get("type") not in _MODELS:
            kind = model.get("type")
            raise UsageError(f"a tokenizer of type {kind} cannot be trimmed: only {_MODELS}")
        if model["type"] == "BPE" and model.get("continuing_subword_prefix"):
            raise UsageError("merges with a prefix of continuing subwords cannot be trimmed")

    @property
    def ids(self) -> dict[str, int]:
        """Every token -> its id, those that were added among them."""
        vocab = self.data["model"]["vocab"]
        if isinstance(vocab, list):
            vocab = {piece: at for at, (piece, _) in enumerate(vocab)}
        return {**vocab, **{each["content"]: each["id"] for each in self.data["added_tokens"]}}

    @property
    def special(self) -> set[str]:
        """The tokens that the tokenizer marks as special, and the unknown one."""
        found = {each["content"] for each in self.data["added_tokens"] if each["special"]}
        model = self.data["model"]
        if isinstance(model.get("unk_token"), str):
            found.add(model["unk_token"])
        if model.get("unk_id") is not None:
            found.add(model["vocab"][model["unk_id"]][0])
        return found

    def closed(self, wanted: Collection[str]) -> list[str]:
        """Return `wanted`, what it is made of and what words fall back to, in order of the ids."""
        ids = self.ids
        found = {*wanted, *self.special, *filter(self._is_fallback, ids)}
        if self.data["model"]["type"] == "BPE":
            ranks = self._ranks
            for token in tuple(found):
                found.update(part for merge in self._derivation(token, ranks) for part in merge)
        return sorted(found & ids.keys(), key=ids.__getitem__)

    def _is_fallback(self, token: str) -> bool:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return True
        model = self.data["model"]
        bare = token.removeprefix(model.get("continuing_subword_prefix") or "")
        bare = bare.removesuffix(model.get("end_of_word_suffix") or "")
        by_bytes = '"ByteLevel"' in repr(self.data.get("pre_tokenizer")).replace("'", '"')
        return len(bare) == 1 and (by_bytes or bare.isascii())

    @property
    def _ranks(self) -> dict[Merge, int]:
        return {pair: rank for rank, pair in enumerate(_pairs(self.data["model"]["merges"]))}

    def _derivation(self, token: str, ranks: Mapping[Merge, int]) -> Iterator[Merge]:
        """Yield the merges that make `token`, the first one first."""
        end = self.data["model"].get("end_of_word_suffix") or ""
        stem = token.removesuffix(end) if end else token
        parts = list(stem)
        if stem != token and parts:
            parts[-1] += end
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairs))
            if rank == len(ranks):
                return
            yield pairs[at]
            parts[at : at + 2] = ["".join(pairs[at])]

    def trimmed(self, kept: Sequence[str]) -> dict[str, Any]:
        """Return the JSON of a tokenizer of the tokens `kept` alone, numbered in their order."""
        new = {token: at for at, token in enumerate(kept)}
        moved = {old: new[token] for token, old in self.ids.items() if token in new}
        data = copy.deepcopy(dict(self.data))
        model = data["model"]
        if isinstance(model["vocab"], list):
            scores = dict(model["vocab"])
            model["vocab"] = [[piece, scores.get(piece, 0.0)] for piece in kept]
            if model.get("unk_id") is not None:
                model["unk_id"] = moved[model["unk_id"]]
        else:
            model["vocab"] = {token: new[token] for token in kept if token in model["vocab"]}
        if "merges" in model:
            model["merges"] = [
                list(pair)
                for pair in _pairs(model["merges"])
                if all(token in model["vocab"] for token in (*pair, "".join(pair)))
            ]
        data["added_tokens"] = [
            {**each, "id": new[each["content"]]}
            for each in data["added_tokens"]
            if each["content"] in new
        ]
        data["post_processor"] = _renumbered(data.get("post_processor"), new)
        if data.get("padding"):
            data["padding"]["pad_id"] = moved[data["padding"]["pad_id"]]
        return data


def _pairs(merges: Iterable[Any]) -> Iterator[Merge]:
    """Yield merges, which files hold as pairs or as texts with a space."""
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _renumbered(part: Any, new: Mapping[str, int]) -> Any:
    """Return a part of a post-processor with the new ids of its tokens."""
    if isinstance(part, dict):
        if {"ids", "tokens"} <= part.keys():
            return {**part, "ids": [new[token] for token in part["tokens"]]}
        return {key: _renumbered(value, new) for key, value in part.items()}
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int:
            return [part[0], new[part[0]]]
        return [_renumbered(each, new) for each in part]
    return part
