"""The change of a matrix that explains most of what a stream lacks, from sums over tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from graphprune import ranks
from graphprune.calibration.damping import damped_factor

HELD_OUT = 8
"""One in so many tokens, the last ones of each batch, is not fitted to: what predicts them best is
the damping."""


def held_out(count: int, device: torch.device) -> Tensor:
    """Return which of so many tokens are not fitted to: neighbors at the end."""
    return torch.arange(count, device=device) >= count - count // HELD_OUT


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over tokens, in float64.

    Parameters
    ----------
    gram
        Products of all pairs of inputs, ``[in, in]``.
    cross
        Products of inputs and what is lacking, ``[in, out]``.
    squares, count
        Of what is lacking; of tokens.
    """

    gram: Tensor
    cross: Tensor
    squares: Tensor
    count: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> Self:
        """Return those of no tokens."""
        shapes = (inputs, inputs), (inputs, outputs), (), ()
        return cls(*(torch.zeros(each, dtype=torch.float64, device=device) for each in shapes))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.gram, self.cross, self.squares, self.count

    @property
    def any(self) -> bool:
        """Whether there was a token."""
        return bool(self.count)

    def add(self, inputs: Tensor, lacks: Tensor) -> None:
        """Count tokens in, ``[n, in]`` and ``[n, out]``."""
        inputs, lacks = inputs.double(), lacks.double()
        self.gram.addmm_(inputs.mT, inputs)
        self.cross.addmm_(inputs.mT, lacks)
        self.squares.add_(lacks.square().sum())
        self.count.add_(len(lacks))

    def change(self, damp: float) -> Tensor:
        """Return the change that explains most, ``[in, out]``."""
        return torch.cholesky_solve(self.cross, damped_factor(self.gram, damp))

    def error(self, change: Tensor) -> float:
        """Return the mean square of what is lacking after a change ``[in, out]``."""
        explained = (change * (2 * self.cross - self.gram @ change)).sum()
        return float((self.squares - explained) / (self.count * change.shape[1]).clamp(min=1))


@dataclass(frozen=True, eq=False)
class HeldOutSums:
    """Sums over tokens that are fitted to, and over those that are not.

    Parameters
    ----------
    fitted, held
        As they are.
    """

    fitted: Sums
    held: Sums

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> Self:
        """Return those of no tokens."""
        return cls(*(Sums.empty(inputs, outputs, device) for _ in range(2)))

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(each.nbytes for each in (*self.fitted.tensors, *self.held.tensors))

    def add(self, inputs: Tensor, lacks: Tensor) -> None:
        """Count the tokens of a batch in, ``[n, in]`` and ``[n, out]``."""
        held = held_out(len(lacks), lacks.device)
        self.fitted.add(inputs[~held], lacks[~held])
        self.held.add(inputs[held], lacks[held])

    def add_up_over_ranks(self) -> None:
        """Add up what all processes have counted, in place."""
        ranks.sum_of((*self.fitted.tensors, *self.held.tensors))

    def best(self, damps: Iterable[float]) -> tuple[float, float, float]:
        """Return the best of `damps`, and the mean square of what is lacking before and after.

        It is that on tokens which were held out, where there are some.
        """
        judged = self.held if self.held.any else self.fitted
        errors = {damp: judged.error(self.fitted.change(damp)) for damp in damps}
        damp = min(errors, key=errors.__getitem__)
        return damp, judged.error(torch.zeros_like(judged.cross)), errors[damp]

    def change(self, damp: float) -> Tensor:
        """Return the change ``[out, in]`` that is fitted to all tokens."""
        pairs = zip(self.fitted.tensors, self.held.tensors, strict=True)
        return Sums(*(one + other for one, other in pairs)).change(damp).mT
