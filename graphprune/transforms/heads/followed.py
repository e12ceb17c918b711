"""Whether an operand of attention is what its projection made, times factors by position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EXACT = 1e-4
"""Part of the squares up to which an operand is what its projection gave; rounding of bfloat16."""

_SAME = 1e-2
"""Relative difference up to which two factors are one."""


class Followed:
    """An operand, compared with what its projection made, each position times its own factors."""

    def __init__(self) -> None:
        self._crossed = torch.zeros(0, 0, dtype=torch.complex128)
        self._power = torch.zeros(0, 0, dtype=torch.float64)
        self._total = torch.zeros((), dtype=torch.float64)
        self.misfits = torch.zeros((), dtype=torch.int64)
        """Batches whose operand is not one for each input."""

    def add(self, made: Tensor, seen: Tensor) -> None:
        """Count in ``[batch, positions, kv, slots, coordinates]``, complex, of both."""
        over = (0, 2, 3)
        self._crossed = _added(self._crossed, (made.conj() * seen).sum(over))
        self._power = _added(self._power, made.abs().square().sum(over))
        self._total = self._total + seen.abs().square().sum()

    @property
    def sums(self) -> list[Tensor]:
        """All that is added up over batches."""
        return [self._crossed, self._power, self._total, self.misfits]

    @sums.setter
    def sums(self, sums: Sequence[Tensor]) -> None:
        self._crossed, self._power, self._total, self.misfits = sums

    @property
    def turns(self) -> Tensor:
        """The factors, ``[positions, coordinates]``."""
        return (self._crossed / self._power.clamp(min=1e-150)).cpu()

    def reason(self) -> str:
        """Return why it is not that, or ""."""
        if self.misfits:
            return "they are not one for each input"
        explained = self._crossed.abs().square() / self._power.clamp(min=1e-150)
        if self._total - explained.sum() > _EXACT * self._total:
            return "more is done with them than to rotate them by position"
        return ""


def _added(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of tables of which one may have more rows."""
    if len(one) < len(other):
        one, other = other, one
    if not len(other):
        return one
    found = one.clone()
    found[: len(other)] += other
    return found


def alike(factors: Tensor) -> bool:
    """Return whether factors, relative to one of them, are all the same."""
    return bool(((factors - 1).abs() < _SAME).all())
