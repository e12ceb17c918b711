"""From logits to text: choosing tokens, and showing them piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.errors import UsageError

_CONTEXT = 4
"""Tokens of a prompt that are decoded along: some tokenizers drop the space that a text begins
with."""

_INCOMPLETE = "\ufffd"
"""What stands for bytes that are no character, or not yet."""


@dataclass(frozen=True)
class Sampling:
    """The way in which tokens are chosen.

    Parameters
    ----------
    temperature
        What logits are divided by; at 0 the likeliest token is chosen.
    top_k
        Choose among so many of the likeliest tokens.
    top_p
        Choose among the fewest of the likeliest tokens that have this probability together
        (nucleus sampling: Holtzman et al., arXiv:1904.09751).
    seed
        Seed of what is random. A row's choices do not depend on the rows beside it.

    Raises
    ------
    UsageError
        When one of them makes no sense.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"a temperature is 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is 1 or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is above 0 and 1 at most, not {self.top_p}")
        if self.seed < 0:
            raise UsageError(f"a seed is 0 or more, not {self.seed}")

    def generator(self, row: int) -> torch.Generator:
        """Return the generator of one row."""
        # The generator keeps 32 bits of its seed: what tells rows apart is mixed into them.
        mixed = np.random.SeedSequence((self.seed, row)).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose a token by its logits, ``[vocabulary]``."""
        if self.temperature == 0:
            return int(logits.argmax())
        # Divided after the largest is taken away, no temperature is too small.
        scores = (logits - logits.max()) / self.temperature
        tokens = None
        if self.top_k is not None and self.top_k < len(scores):
            scores, tokens = scores.topk(self.top_k)
        elif self.top_p is not None:
            scores, tokens = scores.sort(descending=True)
        chances = scores.softmax(0)
        if self.top_p is not None:
            before = chances.cumsum(0) - chances
            chances = chances.where(before < self.top_p, 0.0)
        chosen = int(torch.multinomial(chances, 1, generator=generator))
        return chosen if tokens is None else int(tokens[chosen])


class Text:
    """Tokens as text, in pieces that no character is cut by, until a stop string comes up.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    prompt
        The tokens before.
    stop
        Strings that end the text, which are not part of it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.tokens = list(prompt[-_CONTEXT:])
        self.shown = len(self.tokens)
        self.held = ""
        self.stopped = False
        self.pieces: list[str] = []

    def __str__(self) -> str:
        return "".join(self.pieces)

    def add(self, token: int) -> str:
        """Return what can be shown after one more token."""
        self.tokens.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        del self.tokens[: self.shown]
        self.shown = len(self.tokens)
        return self._show(piece)

    def end(self) -> str:
        """Return what is left to be shown after the last token."""
        return self._show(self._piece(), last=True)

    def _piece(self) -> str:
        before = self._decoded(self.tokens[: self.shown])
        return self._decoded(self.tokens)[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _show(self, piece: str, last: bool = False) -> str:
        """`piece` and what was held back before it, but for what may become a stop string."""
        if self.stopped:
            return ""
        text = self.held + piece
        cut = min((at for each in self.stop if (at := text.find(each)) >= 0), default=None)
        self.stopped = cut is not None
        if cut is None:
            cut = len(text) - (0 if last else _begun(text, self.stop))
        self.held = "" if self.stopped else text[cut:]
        self.pieces.append(text[:cut])
        return text[:cut]


def _begun(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may begin a string of `stop`."""
    longest = max((len(each) for each in stop), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(each.startswith(text[-length:]) for each in stop):
            return length
    return 0
