"""The data that programs of a sweep are measured on, and what is measured of them on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Protocol

from torch import Tensor

from graphprune.calibration.data import inputs_of
from graphprune.calibration.tokens import TokenizerLike
from graphprune.errors import EvaluationError
from graphprune.evaluation.perplexity import Perplexity, perplexity
from graphprune.evaluation.sample_measures import measure_of, measured, runner
from graphprune.io.progress import DisplayFactory
from graphprune.ir.program import Program
from graphprune.weights.tensors import digest

PERPLEXITY = "perplexity"
"""What is measured of language models; of others, what `measure_of` finds."""

Figures = tuple[float, float | None]
"""The mean of what is measured, a loss where there is one; the perplexity, where that has one."""


@dataclass(frozen=True)
class Yardstick:
    """The measure that all programs of a sweep are held against.

    Parameters
    ----------
    name
        What is measured.
    count
        Of how many tokens or samples.
    sha256
        A digest of the data.
    length
        Tokens of a window; None where there are none.
    dense
        The figures of the program that the others are made of.
    measure
        Measures another.
    """

    name: str
    count: int
    sha256: str
    length: int | None
    dense: Figures
    measure: Callable[[Program], Figures]


class HeldOutData(Protocol):
    """Data that programs are measured on."""

    def yardstick(self, program: Program, progress: DisplayFactory | None) -> Yardstick:
        """Measure `program`, and return how those that are made of it are measured."""


@dataclass(frozen=True)
class HeldOut:
    """The text that language models are measured on, as `perplexity` takes it."""

    text: str | PathLike[str]
    tokenizer: TokenizerLike
    length: int = 256
    batch_size: int = 4
    max_tokens: int | None = None
    first_token: bool = True

    def yardstick(self, program: Program, progress: DisplayFactory | None) -> Yardstick:
        """Measure the perplexity of `program`.

        Raises
        ------
        EvaluationError
            As `perplexity` does.
        """

        def found(program: Program) -> Perplexity:
            return perplexity(program, **vars(self), progress=progress or False)

        def figures(program: Program) -> Figures:
            return (of := found(program)).loss, of.perplexity

        dense = found(program)
        whole = dense.loss, dense.perplexity
        return Yardstick(PERPLEXITY, dense.tokens, dense.sha256, dense.length, whole, figures)


@dataclass(frozen=True)
class HeldOutSamples:
    """Samples by name, for any model.

    Parameters
    ----------
    batches
        Inputs by name, and ``labels`` where there are some.
    """

    batches: Sequence[Mapping[str, Tensor]]

    def yardstick(self, program: Program, progress: DisplayFactory | None) -> Yardstick:
        """Find what can be measured of programs that are made of `program`.

        Raises
        ------
        EvaluationError
            When there are no samples.
        """
        if not self.batches:
            raise EvaluationError("there is nothing to measure on")
        name, measure = measure_of(program, self.batches)
        inputs = [inputs_of(batch) for batch in self.batches]

        def figures(program: Program) -> Figures:
            each = measured(runner(program, inputs), measure).tolist()
            return math.fsum(each) / len(each), None

        count = sum(len(next(iter(batch.values()))) for batch in self.batches)
        return Yardstick(name, count, digest(self.batches), None, figures(program), figures)
