"""How far states are from the original, on ever more of the calibration data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.calibration.data import Calibration
from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.losses import departure_of
from graphprune.ir.program import Program

TOKENS = 4096
"""Tokens that states are measured on at most, where nobody says."""

_ROWS = 4
"""Samples that are run at once."""


class Departures:
    """The departure of changed weights from the program that they are of.

    Of language models that is the divergence KL(original || changed) of their logits; of others the
    relative squared change of the first output.

    Parameters
    ----------
    program
        The original.
    calibration
        What it is measured on.
    tokens
        How many of its tokens, the first ones; 0 for all.
    """

    def __init__(self, program: Program, calibration: Calibration, tokens: int = TOKENS) -> None:
        self.program = program
        self.name, self._output, self._departure = departure_of(program)
        self.batches = _first(calibration, tokens)
        self._whole = list(logits_of_all(program, self.batches, self._output))

    @property
    def samples(self) -> int:
        """How many batches there are to measure on."""
        return len(self.batches)

    def of(self, weights: Mapping[str, Tensor], samples: int) -> float:
        """Return the mean departure of `weights` on the first so many batches."""
        given, whole = self.batches[:samples], self._whole[:samples]
        found = logits_of_all(self.program, given, self._output, weights=weights)
        with torch.no_grad():
            each = [self._departure(*pair) for pair in zip(found, whole, strict=True)]
        return float(torch.cat(each).double().mean())


def _first(calibration: Calibration, tokens: int) -> list[dict[str, Tensor]]:
    """Return the first samples of calibration data, a few at a time."""
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
