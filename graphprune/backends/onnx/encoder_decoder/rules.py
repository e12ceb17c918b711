"""What a generation config says of tokens: which begin and end a row, and which may not come.

Reference: transformers' ``GenerationConfig``; its rules are applied in the order that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graphprune.backends.onnx.runtime.limits import read_json
from graphprune.errors import BackendError, CheckpointError

_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "watermarking_config": None,
    "penalty_alpha": None,
    "forced_decoder_ids": None,
    "constraints": None,
    "force_words_ids": None,
}
"""Fields that change tokens and are not followed, with the value at which they change none."""


@dataclass(frozen=True)
class Rules:
    """The tokens that begin and end rows, and those that may not come.

    Parameters
    ----------
    start
        The tokens that every row begins with.
    ends
        Tokens that end a row.
    length_penalty, early_stopping
        Of beam search, as `Beams` takes them.
    forced_first, forced_last
        The first new token, and the last one of a row that has become as long as it may be.
    suppressed, suppressed_first
        Tokens that never come, and those that are not the first new one.
    least, least_new
        Tokens, with those that a row begins with or without, before which none ends it.
    no_repeat
        How many tokens in a row may not come twice; 0 for no such rule.
    """

    start: tuple[int, ...]
    ends: frozenset[int] = frozenset()
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    least: int = 0
    least_new: int = 0
    no_repeat: int = 0

    def allowed(self, scores: Tensor, tokens: Sequence[int], most: int) -> Tensor:
        """Return the scores of a row's next token, with those that may not come at minus infinity.

        Parameters
        ----------
        scores
            Scores of all tokens, ``[vocabulary]``.
        tokens
            The new tokens so far.
        most
            The most new tokens.
        """
        scores, whole = scores.clone(), (*self.start, *tokens)
        if self.no_repeat:
            scores[list(_repeated(whole, self.no_repeat))] = -torch.inf
        if len(whole) < self.least or len(tokens) < self.least_new:
            scores[_within(self.ends, scores)] = -torch.inf
        if self.forced_first is not None and len(whole) == 1:
            scores = _only(scores, (self.forced_first,))
        if self.forced_last and len(tokens) == most - 1:
            scores = _only(scores, self.forced_last)
        scores[_within(self.suppressed, scores)] = -torch.inf
        begin = 1 if self.forced_first is not None and len(self.start) == 1 else 0
        if len(tokens) == begin:
            scores[_within(self.suppressed_first, scores)] = -torch.inf
        return scores


def rules_of(directory: Path) -> Rules:
    """Read the rules that ``generation_config.json`` and ``config.json`` of a package name.

    Raises
    ------
    CheckpointError
        When one of them is no JSON object, or no token is named that a text begins with.
    BackendError
        When the generation config asks for something else that changes tokens.
    """
    generation, config = (
        read_json(directory / name) for name in ("generation_config.json", "config.json")
    )
    for name, neutral in _NEUTRAL.items():
        if generation.get(name, neutral) not in (neutral, None):
            raise BackendError(
                f"{directory / 'generation_config.json'} asks for {name}={generation[name]}, "
                "which this runner does not follow"
            )

    def token(*names: str) -> Any:
        given = (place.get(name) for name in names for place in (generation, config))
        return next((each for each in given if each is not None), None)

    start = token("decoder_start_token_id", "bos_token_id")
    if start is None:
        raise CheckpointError(f"{directory} names no token that a text begins with")
    penalty = generation.get("length_penalty")
    return Rules(
        start=_several(start),
        ends=frozenset(_several(token("eos_token_id"))),
        length_penalty=1.0 if penalty is None else float(penalty),
        early_stopping=generation.get("early_stopping") or False,
        forced_first=generation.get("forced_bos_token_id"),
        forced_last=_several(generation.get("forced_eos_token_id")),
        suppressed=_several(generation.get("suppress_tokens")),
        suppressed_first=_several(generation.get("begin_suppress_tokens")),
        least=int(generation.get("min_length") or 0),
        least_new=int(generation.get("min_new_tokens") or 0),
        no_repeat=int(generation.get("no_repeat_ngram_size") or 0),
    )


def _only(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    forced = torch.full_like(scores, -torch.inf)
    forced[list(tokens)] = 0
    return forced


def _within(tokens: Iterable[int], scores: Tensor) -> list[int]:
    return [token for token in tokens if token < len(scores)]


def _repeated(tokens: Sequence[int], size: int) -> set[int]:
    """Return the tokens that would make the last `size` tokens such as were there before."""
    if len(tokens) < size:
        return set()
    last = tuple(tokens[len(tokens) - size + 1 :])
    return {
        tokens[at + size - 1]
        for at in range(len(tokens) - size + 1)
        if tuple(tokens[at : at + size - 1]) == last
    }


def _several(given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    return tuple(map(int, given)) if isinstance(given, list | tuple) else (int(given),)
