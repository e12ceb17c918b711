"""Rows of tokens by an encoder-decoder: the likeliest each time, or by beam search."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from graphprune.backends.onnx.encoder_decoder.beams import Beams
from graphprune.backends.onnx.encoder_decoder.decoding import Decoding
from graphprune.backends.onnx.encoder_decoder.rules import Rules
from graphprune.errors import BackendError

Tokens = tuple[int, ...]


def generated(
    decoding: Decoding, rules: Rules, rows: int, most: int, beams: int
) -> tuple[list[Tokens], float]:
    """Generate the tokens of every row.

    Parameters
    ----------
    decoding
        What is encoded, and nothing decoded yet.
    rules
        The tokens that begin and end a row, and those that may not come.
    rows
        How many rows there are.
    most
        The most new tokens of a row.
    beams
        The number of beams; with one the likeliest token is taken each time.

    Returns
    -------
    tuple
        The new tokens of each row, and when the first logits were there.

    Raises
    ------
    BackendError
        When a part fails, or logits are not numbers.
    """
    if beams == 1:
        return _greedy(decoding, rules, rows, most)
    return _search(decoding, rules, rows, most, beams)


def _greedy(decoding: Decoding, rules: Rules, rows: int, most: int) -> tuple[list[Tokens], float]:
    texts: list[Tokens] = [()] * rows
    ended = [False] * rows
    scores = _advance(decoding, torch.tensor([rules.start] * rows))
    first = time.perf_counter()
    for step in range(most):
        for row in range(rows):
            if not ended[row]:
                best = int(rules.allowed(scores[row], texts[row], most).argmax())
                texts[row] = (*texts[row], best)
                ended[row] = best in rules.ends
        if all(ended) or step == most - 1:
            break
        # A row that has ended goes along: what comes of its last token is not looked at.
        scores = _advance(decoding, torch.tensor([text[-1:] for text in texts]))
    return texts, first


def _search(
    decoding: Decoding, rules: Rules, rows: int, most: int, count: int
) -> tuple[list[Tokens], float]:
    made = [
        Beams(count, rules.ends, most, rules.length_penalty, rules.early_stopping)
        for _ in range(rows)
    ]
    decoding.repeat(count)
    scores = _advance(decoding, torch.tensor([rules.start] * rows * count))
    first = time.perf_counter()
    while True:
        scores = scores.log_softmax(-1)
        chosen = list[int]()
        for row, each in enumerate(made):
            at = range(row * count, (row + 1) * count)
            if each.done:
                chosen += at
                continue
            allowed = [
                rules.allowed(scores[place], text, most)
                for place, text in zip(at, each.running, strict=True)
            ]
            chosen += [at[source] for source in each.advance(torch.stack(allowed))]
        if all(each.done for each in made):
            return [each.best() for each in made], first
        decoding.choose(torch.tensor(chosen))
        tokens = [text[-1:] for each in made for text in each.running]
        scores = _advance(decoding, torch.tensor(tokens))


def _advance(decoding: Decoding, tokens: Tensor) -> Tensor:
    logits = decoding.advance(tokens)[:, -1].float()
    if logits.isnan().any():
        raise BackendError("the model's logits are not numbers")
    return logits
