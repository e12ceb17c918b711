"""Tokens of texts: tokenizers, and batches of windows without padding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx

from graphprune.errors import CalibrationError, GraphPruneError, first_line
from graphprune.io.companions import has_tokenizer
from graphprune.io.paths import path_of
from graphprune.io.text_sources import Document, Messages
from graphprune.ir.program import PAST

if TYPE_CHECKING:
    from graphprune.ir.program import Program

_EMBEDDING = torch.ops.aten.embedding.default


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is needed."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Return the token ids of `text` under ``input_ids``."""
        ...  # pragma: no cover


TokenizerLike = Tokenizer | str | PathLike[str]
"""A transformers tokenizer, or the directory that holds one."""


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of documents one after the other, to be cut into windows.

    Parameters
    ----------
    ids
        ``[tokens]``.
    first
        What every window begins with: what the tokenizer puts before a text by itself, such as
        its ``bos``, since a model that was trained with that predicts badly without. Empty where
        it puts nothing there, or none was wanted.
    tokenizer
        A digest of the tokenizer's vocabulary; "" where it has none to look at.
    """

    ids: Tensor
    first: tuple[int, ...] = ()
    tokenizer: str = ""

    def windows(self, length: int) -> Tensor:
        """Return all windows of `length` tokens, ``[windows, length]``, which do not overlap.

        What is left over at the end is not used.
        """
        inside = length - len(self.first)
        if inside < 1:
            return self.ids.new_empty(0, length)
        rows = self.ids[: len(self.ids) // inside * inside].view(-1, inside)
        start = self.ids.new_tensor(self.first).expand(len(rows), -1)
        return torch.cat([start, rows], 1)


def tokenize(
    documents: Sequence[Document],
    tokenizer: TokenizerLike,
    error: type[GraphPruneError] = CalibrationError,
    *,
    first_token: bool = True,
) -> TokenStream:
    """Return the tokens of all documents, with an end-of-text token between them if there is one.

    Conversations go through the tokenizer's chat template.

    Parameters
    ----------
    documents
        From `graphprune.io.text_sources.read_documents`.
    tokenizer
        The model's tokenizer, or the directory that holds it.
    error
        The class of errors to raise.
    first_token
        Whether windows begin with what the tokenizer puts before a text by itself.

    Raises
    ------
    GraphPruneError
        Of the class `error`, when the tokenizer cannot be read, or has no template for a
        conversation.
    """
    if isinstance(tokenizer, (str, PathLike)):
        tokenizer = load_tokenizer(tokenizer, error)
    first, end = first_tokens(tokenizer), getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for document in documents:
        if ids and end is not None and ids[-1] != end:
            ids.append(end)
        if isinstance(document, str):
            # Not verbose: that a text is longer than the model takes does not matter to windows.
            ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            found = _chat(document, tokenizer, error)
            ids += found[len(first) :] if tuple(found[: len(first)]) == first else found
    start = first if first_token else ()
    return TokenStream(torch.tensor(ids, dtype=torch.int64), start, vocabulary_digest(tokenizer))


def vocabulary_digest(tokenizer: object) -> str:
    """Return a digest of the tokens that `tokenizer` knows; "" where it does not tell."""
    known: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    listed = json.dumps(sorted(known.items())).encode()
    return hashlib.sha256(listed).hexdigest()[:12] if known else ""


def first_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that `tokenizer` puts before every text by itself.

    They are read off what it makes of a text: whether it adds a token that it has is up to it.
    """
    probe = "a"
    bare = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer(probe, verbose=False)["input_ids"])
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)]) if bare else ()


def _chat(messages: Messages, tokenizer: Any, error: type[GraphPruneError]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise error("the text holds conversations, and the tokenizer has no chat template")
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    except Exception as cause:
        raise error(f"the chat template refuses a conversation: {first_line(cause)}") from cause


def load_tokenizer(
    directory: str | PathLike[str], error: type[GraphPruneError] = CalibrationError
) -> Tokenizer:
    """Return the transformers tokenizer in `directory`, or of that hub name.

    Raises
    ------
    GraphPruneError
        Of the class `error`, when there is none.
    """
    from transformers import AutoTokenizer

    path = path_of(directory, error)
    if path.is_dir() and not has_tokenizer(path):
        # transformers would make one up of the model's type alone.
        raise error(f"{directory} holds no tokenizer: there is no file of one")
    try:
        return AutoTokenizer.from_pretrained(str(directory))
    except Exception as cause:
        raise error(
            f"{directory} holds no tokenizer that can be read: {first_line(cause)}"
        ) from cause


def token_batch(ids: Tensor) -> dict[str, Tensor]:
    """Return the inputs for windows of tokens without padding, ``[batch, length]``."""
    return {"input_ids": ids.contiguous(), "attention_mask": torch.ones_like(ids)}


def text_inputs(
    program: Program, batch: Mapping[str, Tensor], error: type[GraphPruneError] = CalibrationError
) -> dict[str, Tensor]:
    """Return what `program` takes of a `token_batch`; an encoder and a decoder get the same tokens.

    Raises
    ------
    GraphPruneError
        Of the class `error`, when it takes something that cannot be made of a text, naming it.
    """
    if problem := why_no_text(program):
        raise error(problem)
    names = {value.name for value in program.inputs}
    given = {name: tensor for name, tensor in batch.items() if name in names}
    return given | {name: batch["input_ids"] for name in names if name.endswith("input_ids")}


def why_no_text(program: Program) -> str:
    """Say which input of `program` cannot be made of a text; "" where all can."""
    names = [value.name for value in program.inputs if not value.name.startswith(PAST)]
    missing = [name for name in names if not name.endswith(("_ids", "attention_mask"))]
    if not missing and any(name.endswith("input_ids") for name in names):
        return ""
    return f"the program takes {(missing or names)[0]!r}, which cannot be made of a text"


def check_takes_text(program: Program) -> None:
    """Raise `CalibrationError` for a program that takes what cannot be made of a text."""
    if problem := why_no_text(program):
        raise CalibrationError(
            f"{problem}: give --calibration FILE.safetensors with inputs by name (in Python "
            "Calibration.from_tensors or from_batches)"
        )


def unfit_tokens(program: Program, batch: Mapping[str, Tensor]) -> str:
    """Return what is wrong with the tokens of a batch, or "".

    `program` may have no row for one, or an attention mask be of another shape, where no cache is.
    """
    cached = any(name.startswith(PAST) for name in batch)
    for name in () if cached else (name for name in batch if name.endswith("attention_mask")):
        mask, ids = batch[name], batch.get(name.removesuffix("attention_mask") + "input_ids")
        if ids is not None and mask.shape != ids.shape:
            return f"{name!r} is {tuple(mask.shape)}, and its tokens are {tuple(ids.shape)}"
    ids = batch.get("input_ids")
    vocabulary = None if ids is None else _vocabulary(program)
    if ids is None or vocabulary is None:
        return ""
    if (lowest := int(ids.min())) < 0:
        return f"there is a token {lowest}: tokens are numbers from 0 on"
    if (highest := int(ids.max())) < vocabulary:
        return ""
    return (
        f"the tokenizer does not belong to the model: it made token {highest}, "
        f"the vocabulary has {vocabulary}"
    )


def _vocabulary(program: Program) -> int | None:
    """Return how many rows the table has that ``input_ids`` pick from; None if that is not told."""
    for value, node in program.input_nodes():
        if value.name != "input_ids":
            continue
        tables = (user.args[0] for user in node.users if user.target is _EMBEDDING)
        sizes = [table.meta["val"].shape[0] for table in tables if isinstance(table, fx.Node)]
        return min((size for size in sizes if isinstance(size, int)), default=None)
    return None
