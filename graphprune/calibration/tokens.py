"""Tokens of texts: tokenizers, and batches of windows without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from graphprune.errors import CalibrationError, GraphPruneError, first_line

if TYPE_CHECKING:
    from graphprune.ir.program import Program


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Return the token ids of `text` under ``input_ids``."""
        ...  # pragma: no cover


TokenizerLike = Tokenizer | str | PathLike[str]
"""A transformers tokenizer, or the directory that holds one."""


def tokenize(
    documents: Sequence[str],
    tokenizer: TokenizerLike,
    error: type[GraphPruneError] = CalibrationError,
) -> Tensor:
    """Return the tokens of all documents, one after the other, ``[tokens]``.

    No special tokens are added, but for an end-of-text token between documents if there is one.

    Raises
    ------
    GraphPruneError
        Of the class `error`, when the tokenizer cannot be read.
    """
    if isinstance(tokenizer, (str, PathLike)):
        tokenizer = load_tokenizer(tokenizer, error)
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for document in documents:
        if ids and end is not None:
            ids.append(end)
        # Not verbose: that the text is longer than the model allows does not matter to its windows.
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


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

    try:
        return AutoTokenizer.from_pretrained(str(directory))
    except Exception as cause:
        raise error(f"{directory} holds no tokenizer: {first_line(cause)}") from cause


def token_batch(ids: Tensor) -> dict[str, Tensor]:
    """Return the inputs for windows of tokens without padding, ``[batch, length]``."""
    return {"input_ids": ids.contiguous(), "attention_mask": torch.ones_like(ids)}


def beyond_vocabulary(program: Program, ids: Tensor | None) -> str:
    """Return what is wrong with `ids` if `program` has no logit for one of them, else ""."""
    logits = next((value for value in program.outputs if value.name == "logits"), None)
    if ids is None or logits is None or not isinstance(logits.shape[-1], int):
        return ""
    if (highest := int(ids.max())) < logits.shape[-1]:
        return ""
    return (
        f"the tokenizer does not belong to the model: it made token {highest}, "
        f"the vocabulary has {logits.shape[-1]}"
    )
