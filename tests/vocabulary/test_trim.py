"""Checkpoints of fewer tokens: the same logits for those, under other ids."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import SPECIAL, bpe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import graphprune as gp
from graphprune.errors import CheckpointError, RewriteError, UsageError
from graphprune.ir.program import Program
from graphprune.transforms.vocabulary import with_tokens
from graphprune.vocabulary.trim import vocabulary_of_list, vocabulary_of_text

SEEN = "the cat sat on the mat"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from byte_llama import byte_llama

    folder = tmp_path_factory.mktemp("llama")
    model = byte_llama(
        vocab_size=304,  # more rows than tokens, as many models have
        num_hidden_layers=1,
        tie_word_embeddings=request.param,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model.generation_config.suppress_tokens = [1, 299]
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe(), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    (folder / "merges.txt").write_text("of a slow tokenizer\n")
    (folder / "seen.txt").write_text(SEEN)
    return folder


@cache
def loaded(folder: Path) -> Program:
    return gp.load(folder)


def test_logits_of_kept_tokens_are_those_of_the_original(checkpoint: Path, tmp_path: Path) -> None:
    program = loaded(checkpoint)
    vocabulary = vocabulary_of_text(program, checkpoint / "seen.txt")
    smaller = vocabulary.trimmed()
    vocabulary.save(smaller, tmp_path / "out")
    whole, model = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (checkpoint, tmp_path / "out")
    )
    before, after = (
        AutoTokenizer.from_pretrained(folder)(SEEN, return_tensors="pt").input_ids
        for folder in (checkpoint, tmp_path / "out")
    )
    kept = torch.tensor(vocabulary.kept)
    assert torch.equal(kept[after], before) and len(kept) < 300
    with torch.no_grad():
        expected, found = whole(before).logits[..., kept], model(after).logits
    assert torch.equal(found, expected)
    assert smaller.parameter_count() < program.parameter_count()


def test_ids_in_configs_follow(checkpoint: Path, tmp_path: Path) -> None:
    program = loaded(checkpoint)
    vocabulary = vocabulary_of_text(program, checkpoint / "seen.txt", count=3)
    vocabulary.save(vocabulary.trimmed(), tmp_path / "out")
    new = {vocabulary.tokens[at]: at for at in range(len(vocabulary.kept))}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == len(new)
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [
        new[SPECIAL[at]] for at in (1, 2, 0)
    ]
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["suppress_tokens"] == [new["<s>"]]
    assert not (tmp_path / "out/merges.txt").exists()
    ids = json.loads((tmp_path / "out/vocabulary.json").read_text())["old ids"]
    assert ids == list(vocabulary.kept)
    before = json.loads((checkpoint / "config.json").read_text())
    assert before["eos_token_id"] == 2 and program.source.config.eos_token_id == 2


def test_lists_are_checked(checkpoint: Path) -> None:
    program = loaded(checkpoint)
    with pytest.raises(UsageError, match=r"no token 'Ġthee'; did you mean 'Ġthe'"):
        vocabulary_of_list(program, [*SPECIAL, "Ġthee"])
    with pytest.raises(UsageError, match=r"special tokens have to stay, and the list lacks '</s>'"):
        vocabulary_of_list(program, ["<unk>", "<s>", "Ġthe"])
    found = vocabulary_of_list(program, [*SPECIAL, "Ġthe"])
    assert {"Ġthe", "the", "Ġ"} & set(found.tokens) and "Ġcat" not in found.tokens
    with pytest.raises(UsageError, match="count 0 is not positive"):
        vocabulary_of_text(program, checkpoint / "seen.txt", count=0)


def test_a_model_without_a_fast_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(checkpoint, tmp_path / "slow")
    (tmp_path / "slow/tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        vocabulary_of_text(gp.load(tmp_path / "slow"), checkpoint / "seen.txt")


class ByNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(input_ids) * (input_ids != 3)[..., None])
        return out


class Mixed(ByNumber):
    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.head(self.embedding(input_ids))
        out: Tensor = self.head(logits.softmax(-1) @ self.embedding.weight)
        return out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ByNumber(), r"tokens are used by number, at aten.ne"),
        (Mixed(), r"the vocabulary is used as a whole, at aten.matmul"),
    ],
)
def test_other_uses_of_tokens_are_refused(model: nn.Module, message: str) -> None:
    program = gp.capture(model.eval(), (torch.zeros(2, 5, dtype=torch.int64),))
    with pytest.raises(RewriteError, match=message):
        with_tokens(program, [0, 1, 2])


def test_the_command_line_says_what_became_of_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from graphprune.cli.main import app

    out, text = tmp_path / "out", checkpoint / "seen.txt"
    given = ["trim-vocabulary", str(checkpoint), "-o", str(out)]
    app([*given, "--text", str(text)], standalone_mode=False)
    assert "tokens 304 -> " in capsys.readouterr().out
    assert (out / "vocabulary.json").is_file()
    with pytest.raises(UsageError, match="by --text FILE or by --keep FILE"):
        app(given, standalone_mode=False)
