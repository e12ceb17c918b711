"""How far states are from the original, on ever more of the calibration data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.calibration.data import Calibration
from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.losses import departure_of
from graphprune.ir.program import Program
from graphprune.training.samples import Samples

_ROWS, _FITTED_ROWS = 4, 8
"""The most samples of a batch to measure on, and of one to fit to."""

_HELD_OUT = 4
"""At most one in so many samples is measured on."""


def divided(calibration: Calibration, tokens: int) -> tuple[Calibration, Calibration]:
    """Return what levels are fitted to, and what states are measured on.

    Levels that take much away fit best what they were fitted to, so that states are measured on the
    last samples, which no level has seen; of a single sample both are all of it.

    Parameters
    ----------
    calibration
        All there is.
    tokens
        So many tokens are measured on, made up to whole samples, but no more than a quarter of the
        samples; 0 for a quarter, as with inputs that are no tokens.
    """
    rows = list(calibration.singly())
    if len(rows) < 2:
        return calibration, calibration
    count = max(len(rows) // _HELD_OUT, 1)
    if tokens and "input_ids" in rows[-1]:
        count = min(count, math.ceil(tokens / rows[-1]["input_ids"].numel()))
    fitted, held = (
        Calibration.from_batches(Samples(part).all(size))
        for part, size in ((rows[:-count], _FITTED_ROWS), (rows[-count:], _ROWS))
    )
    return fitted, held


class Departures:
    """The departure of changed weights from the program that they are of.

    Where there is an output called logits that is their divergence, KL(original || changed); else
    the relative squared change of the first output. Padding does not count.

    Parameters
    ----------
    program
        The original.
    calibration
        What it is measured on.
    tokens
        So many of its tokens, the first ones, made up to whole batches; 0 for all, as with inputs
        that are no tokens.

    Raises
    ------
    CalibrationError
        When the program gives nothing whose change can be measured.
    """

    def __init__(self, program: Program, calibration: Calibration, tokens: int) -> None:
        self.program = program
        self.name, self._output, self._departure = departure_of(program)
        self.batches = _first(calibration, tokens)
        self._whole = list(logits_of_all(program, self.batches, self._output))

    @property
    def count(self) -> int:
        """How many batches there are to measure on."""
        return len(self.batches)

    def of(self, weights: Mapping[str, Tensor], count: int) -> float:
        """Return the mean departure of `weights` on the first so many batches."""
        given, whole = self.batches[:count], self._whole[:count]
        found = logits_of_all(self.program, given, self._output, weights=weights)
        with torch.no_grad():
            each = [self._departure(*pair) for pair in zip(found, whole, given, strict=True)]
        return float(torch.cat(each).double().mean())


def _first(calibration: Calibration, tokens: int) -> list[dict[str, Tensor]]:
    """Return the first samples of calibration data, in small batches."""
    found: list[dict[str, Tensor]] = []
    left = tokens
    for batch in calibration:
        rows = len(next(iter(batch.values())))
        for first in range(0, rows, _ROWS):
            if tokens and left <= 0:
                return found
            part = {name: tensor[first : first + _ROWS] for name, tensor in batch.items()}
            left -= part["input_ids"].numel() if "input_ids" in part else 0
            found.append(part)
    return found
