"""Generate by the package of an encoder-decoder: `EncoderDecoderRunner`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from graphprune.backends.onnx.encoder_decoder.decoding import Decoding, part_of_model
from graphprune.backends.onnx.encoder_decoder.generation import generated
from graphprune.backends.onnx.encoder_decoder.rules import Rules, rules_of
from graphprune.backends.onnx.package import read_package
from graphprune.backends.onnx.runtime.runner import Generation
from graphprune.backends.onnx.session import provider_name
from graphprune.calibration.tokens import load_tokenizer
from graphprune.errors import CheckpointError, UsageError


class EncoderDecoderRunner:
    """Generation by an encoder and a decoder of an ONNX package, greedy or by beams.

    What a package's generation config says of tokens is followed, or refused where it cannot be.

    Parameters
    ----------
    directory
        What `export-onnx` wrote with a directory as its path.
    provider
        The execution provider of ONNX Runtime; by default the package's own.
    threads
        Threads of the CPU provider; by default as many as torch has.

    Attributes
    ----------
    package
        What the package says of itself.
    rules
        The tokens that begin and end a row, and those that may not come.

    Raises
    ------
    CheckpointError
        When `directory` holds no package of an encoder-decoder, or a damaged one.
    BackendError
        When ONNX Runtime refuses a model, or the generation config asks for what is not followed.

    Examples
    --------
    >>> runner = gp.EncoderDecoderRunner("small-t5")                        # doctest: +SKIP
    >>> runner.generate("translate English to German: a man", beams=4)      # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        provider: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.package = read_package(directory)
        if self.package.parts is None:
            raise CheckpointError(f"{directory} holds one model, and no encoder with a decoder")
        self.rules: Rules = rules_of(self.package.directory)
        wanted = provider_name(provider or self.package.provider)
        self.parts = {
            role: part_of_model(self.package.directory / file, wanted, threads)
            for role, file in self.package.parts.items()
        }

    @cached_property
    def tokenizer(self) -> Any:
        """The package's tokenizer.

        Raises
        ------
        CheckpointError
            When it has none.
        """
        return load_tokenizer(self.package.directory, CheckpointError)

    def generate(
        self,
        inputs: str | Sequence[str] | Mapping[str, Tensor],
        *,
        max_new_tokens: int = 64,
        beams: int = 1,
        length_penalty: float | None = None,
        early_stopping: bool | Literal["never"] | None = None,
    ) -> list[Generation]:
        """Generate from texts, or from what goes into the encoder.

        Parameters
        ----------
        inputs
            Texts, or tensors by the names of the encoder's inputs, one row each.
        max_new_tokens
            The most tokens that a row gets after those that it begins with.
        beams
            The number of beams; 1 takes the likeliest token each time.
        length_penalty
            The power of the length that the score of a beam is divided by.
        early_stopping
            Whether beam search ends as soon as so many beams have ended; "never" goes on until none
            can become better.

        Returns
        -------
        list of Generation
            One for each row.

        Raises
        ------
        UsageError
            When there is nothing to begin with, an input is missing or unknown, or an option makes
            no sense.
        CheckpointError
            When texts are given and the package has no tokenizer.
        BackendError
            When ONNX Runtime fails, or logits are not numbers.
        """
        if max_new_tokens < 1 or beams < 1:
            raise UsageError("max_new_tokens and beams are 1 or more")
        given = self._inputs(inputs)
        rules = self.rules
        if length_penalty is not None:
            rules = replace(rules, length_penalty=length_penalty)
        if early_stopping is not None:
            rules = replace(rules, early_stopping=early_stopping)
        started = time.perf_counter()
        rows = len(next(iter(given.values())))
        layout: Any = self.package.layout
        decoding = Decoding(self.parts, layout, given)
        found, first = generated(decoding, rules, rows, max_new_tokens, beams)
        spent = time.perf_counter()
        texts = self._texts(found)
        length = sum(t.shape[1] for name, t in given.items() if name == "input_ids")
        return [
            Generation(
                tokens=tokens,
                text=text,
                reason="stop" if tokens[-1] in rules.ends else "length",
                prompt_tokens=length,
                prompt_seconds=first - started,
                decode_seconds=spent - first,
            )
            for tokens, text in zip(found, texts, strict=True)
        ]

    def _inputs(self, inputs: str | Sequence[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the encoder's inputs, with a mask of ones where it was left out."""
        names = list(self.parts["encoder"].shapes)
        if isinstance(inputs, Mapping):
            given = dict(inputs)
        else:
            texts = [inputs] if isinstance(inputs, str) else list(inputs)
            if not texts:
                raise UsageError("there are no texts")
            if "input_ids" not in names:
                raise UsageError(f"the model takes {', '.join(names)}, and no text")
            encoded = self.tokenizer(texts, padding=len(texts) > 1, return_tensors="pt")
            given = {name: encoded[name] for name in names if name in encoded}
        if "attention_mask" in names and "attention_mask" not in given and "input_ids" in given:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        if wrong := sorted(set(given) ^ set(names)):
            verb = "is missing" if wrong[0] in names else "is not among them"
            raise UsageError(f"the encoder takes {', '.join(names)}: {wrong[0]} {verb}")
        return given

    def _texts(self, rows: Sequence[Sequence[int]]) -> Sequence[str | None]:
        try:
            tokenizer = self.tokenizer
        except CheckpointError:
            return [None] * len(rows)  # tensors need none
        return [str(tokenizer.decode(list(row), skip_special_tokens=True)) for row in rows]
