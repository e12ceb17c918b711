"""Beam search over the tokens of one row.

Of the continuations of all beams the likeliest are kept; those that end are set aside with their
log-probability over a power of their length. The search ends when no beam can become better than
what was set aside, judged as transformers does by the length at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

_NEVER = -1e9


@dataclass(eq=False)
class Beams:
    """The beams of one row.

    Parameters
    ----------
    count
        How many there are.
    ends
        Tokens that end one.
    most
        The most new tokens.
    penalty
        The power of the length that scores are divided by.
    early
        Whether the search ends as soon as `count` beams have ended; "never" lets it go on until no
        beam of any length can become better.
    """

    count: int
    ends: frozenset[int]
    most: int
    penalty: float = 1.0
    early: bool | Literal["never"] = False
    running: list[tuple[int, ...]] = field(init=False)
    scores: Tensor = field(init=False)
    ended: list[tuple[float, tuple[int, ...]]] = field(default_factory=list, init=False)
    done: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.running = [()] * self.count
        # All begin alike: only the first one may be continued at first.
        self.scores = torch.full((self.count,), _NEVER)
        self.scores[0] = 0

    def advance(self, log_probabilities: Tensor) -> list[int]:
        """Take the log-probabilities of next tokens, ``[count, vocabulary]``.

        Returns
        -------
        list of int
            The beam that each one of the next beams goes on from.
        """
        vocabulary = log_probabilities.shape[1]
        totals = (log_probabilities.float() + self.scores[:, None]).flatten()
        # So many that enough go on, even where each of the best ones ends.
        kept = min(max(2, 1 + len(self.ends)) * self.count, len(totals))
        totals, at = totals.topk(kept)
        sources = [int(each) // vocabulary for each in at]
        texts = [
            (*self.running[source], int(each) % vocabulary)
            for source, each in zip(sources, at, strict=True)
        ]
        stops = torch.tensor([text[-1] in self.ends or len(text) == self.most for text in texts])
        self._set_aside(totals, texts, stops)
        self.scores, chosen = (totals + stops * _NEVER).topk(self.count)
        self.running = [texts[index] for index in chosen.tolist()]
        self._end(bool(stops.all()))
        return [sources[index] for index in chosen.tolist()]

    def best(self) -> tuple[int, ...]:
        """Return the new tokens of the best beam; what ended it is the last of them."""
        return self.ended[0][1] if self.ended else self.running[0]

    def _set_aside(self, totals: Tensor, texts: Sequence[tuple[int, ...]], stops: Tensor) -> None:
        if self.done:
            return
        scores = totals / len(texts[0]) ** self.penalty
        for index in range(min(self.count, len(texts))):
            if stops[index]:
                self.ended.append((float(scores[index]), texts[index]))
        self.ended.sort(key=lambda each: -each[0])
        del self.ended[self.count :]

    def _end(self, all_stop: bool) -> None:
        if len(self.ended) == self.count:
            hopeful = self.early == "never" and self.penalty > 0
            length = self.most if hopeful else len(self.running[0])
            best = float(self.scores[0] / length**self.penalty)
            self.done |= self.early is True or best <= self.ended[-1][0]
        self.done |= all_stop
