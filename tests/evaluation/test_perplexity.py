"""Perplexity is that of transformers, and what has none is refused in a line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer
from transformers import BertConfig, BertForMaskedLM

import graphprune as gp
from graphprune.errors import EvaluationError
from graphprune.evaluation.perplexity import perplexity
from graphprune.ir.program import Program

TEXT = "".join(f"line {number} of a text that is long enough\n" for number in range(20))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def program() -> Program:
    return gp.capture(byte_llama())


def test_perplexity_is_that_of_transformers(program: Program, tokenizer: Any) -> None:
    measured = perplexity(program, TEXT, tokenizer, length=32, batch_size=3)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        expected = byte_llama()(input_ids=windows, labels=windows).loss.item()
    assert measured.loss == pytest.approx(expected, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert measured.tokens == windows.numel() - len(windows)
    assert measured.length == 32
    assert measured.to_dict()["tokens"] == measured.tokens


def test_the_batch_size_changes_nothing(program: Program, tokenizer: Any) -> None:
    one = perplexity(program, TEXT, tokenizer, length=32, batch_size=1)
    many = perplexity(program, TEXT, tokenizer, length=32, batch_size=64)
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert one.sha256 == many.sha256


def test_a_path_and_its_text_measure_the_same(
    program: Program, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "held out.txt"
    path.write_text(TEXT, encoding="utf-8")
    for text in (path, str(path)):
        found = perplexity(program, text, tokenizer, length=32)
        assert found == perplexity(program, TEXT, tokenizer, length=32)


def test_max_tokens_takes_the_beginning(program: Program, tokenizer: Any) -> None:
    some = perplexity(program, TEXT, tokenizer, length=32, max_tokens=100)
    assert some.tokens == 3 * 31
    assert some == perplexity(program, TEXT[:100], tokenizer, length=32)


def test_a_decoder_captured_without_its_cache_is_measured_too(
    program: Program, tokenizer: Any
) -> None:
    plain = gp.capture(byte_llama(), cache=False)
    assert not plain.is_decoder
    expected = perplexity(program, TEXT, tokenizer, length=32)
    assert perplexity(plain, TEXT, tokenizer, length=32).loss == pytest.approx(expected.loss)


def test_a_model_that_sees_what_follows_is_refused(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
    )
    program = gp.capture(BertForMaskedLM(config))
    with pytest.raises(EvaluationError, match="depend on the tokens after it"):
        perplexity(program, TEXT, tokenizer, length=32)


def test_a_model_without_logits_is_refused(tokenizer: Any) -> None:
    program = gp.capture(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
    with pytest.raises(EvaluationError, match="needs a causal language model: input_ids in"):
        perplexity(program, TEXT, tokenizer)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("much too short", {"length": 32}, "the text has 14 tokens; a window takes 32"),
        (TEXT, {"length": 32, "max_tokens": 9}, "has 9 tokens of 9 allowed; a window takes 32"),
        (" \n ", {"length": 32}, "the text is empty"),
        ("absent.txt", {"length": 32}, "absent.txt does not exist"),
        (TEXT, {"length": 1}, "a window needs two tokens at least, not 1"),
        (TEXT, {"length": 129}, "129 tokens is longer than the model's 128"),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused_in_a_line(
    program: Program, tokenizer: Any, text: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        perplexity(program, text, tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any) -> None:
    program = gp.capture(byte_llama(vocab_size=64))
    with pytest.raises(EvaluationError, match="tokenizer does not belong to the model"):
        perplexity(program, TEXT, tokenizer, length=32)


def test_a_tokenizer_directory_that_is_absent_is_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="holds no tokenizer"):
        perplexity(program, TEXT, tmp_path / "absent", length=32)
