"""Calibration data: a few short windows of text, or any batches of inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from graphprune.errors import CalibrationError, GraphPruneError

if TYPE_CHECKING:
    from graphprune.program import Program


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """The token ids of `text` under ``input_ids``."""
        ...  # pragma: no cover


TokenizerLike = Tokenizer | str | PathLike[str]
"""A transformers tokenizer, or the directory that holds one."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches of inputs to measure a program on; iterable as often as needed.

    Parameters
    ----------
    batches
        Input tensors by name; the first dimension of each counts samples.
    kind
        "text" or "batches".
    sha256
        A digest of every tensor, for reports.
    samples
        Samples in all batches together.
    length
        Tokens of each sample, or None where batches differ or hold no tokens.
    seed
        What the windows were drawn with, or None.
    """

    batches: tuple[Mapping[str, Tensor], ...]
    kind: Literal["text", "batches"]
    sha256: str
    samples: int
    length: int | None
    seed: int | None = None

    @classmethod
    def from_text(
        cls,
        path: str | PathLike[str],
        tokenizer: TokenizerLike,
        *,
        samples: int = 10,
        length: int = 64,
        batch_size: int = 8,
        seed: int = 0,
    ) -> Calibration:
        """Windows of a text that do not overlap, drawn at random.

        The defaults are those of LLM-Pruner (Ma et al., 2023, section 4.1), which draws ten windows
        of 64 tokens.

        Parameters
        ----------
        path
            A UTF-8 text, or JSON lines (``.jsonl``) with a field ``text``.
        tokenizer
            The model's transformers tokenizer, or the directory that holds it.
        samples
            How many windows.
        length
            Tokens of each window.
        batch_size
            Windows that a batch holds at most.
        seed
            Which windows, and their order.

        Raises
        ------
        CalibrationError
            When the file is missing, empty, not UTF-8 or too short, or there is no tokenizer.

        Examples
        --------
        >>> from graphprune import reference
        >>> text, directory = reference.calibration_text(), reference.checkpoint_dir()
        >>> Calibration.from_text(text, directory, samples=4, length=16).tokens
        64
        """
        for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
            if value < 1:
                raise CalibrationError(f"{name} must be at least 1, not {value}")
        ids = tokenize(read_documents(path), tokenizer)
        if len(ids) < samples * length:
            raise CalibrationError(
                f"{path} has {len(ids)} tokens; "
                f"{samples} samples of {length} need {samples * length}"
            )
        windows = ids[: len(ids) // length * length].view(-1, length)
        generator = torch.Generator().manual_seed(seed)
        drawn = windows[torch.randperm(len(windows), generator=generator)[:samples]]
        batches = tuple(token_batch(chunk) for chunk in drawn.split(batch_size))
        return cls(batches, "text", _digest(batches), samples, length, seed)

    @classmethod
    def from_batches(cls, batches: Sequence[Mapping[str, Tensor]]) -> Calibration:
        """Batches that are ready: inputs of the program by name.

        Parameters
        ----------
        batches
            Tensors by input name, the first dimension of each the batch. They are not copied.

        Raises
        ------
        CalibrationError
            When there are none, or one holds something else than tensors.

        Examples
        --------
        >>> calibration = Calibration.from_batches([{"x": torch.zeros(2, 3)}])
        >>> calibration.samples, [batch["x"].shape for batch in calibration]
        (2, [torch.Size([2, 3])])
        """
        held = tuple(dict(batch) for batch in batches)
        if not held:
            raise CalibrationError("there are no calibration batches")
        for index, batch in enumerate(held):
            _check_batch(index, batch)
        lengths = {batch["input_ids"].shape[-1] if "input_ids" in batch else None for batch in held}
        length = lengths.pop() if len(lengths) == 1 else None
        return cls(held, "batches", _digest(held), sum(map(_rows, held)), length)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield dict(batch)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def tokens(self) -> int:
        """Tokens in all batches together (0 where the inputs are no tokens); padding counts."""
        return sum(batch["input_ids"].numel() for batch in self.batches if "input_ids" in batch)

    def check(self, program: Program) -> None:
        """Refuse batches that `program` cannot take.

        Raises
        ------
        CalibrationError
            When an input is unknown, or a token lies beyond the vocabulary.
        """
        names = [value.name for value in program.inputs]
        for batch in self.batches:
            if unknown := [name for name in batch if name not in names]:
                raise CalibrationError(
                    f"calibration holds {unknown[0]!r}; the program takes {', '.join(names)}"
                )
            if problem := beyond_vocabulary(program, batch.get("input_ids")):
                raise CalibrationError(problem)

    def describe(self) -> dict[str, Any]:
        """What a report says about it.

        Returns
        -------
        dict
            ``kind``, ``sha256``, ``samples``, ``length`` and ``seed``.
        """
        return {
            "kind": self.kind,
            "sha256": self.sha256,
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
        }


def next_token_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy of every next token, in nats; differentiable.

    Parameters
    ----------
    logits
        ``[batch, length, vocabulary]``.
    batch
        ``input_ids`` ``[batch, length]`` and, where some tokens are padding, ``attention_mask``
        of the same shape, zero for tokens that are neither predicted nor counted.

    Returns
    -------
    Tensor
        A float32 scalar.

    Raises
    ------
    CalibrationError
        When the shapes do not belong together, or there is nothing to predict.

    Examples
    --------
    >>> logits = torch.zeros(1, 3, 8)
    >>> loss = next_token_loss(logits, {"input_ids": torch.tensor([[1, 2, 3]])})
    >>> round(loss.exp().item(), 3)
    8.0
    """
    ids = batch.get("input_ids")
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        shape = None if ids is None else tuple(ids.shape)
        raise CalibrationError(
            "a next-token loss needs logits [batch, length, vocabulary] and input_ids "
            f"[batch, length], not {tuple(logits.shape)} and {shape}"
        )
    counted = predicted(batch)
    if not counted.any():
        raise CalibrationError("there is no next token to predict: a window needs two tokens")
    return functional.cross_entropy(logits[:, :-1][counted].float(), ids[:, 1:][counted])


def predicted(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens after the first are predicted, ``[batch, length - 1]``, as truth values."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return mask[:, 1:].bool() & mask[:, :-1].bool()


def token_batch(ids: Tensor) -> dict[str, Tensor]:
    """The inputs for windows of tokens without padding, ``[batch, length]``."""
    return {"input_ids": ids.contiguous(), "attention_mask": torch.ones_like(ids)}


def beyond_vocabulary(program: Program, ids: Tensor | None) -> str:
    """What is wrong with `ids` if they hold a token that `program` has no logit for, else ""."""
    logits = next((value for value in program.outputs if value.name == "logits"), None)
    if ids is None or logits is None or not isinstance(logits.shape[-1], int):
        return ""
    if (highest := int(ids.max())) < logits.shape[-1]:
        return ""
    return (
        f"the tokenizer does not belong to the model: it made token {highest}, "
        f"the vocabulary has {logits.shape[-1]}"
    )


# -- reading ------------------------------------------------------------------------------------


def read_documents(
    path: str | PathLike[str], refuse: type[GraphPruneError] = CalibrationError
) -> list[str]:
    """The documents of a text file: one, or one per line of JSON lines (``.jsonl``).

    Raises
    ------
    GraphPruneError
        Of the class `refuse`, when the file is missing, empty or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise refuse(f"{path} is a directory" if path.is_dir() else f"{path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"{path} is not UTF-8: byte {error.start} cannot be decoded") from error
    except OSError as error:
        raise refuse(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise refuse(f"{path} is empty")
    if path.suffix != ".jsonl":
        return [text]
    lines = enumerate(text.splitlines(), 1)
    return [_document(path, number, line, refuse) for number, line in lines if line.strip()]


def tokenize(
    documents: Sequence[str],
    tokenizer: TokenizerLike,
    refuse: type[GraphPruneError] = CalibrationError,
) -> Tensor:
    """The tokens of all documents, one after the other, ``[tokens]``.

    No special tokens are added, but for an end-of-text token between documents if there is one.

    Raises
    ------
    GraphPruneError
        Of the class `refuse`, when the tokenizer cannot be read.
    """
    if isinstance(tokenizer, (str, PathLike)):
        tokenizer = load_tokenizer(tokenizer, refuse)
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for document in documents:
        if ids and end is not None:
            ids.append(end)
        # Not verbose: that the text is longer than the model allows does not matter to its windows.
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def load_tokenizer(
    directory: str | PathLike[str], refuse: type[GraphPruneError] = CalibrationError
) -> Tokenizer:
    """The transformers tokenizer in `directory`, or of that hub name.

    Raises
    ------
    GraphPruneError
        Of the class `refuse`, when there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise refuse(f"{directory} holds no tokenizer: {reason[0]}") from error


def _document(path: Path, number: int, line: str, refuse: type[GraphPruneError]) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(f"{path}:{number} is not JSON: {error.msg}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise refuse(f"{path}:{number} has no field 'text' that holds a text")
    return str(record["text"])


def _check_batch(index: int, batch: Mapping[str, Any]) -> None:
    if not batch:
        raise CalibrationError(f"calibration batch {index} is empty")
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise CalibrationError(f"calibration batch {index}: {name!r} is a {kind}, no tensor")
        if not tensor.ndim or not tensor.numel():
            shape = tuple(tensor.shape)
            raise CalibrationError(f"calibration batch {index}: {name!r} has no samples: {shape}")


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
