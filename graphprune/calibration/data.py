"""Calibration data: a few short windows of text, or any batches of inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from graphprune import ranks
from graphprune.calibration.tokens import (
    TokenizerLike,
    TokenStream,
    check_takes_text,
    text_inputs,
    token_batch,
    tokenize,
    unfit_tokens,
)
from graphprune.errors import CalibrationError
from graphprune.io.tensor_sources import draw_samples
from graphprune.io.text_sources import read_documents
from graphprune.weights.tensors import digest

if TYPE_CHECKING:
    from graphprune.ir.program import Program, Value

_MOST = 2**24
"""Characters of a source that windows are drawn from: bounds memory, and a stream's length."""

SAMPLES, LENGTH = 10, 64
"""Windows, and tokens of each, where nobody asks for others."""

LONG = 256
"""Tokens of a window where many are needed: so few of them are first tokens, which are unlike."""

_HELD_OUT = 2048
"""Tokens that are held out at most."""

LABELS = "labels"
"""What is known of a sample beside the inputs of the program, for the loss."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches of inputs, such as windows of text, that a program is measured on.

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
    labels
        The labels of each batch, or None where tokens are predicted.
    held_out
        More windows of the same text, none of which is among `batches`: to measure on what nothing
        was fitted to. Empty where the text is too short, and for batches that were given.
    first
        The tokens that every window begins with, because the tokenizer puts them there by itself.
    tokenizer
        A digest of the tokenizer's vocabulary, or "".
    wanted
        The tokens that passes asked for; 0 where none did. Fewer than that is a text too short.
    text
        What more windows can be drawn from.
    """

    batches: tuple[Mapping[str, Tensor], ...] = field(repr=False)
    kind: Literal["text", "batches"]
    sha256: str
    samples: int
    length: int | None
    seed: int | None = None
    labels: tuple[Tensor, ...] | None = field(default=None, repr=False)
    held_out: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False)
    first: tuple[int, ...] = ()
    tokenizer: str = ""
    wanted: int = 0
    text: _Text | None = field(default=None, repr=False)

    @classmethod
    def from_text(
        cls,
        source: str | PathLike[str],
        tokenizer: TokenizerLike,
        *,
        samples: int | None = None,
        length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        first_token: bool = True,
    ) -> Calibration:
        """Draw windows of a text that do not overlap, at random.

        By default ten windows of 64 tokens, as LLM-Pruner draws them (Ma et al., 2023, section
        4.1), which suit a gradient; a pipeline that needs more draws them: see `enough_for`.

        Parameters
        ----------
        source
            A text, JSON lines or a data set, as `graphprune.io.text_sources` writes them; no more
            than its first 16 million characters are read.
        tokenizer
            The model's transformers tokenizer, or the directory that holds it.
        samples
            How many windows; left out, as many as the passes need.
        length
            Tokens of each window, the first among them; left out, as long as the passes need.
        batch_size
            Windows that a batch holds at most.
        seed
            Which windows, and their order.
        first_token
            Whether windows begin as the model was trained: with what its tokenizer puts before a
            text by itself, such as ``bos``.

        Raises
        ------
        CalibrationError
            When the source is missing, empty, not UTF-8 or too short, or there is no tokenizer.

        Examples
        --------
        >>> from graphprune import reference
        >>> text, directory = reference.calibration_text(), reference.checkpoint_dir()
        >>> Calibration.from_text(text, directory, samples=4, length=16).tokens
        64
        """
        given = {"samples": samples, "length": length, "batch_size": batch_size}
        for name, value in given.items():
            if value is not None and value < 1:
                raise CalibrationError(f"{name} must be at least 1, not {value}")
        documents = read_documents(source, most=_MOST)
        stream = tokenize(documents, tokenizer, first_token=first_token)
        text = _Text(str(source), stream, batch_size, seed, samples is None, length is None)
        return text.drawn(samples or SAMPLES, length or LENGTH)

    def enough_for(self, tokens: int, longest: int | None = None) -> Calibration:
        """Return calibration of at least so many tokens, where its size was left open.

        Parameters
        ----------
        tokens
            How many tokens are needed.
        longest
            The longest window that the model takes, if that is known.

        Returns
        -------
        Calibration
            Itself where it is enough or its size was asked for. Where the text is too short, all
            of it but what is held out; `wanted` tells how many tokens there should have been.
        """
        if self.text is None or not self.text.may_grow or self.tokens >= tokens:
            return dataclasses.replace(self, wanted=max(tokens, self.wanted))
        length = self.length or LENGTH
        if self.text.any_length:
            length = min(LONG, longest or LONG)
        found = self.text.drawn(-(-tokens // length), length, short=True)
        return dataclasses.replace(found, wanted=tokens)

    def with_room(self, part: float) -> Calibration:
        """Return these windows, of which there will be no more, or fewer of them.

        Fewer where less than `part` of the text is beside them, and nobody counted them.
        """
        if self.text is None or not self.text.may_grow:
            return self
        length = self.length or LENGTH
        most = max(int(len(self.text.stream.windows(length)) * (1 - part)), 1)
        text = dataclasses.replace(self.text, may_grow=False)
        return text.drawn(min(self.samples, most), length)

    def further(self, tokens: int) -> tuple[Mapping[str, Tensor], ...]:
        """Return windows of the same text that are neither among these nor held out, if any.

        They are as long as these, and no more than `tokens` take.
        """
        if self.text is None or self.length is None:
            return ()
        beside = sum(map(_rows, self.held_out))
        return self.text.windows(self.length, self.samples + beside, -(-tokens // self.length))

    @classmethod
    def from_batches(cls, batches: Sequence[Mapping[str, Tensor]]) -> Calibration:
        """Take batches that are ready: inputs of the program by name.

        Parameters
        ----------
        batches
            Tensors by input name, the first dimension of each the batch. They are not copied.
            Beside them each may have integer ``labels``, which are no input but what the loss is
            measured against: see `task_loss`.

        Raises
        ------
        CalibrationError
            When there are none, one holds something else than tensors, or not all have labels.

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
        sha256, samples = digest(held), sum(map(_rows, held))
        labels = tuple(batch.pop(LABELS) for batch in held if LABELS in batch)
        if labels and len(labels) < len(held):
            raise CalibrationError(f"{len(labels)} of {len(held)} calibration batches have labels")
        return cls(held, "batches", sha256, samples, length, labels=labels or None)

    @classmethod
    def from_tensors(
        cls,
        source: str | PathLike[str],
        *,
        samples: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> Calibration:
        """Draw samples from a safetensors file of inputs, such as images or sounds.

        A tenth of what the file holds, at most 256 samples, is held out to measure on.

        Parameters
        ----------
        source
            Tensors by input name, the first dimension of each the samples; ``labels`` as
            `from_batches` takes them.
        samples
            How many; all that are not held out if left out.
        batch_size
            Samples that a batch holds at most.
        seed
            Which samples, and their order.

        Raises
        ------
        CalibrationError
            When the file cannot be read, holds no samples, or fewer than are asked for.
        """
        chosen, held_out = draw_samples(source, samples, seed)
        found = cls.from_batches(split_samples(chosen, batch_size))
        inputs = tuple(inputs_of(batch) for batch in split_samples(held_out, batch_size))
        return dataclasses.replace(found, held_out=inputs, seed=seed)

    def for_program(self, program: Program) -> Calibration:
        """Return calibration of text with the inputs that `program` takes; batches as they are.

        Raises
        ------
        CalibrationError
            When it takes something that cannot be made of a text.
        """
        if self.kind != "text":
            return self
        check_takes_text(program)
        batches, held_out = (
            tuple(text_inputs(program, batch) for batch in each)
            for each in (self.batches, self.held_out)
        )
        return dataclasses.replace(self, batches=batches, held_out=held_out)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield dict(batch)

    def labeled(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches, each with its labels, if it has some, under ``labels``."""
        for index, batch in enumerate(self.batches):
            yield {**batch, **({LABELS: self.labels[index]} if self.labels else {})}

    def singly(self) -> Iterator[dict[str, Tensor]]:
        """Yield every sample as a batch of one, with its label if there are any."""
        for batch in self.labeled():
            for row in range(_rows(batch)):
                yield {name: tensor[row : row + 1] for name, tensor in batch.items()}

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
            When an input is unknown, is of another dtype or shape than the program takes, or a
            token lies beyond the vocabulary.
        """
        values = {value.name: value for value in program.inputs}
        for index, batch in enumerate(self.batches):
            for name, tensor in batch.items():
                if name not in values:
                    raise CalibrationError(
                        f"calibration holds {name!r}; the program takes {', '.join(values)}"
                    )
                if not _fits(tensor, values[name]):
                    sizes = ", ".join(map(str, values[name].shape))
                    raise CalibrationError(
                        f"calibration batch {index}: {name!r} is {tuple(tensor.shape)} of "
                        f"{tensor.dtype}; the program takes ({sizes}) of {values[name].dtype}"
                    )
            if problem := unfit_tokens(program, batch):
                raise CalibrationError(problem)

    def describe(self) -> dict[str, Any]:
        """Return what a report says about it.

        Returns
        -------
        dict
            ``kind``, ``source`` (a text's name, else ""), ``sha256``, ``samples``, ``length``,
            ``tokens``, ``wanted`` (0: not asked for), ``first tokens``, ``tokenizer``, ``seed``.
        """
        return {
            "kind": self.kind,
            "source": "" if self.text is None else Path(self.text.source).name,
            "sha256": self.sha256,
            "samples": self.samples,
            "length": self.length,
            "tokens": self.tokens,
            "wanted": self.wanted,
            "first tokens": list(self.first),
            "tokenizer": self.tokenizer,
            "seed": self.seed,
        }


@dataclass(frozen=True, eq=False)
class _Text:
    """A text that windows are drawn from, the same ones for the same seed."""

    source: str
    stream: TokenStream
    batch_size: int
    seed: int
    may_grow: bool
    any_length: bool

    def drawn(self, samples: int, length: int, *, short: bool = False) -> Calibration:
        """Return so many windows; where there are fewer, all if `short` will do."""
        windows = self.stream.windows(length)
        spare = -(-_HELD_OUT // length)
        if short:
            samples = max(min(samples, len(windows) - min(spare, len(windows) // 10)), 1)
        if len(windows) < samples:
            raise CalibrationError(
                f"{self.source} has {len(self.stream.ids)} tokens; "
                f"{samples} samples of {length} need {samples * (length - len(self.stream.first))}"
            )
        batches = self.windows(length, 0, samples)
        held_out = self.windows(length, samples, spare)
        return Calibration(
            batches,
            "text",
            digest(batches),
            samples,
            length,
            self.seed,
            held_out=held_out,
            first=self.stream.first,
            tokenizer=self.stream.tokenizer,
            text=self,
        )

    def windows(self, length: int, start: int, count: int) -> tuple[Mapping[str, Tensor], ...]:
        """Return batches of up to `count` windows from number `start` on, in a random order."""
        windows = self.stream.windows(length)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.seed))
        return tuple(map(token_batch, self._divided(windows[order[start : start + count]])))

    def _divided(self, windows: Tensor) -> Sequence[Tensor]:
        """Return windows in as few batches as will do, about equal ones."""
        return windows.tensor_split(-(-len(windows) // self.batch_size)) if len(windows) else ()


def own_batches(batches: Sequence[Mapping[str, Tensor]]) -> range:
    """Return which of `batches` are run by this process, where several divide them."""
    return ranks.own([next(iter(batch.values())).numel() for batch in batches])


def split_samples(samples: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Divide samples into batches of `size` at most."""
    parts = (slice(at, at + size) for at in range(0, _rows(samples), size))
    return [{name: tensor[part] for name, tensor in samples.items()} for part in parts]


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of `Calibration.labeled` without its labels."""
    return {name: tensor for name, tensor in batch.items() if name != LABELS}


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
    labels, rows = batch.get(LABELS), [len(tensor) for tensor in inputs_of(batch).values()]
    if labels is not None and (labels.dtype != torch.int64 or rows[:1] != [len(labels)]):
        raise CalibrationError(
            f"calibration batch {index}: labels {tuple(labels.shape)} of {labels.dtype} do not fit "
            f"its {sum(rows[:1])} samples: int64 is needed, and one at least for each"
        )


def _fits(tensor: Tensor, value: Value) -> bool:
    """Return whether dtype, rank and every fixed size are those of `value`."""
    return (
        tensor.dtype is value.dtype
        and tensor.ndim == len(value.shape)
        and all(
            isinstance(of, str) or of == n for n, of in zip(tensor.shape, value.shape, strict=True)
        )
    )


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))
