"""The changes of matrices that explain most of what a stream lacks, from sums over tokens.

With x_u the inputs of matrix W_u, and r what the stream lacks, the changes D_u minimize ``sum over
tokens |r - sum_u D_u x_u|^2 + sum_u lambda_u |D_u|^2``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from graphprune import ranks
from graphprune.calibration.damping import damped_factor

HELD_OUT = 8
"""One in so many tokens, the last ones of each batch, is not fitted to: what predicts them best is
the damping."""

SWEEPS, STILL = 100, 1e-8
"""How often all matrices are fitted in turn at most, and the part of what is left to be explained
by which a sweep that changes less is the last."""

ByUnit = Mapping[int, tuple[Tensor, Tensor]]
"""Unit -> inputs of its matrix, ``[rows, in]``, and the token of each row, ``[rows]``."""


def held_out(count: int, device: torch.device) -> Tensor:
    """Return which of so many tokens are not fitted to: neighbors at the end."""
    return torch.arange(count, device=device) >= count - count // HELD_OUT


def of_all_tokens(inputs: Tensor) -> ByUnit:
    """Return the inputs ``[tokens, in]`` of a matrix that nothing is fitted together with."""
    return {0: (inputs, torch.arange(len(inputs), device=inputs.device))}


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over tokens, in float64.

    Parameters
    ----------
    grams
        Pair of units, the lower one first -> products of all pairs of their inputs, ``[in, in]``.
    crosses
        Unit -> products of its inputs and what is lacking, ``[in, out]``.
    squares, count
        Of what is lacking; of tokens.
    """

    grams: Mapping[tuple[int, int], Tensor]
    crosses: Mapping[int, Tensor]
    squares: Tensor
    count: Tensor

    @classmethod
    def empty(cls, widths: Mapping[int, int], outputs: int, device: torch.device) -> Self:
        """Return those of no tokens, for units with so many inputs."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        pairs = [(one, other) for one in widths for other in widths if one <= other]
        grams = {(one, other): zeros(widths[one], widths[other]) for one, other in pairs}
        crosses = {unit: zeros(width, outputs) for unit, width in widths.items()}
        return cls(grams, crosses, zeros(), zeros())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return *self.grams.values(), *self.crosses.values(), self.squares, self.count

    @property
    def any(self) -> bool:
        """Whether there was a token."""
        return bool(self.count)

    @property
    def outputs(self) -> int:
        """How many numbers each token lacks."""
        return next(iter(self.crosses.values())).shape[1]

    def add(self, rows: ByUnit, lacks: Tensor, counted: Tensor) -> None:
        """Count some tokens in: what they lack is ``[tokens, out]``, which ones is ``[tokens]``."""
        lacks = lacks.double()
        seen = {unit: _by_token(*each, counted) for unit, each in rows.items()}
        for unit, (inputs, tokens) in seen.items():
            self.crosses[unit].addmm_(inputs.mT, lacks[tokens])
        for (one, other), gram in self.grams.items():
            if one in seen and other in seen:
                gram.addmm_(*_of_both(seen[one], seen[other]))
        self.squares.add_(lacks[counted].square().sum())
        self.count.add_(counted.sum())

    def plus(self, other: Self) -> Self:
        """Return the sums over the tokens of both."""
        grams = {pair: gram + other.grams[pair] for pair, gram in self.grams.items()}
        crosses = {unit: cross + other.crosses[unit] for unit, cross in self.crosses.items()}
        return type(self)(grams, crosses, self.squares + other.squares, self.count + other.count)

    def changes(self, damp: float) -> dict[int, Tensor]:
        """Return the changes ``[out, in]`` that explain most, of units that had inputs.

        One is fitted after the other and again until nothing moves (block Gauss-Seidel).

        Raises
        ------
        CalibrationError
            When inputs are too alike in spite of the damping.
        """
        units = [unit for unit in sorted(self.crosses) if bool(self.grams[unit, unit].any())]
        factors = {unit: damped_factor(self.grams[unit, unit], damp) for unit in units}
        left = {unit: self.crosses[unit].clone() for unit in units}
        found = {unit: torch.zeros_like(left[unit]) for unit in units}
        for _ in range(SWEEPS):
            moved = 0.0
            for unit in units:
                own = self.grams[unit, unit]
                new = torch.cholesky_solve(left[unit] + own @ found[unit], factors[unit])
                step, found[unit] = new - found[unit], new
                moved += float((step * (own @ step)).sum())
                for other in units:
                    left[other] -= self._between(other, unit) @ step
            if len(units) < 2 or moved <= STILL * float(self.squares):
                break
        return {unit: change.mT for unit, change in found.items()}

    def error(self, changes: Mapping[int, Tensor]) -> float:
        """Return the mean square of what is lacking after changes ``[out, in]``."""
        explained = torch.zeros_like(self.squares)
        for unit, change in changes.items():
            left = 2 * self.crosses[unit].mT
            for other, beside in changes.items():
                left = left - beside @ self._between(other, unit)
            explained += (change * left).sum()
        return float((self.squares - explained) / (self.count * self.outputs).clamp(min=1))

    def _between(self, one: int, other: int) -> Tensor:
        pair = self.grams.get((one, other))
        return self.grams[other, one].mT if pair is None else pair


def _by_token(inputs: Tensor, tokens: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return one row for each of the tokens that count, which ascend."""
    mine = counted[tokens]
    present, place = tokens[mine].unique(return_inverse=True)
    rows = inputs.new_zeros((len(present), inputs.shape[1]), dtype=torch.float64)
    return rows.index_add_(0, place, inputs[mine].double()), present


def _of_both(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the inputs ``[in, rows]`` and ``[rows, in]`` of two units at tokens that both have."""
    (inputs, tokens), (beside, theirs) = one, other
    if tokens is theirs:
        return inputs.mT, beside
    return inputs[torch.isin(tokens, theirs)].mT, beside[torch.isin(theirs, tokens)]


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
    def empty(cls, widths: Mapping[int, int], outputs: int, device: torch.device) -> Self:
        """Return those of no tokens, for units with so many inputs."""
        return cls(*(Sums.empty(widths, outputs, device) for _ in range(2)))

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(each.nbytes for each in (*self.fitted.tensors, *self.held.tensors))

    def add(self, rows: ByUnit, lacks: Tensor, held: Tensor) -> None:
        """Count tokens in: what they lack is ``[tokens, out]``, which are held out ``[tokens]``."""
        self.fitted.add(rows, lacks, ~held)
        self.held.add(rows, lacks, held)

    def add_up_over_ranks(self) -> None:
        """Add up what all processes have counted, in place."""
        ranks.sum_of((*self.fitted.tensors, *self.held.tensors))

    def best(self, damps: Iterable[float]) -> tuple[float, float, float]:
        """Return the best of `damps`, and the mean square of what is lacking before and after.

        It is that on tokens which were held out, where there are some.
        """
        judged = self.held if self.held.any else self.fitted
        errors = {damp: judged.error(self.fitted.changes(damp)) for damp in damps}
        damp = min(errors, key=errors.__getitem__)
        return damp, judged.error({}), errors[damp]

    def changes(self, damp: float) -> dict[int, Tensor]:
        """Return the changes ``[out, in]``, by unit, that are fitted to all tokens."""
        return self.fitted.plus(self.held).changes(damp)
