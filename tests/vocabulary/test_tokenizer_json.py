"""Tokenizers with fewer tokens cut the texts of those tokens as they did before."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tiny_tokenizers import SPECIAL, bpe, clip_like, unigram, word_level, word_piece
from tokenizers import Tokenizer, processors

from graphprune.errors import UsageError
from graphprune.vocabulary.tokenizer_json import TokenizerJson

SEEN, UNSEEN = "the cat sat on the mat", "the hat of ünseen cats"

KINDS = [bpe, clip_like, unigram, word_piece, word_level]


@pytest.mark.parametrize("make", KINDS)
def test_a_text_of_kept_tokens_is_cut_as_before(make: Callable[[], Tokenizer]) -> None:
    whole = make()
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    whole.enable_padding(pad_id=2, pad_token="</s>", length=24)
    held = TokenizerJson(json.loads(whole.to_str()))
    kept = held.closed(whole.encode(SEEN).tokens)
    assert len(kept) < whole.get_vocab_size()
    assert kept == sorted(kept, key=whole.token_to_id) and set(SPECIAL) <= set(kept)
    small = Tokenizer.from_str(json.dumps(held.trimmed(kept)))
    assert small.get_vocab() == {token: at for at, token in enumerate(kept)}
    for text in (SEEN, "cat on the mat", ""):
        assert small.encode(text).tokens == whole.encode(text).tokens
        assert [kept[at] for at in small.encode(text).ids] == small.encode(text).tokens
    if make is bpe:
        assert small.decode(small.encode(UNSEEN).ids) == UNSEEN


def test_every_merge_of_a_kept_token_stays_and_no_other() -> None:
    whole = bpe()
    held = TokenizerJson(json.loads(whole.to_str()))
    data = held.trimmed(held.closed(["Ġthe", "Ġcat"]))
    made = {"".join(pair) for pair in data["model"]["merges"]}
    assert {"Ġthe", "Ġcat"} <= made and made <= set(data["model"]["vocab"])
    assert len(data["model"]["merges"]) < len(held.data["model"]["merges"])


def test_what_cannot_be_trimmed_is_refused() -> None:
    with pytest.raises(UsageError, match="of type None cannot be trimmed"):
        TokenizerJson({"model": {}})
    model = {"type": "BPE", "continuing_subword_prefix": "##"}
    with pytest.raises(UsageError, match="prefix of continuing subwords"):
        TokenizerJson({"model": model})
