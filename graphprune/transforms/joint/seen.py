"""What is seen of matrices that are refitted, and the changes that explain most of what is lacking.

With x_u the inputs of matrix W_u, and r what the stream lacks of the original's, the changes D_u
minimize ``sum over tokens |r - sum_u D_u x_u|^2 + sum_u lambda_u |D_u|^2``, where inputs and lacks
are divided by the size of the stream at their token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.matrices import Matrix
from graphprune.calibration.damping import DAMPS, UNTRIED_DAMP, damped
from graphprune.errors import CalibrationError
from graphprune.training.local import squares_of_rows
from graphprune.transforms.joint.addends import Addends

HELD_OUT = 8
"""One in so many tokens, the last ones of each batch, is not fitted to: what predicts them best is
the damping."""

SWEEPS, STILL = 100, 1e-8
"""How often all experts are fitted in turn at most, and the part of what is left to be explained by
which a sweep that changes less is the last."""

Solved = tuple[dict[int, Tensor], tuple[float, float]]
"""The change of every unit, ``[out, in]``, and the error before and after."""


class Seen(ABC):
    """What matrices were given for each token, and what the stream behind them lacks."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What it takes."""

    @abstractmethod
    def add(self, addends: Addends, values: Mapping[fx.Node, Any], wanted: Tensor) -> None:
        """Take more tokens, from the values of a batch and what the stream was."""

    @abstractmethod
    def of_all_processes(self) -> Self:
        """Return what all processes have seen."""

    @abstractmethod
    def solved(self, damp: float | None) -> Solved:
        """Return changes, damped by `damp` or by what predicts tokens best that were held out.

        Raises
        ------
        CalibrationError
            When inputs are too alike in spite of the damping.
        """


def _lacks(
    addends: Addends, values: Mapping[fx.Node, Any], wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a stream lacks, ``[tokens, out]``, and 1 / its size, ``[tokens, 1]``."""
    wanted = wanted.reshape(-1, wanted.shape[-1])
    scale = squares_of_rows(wanted).rsqrt()[:, None]
    return (wanted.float() - values[addends.end].reshape(wanted.shape)) * scale, scale


def _last(count: int, device: torch.device) -> Tensor:
    """Return which of so many tokens are not fitted to: neighbors at the end."""
    return torch.arange(count, device=device) >= count - count // HELD_OUT


def _best(error: Callable[[float], Tensor], damp: float | None, held: bool) -> tuple[float, float]:
    """Return the damping with the least error, and that; it is tried where tokens were held out."""
    tried = DAMPS if held else (UNTRIED_DAMP,)
    errors = {each: float(error(each)) for each in (tried if damp is None else (damp,))}
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


def _factor(gram: Tensor, damp: float) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(damped(gram, damp))
    if int(failed):
        raise CalibrationError("inputs are too alike to refit: give more data or damp")
    return factor


# -- one matrix -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SeenSums(Seen):
    """Sums over tokens, which suffice for a matrix that nothing is refitted together with.

    Parameters
    ----------
    fitted, held
        Of tokens that are fitted to, and of those that are not.
    """

    fitted: _Sums
    held: _Sums

    @classmethod
    def empty(cls, matrix: Matrix, device: torch.device) -> Self:
        """Return what is known of no tokens."""
        _, width, size = matrix.shape
        return cls(_Sums.empty(width, size, device), _Sums.empty(width, size, device))

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(each.nbytes for each in (*self.fitted.tensors, *self.held.tensors))

    def add(self, addends: Addends, values: Mapping[fx.Node, Any], wanted: Tensor) -> None:
        """Take more tokens, each a row of the matrix's inputs."""
        lacks, scale = _lacks(addends, values, wanted)
        held = _last(len(lacks), lacks.device)
        for rows, _, _ in addends.rows(values):
            inputs = rows * scale
            self.fitted.add(inputs[~held], lacks[~held])
            self.held.add(inputs[held], lacks[held])

    def of_all_processes(self) -> Self:
        """Add up, in place."""
        ranks.sum_of((*self.fitted.tensors, *self.held.tensors))
        return self

    def solved(self, damp: float | None) -> Solved:
        """Solve the normal equations."""
        held = bool(self.held.count)
        judged = self.held if held else self.fitted
        best, after = _best(lambda each: judged.error(self.fitted.change(each)), damp, held)
        before = float(judged.error(torch.zeros_like(judged.cross)))
        return {0: (self.fitted + self.held).change(best).mT}, (before, after)


@dataclass(frozen=True, eq=False)
class _Sums:
    gram: Tensor
    cross: Tensor
    squares: Tensor
    count: Tensor

    @classmethod
    def empty(cls, width: int, size: int, device: torch.device) -> Self:
        shapes = (size, size), (size, width), (), ()
        return cls(*(torch.zeros(each, dtype=torch.float64, device=device) for each in shapes))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.gram, self.cross, self.squares, self.count

    def __add__(self, other: _Sums) -> _Sums:
        both = zip(self.tensors, other.tensors, strict=True)
        return _Sums(*(one + another for one, another in both))

    def add(self, inputs: Tensor, lacks: Tensor) -> None:
        inputs, lacks = inputs.double(), lacks.double()
        self.gram.addmm_(inputs.mT, inputs)
        self.cross.addmm_(inputs.mT, lacks)
        self.squares.add_(lacks.square().sum())
        self.count.add_(len(lacks))

    def change(self, damp: float) -> Tensor:
        """Return the change that explains most, ``[in, out]``."""
        return torch.cholesky_solve(self.cross, _factor(self.gram, damp))

    def error(self, change: Tensor) -> Tensor:
        """Return the mean square of what is lacking after a change."""
        explained = (change * (2 * self.cross - self.gram @ change)).sum()
        return (self.squares - explained) / (self.count * change.shape[1])


# -- several that add up --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SeenRows(Seen):
    """Rows of several matrices, each given some of the tokens.

    Parameters
    ----------
    inputs
        Unit -> inputs of its matrix, ``[rows, in]``, and the number of the token of each row.
    lacks
        ``[tokens, out]`` for each batch.
    """

    inputs: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    lacks: list[Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        rows = [x for each in self.inputs.values() for pair in each for x in pair]
        return sum(tensor.nbytes for tensor in (*rows, *self.lacks))

    def add(self, addends: Addends, values: Mapping[fx.Node, Any], wanted: Tensor) -> None:
        """Take more tokens, from the values of a batch and what the stream was."""
        lacks, scale = _lacks(addends, values, wanted)
        first = sum(map(len, self.lacks))
        for rows, units, tokens in addends.rows(values):
            tokens = tokens.to(rows.device)
            rows = rows * scale[tokens]
            for unit in units.unique().tolist():
                mine = (units == unit).to(rows.device)
                self.inputs.setdefault(unit, []).append((rows[mine], tokens[mine] + first))
        self.lacks.append(lacks)

    def of_all_processes(self) -> Self:
        """Return the rows of all, in their order."""
        found, first = type(self)(), 0
        for seen in ranks.each_once([self] * ranks.size(), lambda each: each):
            for unit, rows in seen.inputs.items():
                moved = [(x, tokens + first) for x, tokens in rows]
                found.inputs.setdefault(unit, []).extend(moved)
            found.lacks.extend(seen.lacks)
            first += sum(map(len, seen.lacks))
        return found

    def solved(self, damp: float | None) -> Solved:
        """Fit one after the other and again until nothing moves (block Gauss-Seidel)."""
        rows = {unit: _joined(each) for unit, each in sorted(self.inputs.items())}
        lacks = torch.cat(self.lacks).double()
        held = torch.cat([_last(len(each), each.device) for each in self.lacks])
        fitted = {u: (x[~held[at]], at[~held[at]]) for u, (x, at) in rows.items()}
        judged = held if bool(held.any()) else ~held
        grams = _grams(fitted)

        def error(each: float) -> Tensor:
            changes = _together(fitted, grams, lacks, each)
            return _left(rows, lacks, changes)[judged].square().mean()

        best, after = _best(error, damp, bool(held.any()))
        changes = _together(rows, _grams(rows), lacks, best)
        return changes, (float(lacks[judged].square().mean()), after)


_ByUnit = Mapping[int, tuple[Tensor, Tensor]]


def _joined(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, tokens = zip(*rows, strict=True)
    return torch.cat(inputs).double(), torch.cat(tokens)


def _grams(rows: _ByUnit) -> dict[int, Tensor]:
    """Return the products of all pairs of inputs, by unit."""
    return {unit: inputs.mT @ inputs for unit, (inputs, _) in rows.items()}


def _together(
    rows: _ByUnit, grams: Mapping[int, Tensor], lacks: Tensor, damp: float
) -> dict[int, Tensor]:
    """Return the changes of all units that explain most of what is lacking."""
    factors = {unit: _factor(gram, damp) for unit, gram in grams.items()}
    left = lacks.clone()
    changes = {u: lacks.new_zeros(lacks.shape[1], x.shape[1]) for u, (x, _) in rows.items()}
    size = float(left.square().sum())
    for _ in range(SWEEPS):
        moved = 0.0
        for unit, (inputs, tokens) in rows.items():
            wanted = left[tokens] + inputs @ changes[unit].mT
            new = torch.cholesky_solve(inputs.mT @ wanted, factors[unit]).mT
            step = inputs @ (changes[unit] - new).mT
            left.index_add_(0, tokens, step)
            moved += float(step.square().sum())
            changes[unit] = new
        if moved <= STILL * size:
            break
    return changes


def _left(rows: _ByUnit, lacks: Tensor, changes: Mapping[int, Tensor]) -> Tensor:
    """Return what is lacking after some changes."""
    left = lacks.clone()
    for unit, (inputs, tokens) in rows.items():
        left.index_add_(0, tokens, inputs @ changes[unit].mT, alpha=-1)
    return left
