"""Windows begin as the model was trained, and conversations go through the chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import program_of
from byte_llama import BOS, byte_llama, byte_tokenizer

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.calibration.tokens import first_tokens, tokenize, unfit_tokens
from graphprune.criteria import ScoringContext
from graphprune.criteria.score_cache import load_or_score
from graphprune.errors import CalibrationError
from graphprune.evaluation.perplexity import perplexity

TEXT = " ".join(str(number) for number in range(1000, 1400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_windows_begin_with_what_the_tokenizer_begins_with(text: Path) -> None:
    tokenizer = byte_tokenizer(begins=True)
    assert first_tokens(tokenizer) == (BOS,)
    found = Calibration.from_text(text, tokenizer, samples=6, length=32)
    rows = torch.cat([batch["input_ids"] for batch in (*found, *found.held_out)])
    assert rows[:, 0].eq(BOS).all()
    inside = [tokenizer.decode(row[1:]) for row in rows]
    assert all(TEXT.index(each) % 31 == 0 for each in inside)  # nothing is left out between them
    assert len(set(inside)) == len(inside)
    assert found.describe()["first tokens"] == [BOS]


def test_it_can_be_left_out(text: Path) -> None:
    bare = Calibration.from_text(text, byte_tokenizer(begins=True), first_token=False)
    assert bare.sha256 == Calibration.from_text(text, byte_tokenizer()).sha256
    assert bare.describe()["first tokens"] == []


def test_a_tokenizer_that_adds_nothing_has_no_first_token() -> None:
    assert first_tokens(byte_tokenizer()) == ()
    assert tokenize(["abc"], byte_tokenizer()).windows(2).shape == (1, 2)


def test_what_ends_a_text_is_no_first_token() -> None:
    """As a tokenizer of BERT, which puts one token before a text and one after it."""

    def tokenizer(text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [101, *ids, 102] if add_special_tokens else ids}

    stream = tokenize(["abcd"], tokenizer)
    assert stream.windows(3).tolist() == [[101, 97, 98], [101, 99, 100]]


def test_a_window_too_short_for_a_first_token_is_none() -> None:
    assert len(tokenize(["abc"], byte_tokenizer(begins=True)).windows(1)) == 0


# -- conversations --------------------------------------------------------------------------------


def conversations(path: Path, field: str = "messages") -> Path:
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    path.write_text("\n".join(json.dumps({field: each}) for each in (said, said[:1])) + "\n")
    return path


@pytest.mark.parametrize("begins", [False, True])
def test_conversations_go_through_the_chat_template(tmp_path: Path, begins: bool) -> None:
    tokenizer = byte_tokenizer(begins=begins, chats=True)
    path = conversations(tmp_path / "chat.jsonl")
    found = Calibration.from_text(path, tokenizer, samples=1, length=15 + begins)
    row = next(iter(found))["input_ids"][0]
    # The template's own first token is not there twice.
    assert row[:1].eq(BOS).all() == begins
    assert tokenizer.decode(row[begins:]) == "u:ab;a:cd;u:ab;"


def test_the_field_of_conversations_can_be_named(tmp_path: Path) -> None:
    path = conversations(tmp_path / "chat.jsonl", "said")
    tokenizer = byte_tokenizer(chats=True)
    found = Calibration.from_text(f"{path}:said", tokenizer, samples=1, length=5)
    assert found.tokens == 5


def test_conversations_without_a_template_are_refused(tmp_path: Path) -> None:
    path = conversations(tmp_path / "chat.jsonl")
    with pytest.raises(CalibrationError, match="conversations, and the tokenizer has no chat temp"):
        Calibration.from_text(path, byte_tokenizer(), samples=1, length=5)


def test_a_conversation_that_its_template_refuses_is_refused_in_a_line(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chats=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = conversations(tmp_path / "chat.jsonl")
    with pytest.raises(CalibrationError, match="refuses a conversation: roles must alternate"):
        Calibration.from_text(path, tokenizer, samples=1, length=5)


# -- what knows of it -----------------------------------------------------------------------------


def test_scores_are_refused_for_another_size_tokenizer_or_first_token(
    text: Path, tmp_path: Path
) -> None:
    program = gp.capture(byte_llama())
    coupling = gp.analyze(program)
    groups = [group for group in coupling.groups if group.role == "ffn"][:1]

    def scored(tokenizer: object, **options: int) -> None:
        data = Calibration.from_text(text, tokenizer, length=32, **options)  # type: ignore[arg-type]
        context = ScoringContext(program, coupling, groups, data)
        load_or_score(tmp_path / "scores.safetensors", "taylor", context)

    scored(byte_tokenizer(begins=True), samples=4)
    scored(byte_tokenizer(begins=True), samples=4)
    told = (
        f"on other calibration data: 4 windows of 32 tokens of {text.name}, beginning with 1, .*;"
    )
    with pytest.raises(CalibrationError, match=told + " this is 5 windows of 32 tokens"):
        scored(byte_tokenizer(begins=True), samples=5)
    with pytest.raises(CalibrationError, match=told):
        scored(byte_tokenizer(begins=True), samples=4, first_token=False)
    with pytest.raises(CalibrationError, match=told):
        scored(byte_tokenizer(), samples=4)


def test_perplexity_is_measured_behind_the_first_token(text: Path) -> None:
    program = gp.capture(byte_llama())
    found = perplexity(program, text, byte_tokenizer(begins=True), length=32)
    bare = perplexity(program, text, byte_tokenizer(), length=32)
    assert (found.first, bare.first) == ((BOS,), ())
    assert found.sha256 != bare.sha256
    asked = perplexity(program, text, byte_tokenizer(begins=True), length=32, first_token=False)
    assert asked == bare


def test_a_token_below_zero_is_no_token() -> None:
    program = program_of("llama-gqa")
    assert "there is a token -1" in unfit_tokens(program, {"input_ids": torch.tensor([[3, -1]])})
    assert not unfit_tokens(program, {"input_ids": torch.tensor([[3, 0]])})
