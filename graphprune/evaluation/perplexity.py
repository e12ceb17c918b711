"""Perplexity: how well a program predicts a text."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.losses import looks_back_only, next_token_loss, predicted
from graphprune.calibration.tokens import TokenizerLike, token_batch, tokenize, unfit_tokens
from graphprune.errors import PROGRAMS, EvaluationError, refuse_other
from graphprune.io.progress import DisplayFactory, display_factory, progress_bar
from graphprune.io.text_sources import Document, read_documents
from graphprune.ir.program import Program


@dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`.

    Parameters
    ----------
    perplexity
        ``exp(loss)``.
    loss
        Mean negative log-likelihood of the predicted tokens, in nats.
    tokens
        How many tokens were predicted.
    length
        Tokens of each window.
    sha256
        A digest of the windows: equal for two programs measured on the same tokens.
    first
        The tokens that every window begins with, because the tokenizer puts them there by itself.
    """

    perplexity: float
    loss: float
    tokens: int
    length: int
    sha256: str
    first: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def perplexity(
    program: Program,
    text: str | PathLike[str],
    tokenizer: TokenizerLike,
    *,
    length: int = 256,
    batch_size: int = 4,
    max_tokens: int | None = None,
    first_token: bool = True,
    progress: bool | DisplayFactory = False,
) -> Perplexity:
    """Measure the perplexity of a causal language model on a text.

    The text is cut into windows of `length` tokens that do not overlap, and what is left over at
    the end is not used. In every window each token after the first is predicted from those before.
    The first is what the tokenizer puts before a text by itself, if it does so, since the model was
    trained that way: without it, a model may look several times worse than it is.

    Parameters
    ----------
    program
        A causal language model, with ``input_ids`` in and ``logits`` out.
    text
        A file (UTF-8, or JSON lines with a field ``text``), or the text itself if it holds a space
        or line break and no file has that name.
    tokenizer
        The model's transformers tokenizer, or the directory that holds it.
    length
        Tokens of each window.
    batch_size
        Windows that are run at once.
    max_tokens
        Use no more than the first so many tokens of the text.
    first_token
        Whether windows begin with what the tokenizer puts before a text by itself.
    progress
        Whether to show a progress bar, or what makes one.

    Raises
    ------
    EvaluationError
        When the program is no causal language model, the text cannot be read or is too short for
        one window, or a window is too long for the model.
    """
    refuse_other(program, than=Program, how=PROGRAMS)
    if problem := why_not_causal(program):
        raise EvaluationError(f"perplexity needs a causal language model{problem}")
    windows, first = _windows(program, text, tokenizer, length, max_tokens, first_token)
    show = display_factory() if progress is True else (progress or None)
    total, count = 0.0, 0
    with progress_bar(show, "measuring perplexity", total=len(windows)) as advance, torch.no_grad():
        batches = [token_batch(chunk) for chunk in windows.split(batch_size)]
        for batch, logits in zip(batches, logits_of_all(program, batches, "logits"), strict=True):
            tokens = int(predicted(batch).sum())
            total += next_token_loss(logits, batch).item() * tokens
            count += tokens
            advance(len(batch["input_ids"]))
    loss = total / count
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return Perplexity(_exp(loss), loss, count, length, digest, first)


def text_windows(
    program: Program,
    text: str | PathLike[str],
    tokenizer: TokenizerLike,
    *,
    length: int = 256,
    max_tokens: int | None = None,
    first_token: bool = True,
) -> Tensor:
    """Cut a text into the windows that `perplexity` measures, ``[windows, length]``.

    Raises
    ------
    EvaluationError
        When the text cannot be read or is too short for one window, or a window is too long for
        the model.
    """
    return _windows(program, text, tokenizer, length, max_tokens, first_token)[0]


def _windows(
    program: Program,
    text: str | PathLike[str],
    tokenizer: TokenizerLike,
    length: int,
    max_tokens: int | None,
    first_token: bool,
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the windows of a text, and the tokens that each begins with."""
    _check_length(program, length)
    documents = _documents(text)
    stream = tokenize(documents, tokenizer, EvaluationError, first_token=first_token)
    stream = dataclasses.replace(stream, ids=stream.ids[:max_tokens])
    windows = stream.windows(length)
    if not len(windows):
        limit = "" if max_tokens is None or max_tokens >= length else f" of {max_tokens} allowed"
        what = "the text" if documents == [text] else text
        raise EvaluationError(
            f"{what} has {len(stream.ids)} tokens{limit}; a window takes {length}"
        )
    if problem := unfit_tokens(program, {"input_ids": windows}):
        raise EvaluationError(problem)
    return windows, stream.first


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < math.log(float("1e308")) else math.inf


def _documents(text: str | PathLike[str]) -> list[Document]:
    if not isinstance(text, str) or not any(map(str.isspace, text)) or _is_file(text):
        return read_documents(text, EvaluationError)
    if not text.strip():
        raise EvaluationError("the text is empty")
    return [text]


def _is_file(text: str) -> bool:
    # No file system has names of a thousand characters, and some raise when asked.
    return len(text) < 1000 and "\n" not in text and Path(text).is_file()


def why_not_causal(program: Program) -> str:
    """Say what a program lacks of a causal language model, to follow the words; "" for nothing."""
    inputs = {value.name for value in program.inputs}
    logits = next((value for value in program.outputs if value.name == "logits"), None)
    if "input_ids" not in inputs or logits is None or len(logits.shape) != 3:
        return (
            ": input_ids in and logits [batch, length, vocabulary] out; this one takes "
            f"{', '.join(sorted(inputs))}"
        )
    # A decoder captured without its cache has nothing in its graph that says so.
    if not looks_back_only(program, token_batch(torch.zeros((2, 6), dtype=torch.int64))):
        return "; in this one a token's logits depend on the tokens after it"
    return ""


def _check_length(program: Program, length: int) -> None:
    if length < 2:
        raise EvaluationError(f"a window needs two tokens at least, not {length}")
    longest = program.context_length
    if longest is not None and length > longest:
        raise EvaluationError(f"a window of {length} tokens is longer than the model's {longest}")
