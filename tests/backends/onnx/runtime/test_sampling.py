"""Choosing tokens by their logits, and text that grows by whole characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from byte_llama import byte_tokenizer

from graphprune.backends.onnx.runtime.sampling import Sampling, Text
from graphprune.errors import UsageError

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def drawn(sampling: Sampling, count: int = 1000) -> list[float]:
    """How often each token is drawn."""
    generator = sampling.generator(0)
    tokens = [sampling.choose(LOGITS, generator) for _ in range(count)]
    return [tokens.count(token) / count for token in range(len(LOGITS))]


def test_the_likeliest_token_is_chosen_without_a_temperature() -> None:
    assert drawn(Sampling(), 5) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_p=0.7), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_p=0.1), [1, 0, 0, 0]),
        (Sampling(1.0, top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(1e-9), [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_by_their_chances(sampling: Sampling, expected: list[float]) -> None:
    found = drawn(sampling)
    assert found == pytest.approx(expected, abs=0.05)
    assert [share > 0 for share in found] == [share > 0 for share in expected]


def test_draws_depend_on_seed_and_row() -> None:
    def draws(seed: int, row: int) -> list[int]:
        sampling = Sampling(1.0, seed=seed)
        generator = sampling.generator(row)
        return [sampling.choose(LOGITS, generator) for _ in range(30)]

    assert draws(3, 1) == draws(3, 1)
    assert len({tuple(draws(seed, row)) for seed in (0, 1, 2) for row in (0, 1, 2)}) == 9


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"temperature": -1.0}, "a temperature is 0 or more, not -1.0"),
        ({"temperature": float("nan")}, "a temperature is 0 or more, not nan"),
        ({"top_k": 0}, "top_k is 1 or more, not 0"),
        ({"top_p": 0.0}, "top_p is above 0 and 1 at most, not 0.0"),
        ({"top_p": 1.5}, "top_p is above 0 and 1 at most, not 1.5"),
        ({"seed": -1}, "a seed is 0 or more, not -1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Sampling(**options)


# -- text -----------------------------------------------------------------------------------------


def pieces(text: str, *stop: str, prompt: str = "") -> tuple[list[str], Text]:
    """What is shown after each byte of `text`, and in the end."""
    tokenizer = byte_tokenizer()
    shown = Text(tokenizer, tokenizer(prompt)["input_ids"], stop)
    found = []
    for token in tokenizer(text)["input_ids"]:
        found.append(shown.add(token))
        if shown.stopped:
            break
    return [*found, shown.end()], shown


def test_no_character_is_cut() -> None:
    found, shown = pieces("aé€😀b")
    assert found == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert str(shown) == "aé€😀b"


def test_bytes_that_are_no_character_are_shown_in_the_end() -> None:
    tokenizer = byte_tokenizer()
    shown = Text(tokenizer, [])
    first, second = tokenizer("é")["input_ids"]
    assert [shown.add(second), shown.add(first), shown.end()] == ["", "", "\ufffd\ufffd"]


def test_the_text_is_cut_before_a_stop_string_that_was_not_shown() -> None:
    found, shown = pieces("one\n\ntwo", "\n\n")
    assert found == ["o", "n", "e", "", "", ""]
    assert str(shown) == "one"
    assert shown.stopped


def test_what_only_begins_like_a_stop_string_is_shown_late() -> None:
    found, shown = pieces("a<eo b<e", "<eos>", "<e!")
    assert found == ["a", "", "", "", "<eo ", "b", "", "", "<e"]
    assert not shown.stopped


def test_the_first_of_several_stop_strings_counts() -> None:
    assert str(pieces("abcd", "cd", "bc")[1]) == "a"


def test_a_space_that_a_text_begins_with_is_kept() -> None:
    class Words:
        """Drops the space before the first word, as tokenizers of SentencePiece do."""

        def decode(self, tokens: list[int], **_: Any) -> str:
            return " ".join(f"w{token}" for token in tokens)

    shown = Text(Words(), [1, 2])
    assert [shown.add(3), shown.add(4), shown.end()] == [" w3", " w4", ""]
