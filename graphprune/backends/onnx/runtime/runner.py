"""Generate text by an ONNX package: `OnnxRunner` runs its decoder in ONNX Runtime."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Any, Literal

import torch

from graphprune.backends.onnx.package import read_package
from graphprune.backends.onnx.runtime.decoder import CUDA, Batch, layout_of
from graphprune.backends.onnx.runtime.limits import limits_of
from graphprune.backends.onnx.runtime.sampling import Sampling, Text
from graphprune.backends.onnx.session import open_session, provider_name
from graphprune.calibration.tokens import load_tokenizer
from graphprune.errors import BackendError, CheckpointError, UsageError

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Parameters
    ----------
    tokens
        The new tokens; one that ended the row is the last of them.
    text
        Their text, without what ended it; None where the package has no tokenizer.
    reason
        "stop" when a token or string ended it, "length" when it is as long as it may be.
    prompt_tokens
        Tokens of the prompt.
    prompt_seconds
        Time until the first new token of the batch.
    decode_seconds
        Time from there to the last token of this row.
    """

    tokens: tuple[int, ...]
    text: str | None
    reason: Literal["stop", "length"]
    prompt_tokens: int
    prompt_seconds: float
    decode_seconds: float


@dataclass(eq=False)
class _Row:
    """A prompt and what has come of it so far."""

    prompt: list[int]
    text: Text | None
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    piece: str = ""
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, token: int, ends: frozenset[int], most: int) -> None:
        """Take one more token, and see whether it is the last."""
        self.tokens.append(token)
        self.ended = token in ends
        self.piece = ""
        if self.text is None:
            return
        if not self.ended:
            self.piece = self.text.add(token)
        if self.ended or len(self.tokens) == most:
            self.piece += self.text.end()
        self.ended |= self.text.stopped

    def generation(self) -> Generation:
        return Generation(
            tokens=tuple(self.tokens),
            text=None if self.text is None else str(self.text),
            reason="stop" if self.ended else "length",
            prompt_tokens=len(self.prompt),
            prompt_seconds=self.prompt_seconds,
            decode_seconds=self.decode_seconds,
        )


class OnnxRunner:
    """Text generation by the decoder of an ONNX package.

    Prompts of a batch may differ in length. Where attention counts a mask's ones they are padded on
    the right, elsewhere on the left; each row gets the tokens that it gets alone.

    Parameters
    ----------
    directory
        What `export-onnx` wrote with a directory as its path.
    provider
        The execution provider of ONNX Runtime, such as "cuda"; by default the package's own.
    threads
        Threads of the CPU provider; by default as many as torch has.
    static
        Whether all shapes stay the same from the second token on, which takes a package with
        `shares_buffers`. Buffers are then as long as the next power of two and kept for the next
        call. On CUDA, the first step for such a size is captured as a CUDA graph and every later
        one replays it. That replay has been run on no GPU so far: what has been shown, on the CPU
        provider, is that a step of constant shapes gives the same tokens.

    Attributes
    ----------
    package
        What the package says of itself.
    session
        The session of ONNX Runtime.
    provider
        The execution provider that runs the model.
    context
        Tokens that a text may have, its prompt included; None where no config says so.
    ends
        Tokens that end a row, from the package's configs; an empty set lets no token end one.

    Raises
    ------
    CheckpointError
        When `directory` holds no package, or a damaged one.
    BackendError
        When ONNX Runtime refuses the model, would run it on another provider than the one asked
        for, or the model is no decoder with caches.
    UsageError
        When `static` is asked of a package whose past and present need buffers of their own.

    Examples
    --------
    >>> runner = gp.OnnxRunner("small-onnx")                                 # doctest: +SKIP
    >>> runner.generate("Once upon a time", max_new_tokens=20)[0].text       # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        provider: str | None = None,
        threads: int | None = None,
        static: bool = False,
    ) -> None:
        self.package = read_package(directory)
        if self.package.parts is not None:
            raise BackendError(
                f"{directory} holds an encoder and a decoder: EncoderDecoderRunner runs them"
            )
        if static and not self.package.shares_buffers:
            raise UsageError(
                f"static shapes take past and present in one buffer: {directory} keeps them apart"
            )
        wanted = provider_name(provider or self.package.provider)
        graphs = {"enable_cuda_graph": "1"} if static and wanted == CUDA else None
        self.session = open_session(self.package.model, wanted, threads, graphs)
        self.layout = layout_of(self.session)
        self.static = static
        self.provider = str(self.session.get_providers()[0])
        self.context, self.ends = limits_of(self.package.directory)
        self._idle: Batch | None = None
        self._graphs = 0

    @cached_property
    def tokenizer(self) -> Any:
        """The package's tokenizer.

        Raises
        ------
        CheckpointError
            When it has none.
        """
        directory = self.package.directory
        try:
            return load_tokenizer(directory, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{directory} holds no tokenizer: give token ids") from error

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        stop: str | Sequence[str | int] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_token: Callable[[int, int], object] | None = None,
        on_text: Callable[[int, str], object] | None = None,
    ) -> list[Generation]:
        """Continue every prompt, all of them in one batch.

        Parameters
        ----------
        prompts
            A text, or several texts or lists of token ids.
        max_new_tokens
            The most tokens that a row gets.
        stop
            Strings and token ids that end a row, beside those of `ends`. A text is cut before a
            stop string.
        temperature
            What logits are divided by before a token is drawn; at 0 the likeliest one is chosen.
        top_k
            Draw from so many of the likeliest tokens.
        top_p
            Draw from the fewest of the likeliest tokens that have this probability together.
        seed
            Same seed, same tokens. A row's draws do not depend on the rows beside it.
        on_token
            Called with the row and each token as soon as it is chosen.
        on_text
            Called with the row and each piece of text that can be shown, never a part of a
            character.

        Returns
        -------
        list of Generation
            One for each prompt, in their order.

        Raises
        ------
        UsageError
            When there are no prompts, one is empty, too long for the model with what may follow,
            or has a token that the vocabulary lacks, or when an option makes no sense.
        CheckpointError
            When a text or stop string is given and the package has no tokenizer.
        BackendError
            When ONNX Runtime fails, or logits are not numbers.
        """
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = Sampling(temperature, top_k, top_p, seed)
        rows, ends = self._begin(given, sampling, max_new_tokens, stop)
        for fresh in self._advance(rows, ends, sampling, max_new_tokens):
            for index in fresh:
                if on_token is not None:
                    on_token(index, rows[index].tokens[-1])
                if on_text is not None and rows[index].piece:
                    on_text(index, rows[index].piece)
        return [row.generation() for row in rows]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        stop: str | Sequence[str | int] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """Continue one prompt, and give the text piece by piece, never a part of a character.

        Parameters and errors are those of `generate`; a wrong one is refused at once.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        rows, ends = self._begin([prompt], sampling, max_new_tokens, stop, shown=True)
        steps = self._advance(rows, ends, sampling, max_new_tokens)
        return (rows[0].piece for _ in steps if rows[0].piece)

    # -- a batch --

    def _begin(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        most: int,
        stop: str | Sequence[str | int],
        *,
        shown: bool = False,
    ) -> tuple[list[_Row], frozenset[int]]:
        """Return a row for each prompt (with its text if that is `shown`), and what ends one."""
        if not prompts:
            raise UsageError("there are no prompts")
        if most < 1:
            raise UsageError(f"max_new_tokens is 1 or more, not {most}")
        chosen = [stop] if isinstance(stop, str) else list(stop)
        strings = [each for each in chosen if isinstance(each, str)]
        if "" in strings:
            raise UsageError("a stop string is empty")
        needed = shown or bool(strings) or any(isinstance(prompt, str) for prompt in prompts)
        tokenizer = self.tokenizer if needed else self._any_tokenizer()
        rows = []
        for index, prompt in enumerate(prompts):
            ids = self._tokens(index, prompt)
            text = None if tokenizer is None else Text(tokenizer, ids, strings)
            rows.append(_Row(ids, text, sampling.generator(index)))
        longest = max(len(row.prompt) for row in rows)
        if self.context is not None and longest + most > self.context:
            raise UsageError(
                f"a prompt of {longest} tokens and {most} new ones are more than the "
                f"{self.context} that the model has positions for"
            )
        return rows, self.ends | {each for each in chosen if not isinstance(each, str)}

    def _tokens(self, index: int, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt."""
        if isinstance(prompt, str):
            given: Any = self.tokenizer(prompt, verbose=False)["input_ids"]
        else:
            given = prompt
        try:
            ids = [operator.index(token) for token in given]
        except TypeError as error:
            raise UsageError(f"prompt {index} is neither a text nor a list of token ids") from error
        if not ids:
            raise UsageError(f"prompt {index} has no tokens")
        if beyond := [token for token in ids if not 0 <= token < self.layout.vocabulary]:
            raise UsageError(
                f"prompt {index} has token {beyond[0]}, and the model's vocabulary has "
                f"{self.layout.vocabulary}"
            )
        return ids

    def _any_tokenizer(self) -> Any:
        try:
            return self.tokenizer
        except CheckpointError:
            return None  # token ids need none

    def _advance(
        self, rows: list[_Row], ends: frozenset[int], sampling: Sampling, most: int
    ) -> Iterator[list[int]]:
        """Generate until every row has ended; gives the rows that have a new token, each time."""
        started = time.perf_counter()
        batch = self._batch(len(rows), max(len(row.prompt) for row in rows) + most)
        logits = batch.prompt([row.prompt for row in rows])
        running, spent = list(range(len(rows))), 0.0
        for step in range(most):
            for index in running:
                row = rows[index]
                row.add(sampling.choose(logits[index], row.generator), ends, most)
            spent += time.perf_counter() - started
            for index in running:
                if step == 0:
                    rows[index].prompt_seconds = spent
                rows[index].decode_seconds = spent - rows[index].prompt_seconds
            yield running
            running = [index for index in running if not rows[index].ended]
            if not running or step == most - 1:
                break
            started = time.perf_counter()
            # A row that has ended goes along: what comes of its last token is not looked at.
            logits = batch.step([row.tokens[-1] for row in rows])
        if self.static:
            self._idle = batch

    def _batch(self, rows: int, capacity: int) -> Batch:
        """Buffers for so many rows and tokens; those of the last call where they are as large."""
        graph = None
        if self.static:
            capacity = 1 << (capacity - 1).bit_length()
            capacity = min(capacity, self.context or capacity)
            # Taken away, so that no other text that is under way gets the same.
            batch, self._idle = self._idle, None
            if batch is not None and (batch.rows, batch.capacity) == (rows, capacity):
                return batch
            self._graphs += 1
            graph = self._graphs if self.provider == CUDA else None
        return Batch(
            self.session,
            self.layout,
            rows,
            capacity,
            shares=self.package.shares_buffers,
            left=self.package.padding != "right",
            static=self.static,
            graph=graph,
        )
