"""The data of a search: some to fit to, some to choose by, and some for neither."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from graphprune.calibration.data import Calibration, inputs_of
from graphprune.calibration.statistics import tokens_for_gram
from graphprune.calibration.tokens import text_inputs
from graphprune.errors import CalibrationError
from graphprune.evaluation.sample_measures import Batch
from graphprune.ir.program import Program

CHOOSING = 2048
"""Tokens that recipes are chosen by, where the text has so many."""

_FITTED = 0.75
"""The part of data to fit to, where there is too little for all."""


@dataclass(frozen=True, eq=False)
class Draw:
    """Calibration data, divided.

    Parameters
    ----------
    fitted
        What recipes are fitted to. Its `held_out` windows are for what is reported in the end.
    choosing
        What they are compared on: samples, with labels where there are some.
    apart
        Whether these are other samples than those that are held out.
    """

    fitted: Calibration
    choosing: tuple[Batch, ...]
    apart: bool

    @property
    def samples(self) -> int:
        """How many samples recipes are compared on."""
        return sum(map(_rows, self.choosing))

    def first(self, samples: int) -> tuple[Batch, ...]:
        """Return the first samples to choose by."""
        return tuple(_rows_of(self.choosing, 0, samples))


def divide(calibration: Calibration, program: Program) -> Draw:
    """Divide calibration data into what recipes are fitted to and what they are chosen by.

    Of a text whose windows nobody counted, as many are fitted to as a least squares fit needs.
    Where it is too short for all, three quarters of it are, and what is held out serves both to
    choose and to report. Of batches the last quarter of the samples is what is chosen by.

    Raises
    ------
    CalibrationError
        When there is too little to hold some of it out.
    """
    if calibration.text is None:
        return _of_batches(calibration)
    tokens = tokens_for_gram(program)
    enough = calibration.enough_for(tokens, program.context_length)
    fitted = enough.with_room(1 - _FITTED).for_program(program)
    if not fitted.held_out:
        raise CalibrationError(
            f"the text is too short to hold some of it out: {fitted.samples} windows of "
            f"{fitted.length} tokens are fitted to, and none is left; give more, or fewer --samples"
        )
    more = tuple(text_inputs(program, batch) for batch in fitted.further(CHOOSING))
    apart = sum(map(_rows, more)) >= sum(map(_rows, fitted.held_out))
    return Draw(fitted, more if apart else fitted.held_out, apart)


def _of_batches(calibration: Calibration) -> Draw:
    batches, total = list(calibration.labeled()), calibration.samples
    count = max(1, int(total * _FITTED))
    if total < 2:
        raise CalibrationError("one sample is too little to hold some out: give more")
    fitted = Calibration.from_batches(_rows_of(batches, 0, count))
    choosing = tuple(_rows_of(batches, count, total))
    apart = bool(calibration.held_out)
    held_out = calibration.held_out if apart else tuple(map(inputs_of, choosing))
    return Draw(dataclasses.replace(fitted, held_out=held_out), choosing, apart)


def _rows_of(batches: Sequence[Batch], start: int, stop: int) -> list[Mapping[str, Tensor]]:
    """Return the samples from `start` to `stop` of `batches`, counted over all of them."""
    found: list[Mapping[str, Tensor]] = []
    at = 0
    for batch in batches:
        count = _rows(batch)
        rows = slice(max(start - at, 0), max(stop - at, 0))
        part = {name: tensor[rows] for name, tensor in batch.items()}
        if _rows(part):
            found.append(part)
        at += count
    return found


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))
