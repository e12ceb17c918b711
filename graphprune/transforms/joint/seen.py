"""What is seen of matrices that are refitted, and the changes that explain most of what is lacking.

With x_u the inputs of matrix W_u, and r what the stream lacks of the original's, the changes D_u
minimize ``sum over tokens |r - sum_u D_u x_u|^2 + sum_u lambda_u |D_u|^2``, where inputs and lacks
are divided by the size of the stream at their token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.calibration.damping import DAMPS, UNTRIED_DAMP, damped_factor
from graphprune.training.local import squares_of_rows
from graphprune.transforms.joint.addends import Addends
from graphprune.transforms.joint.sums import HeldOutSums, held_out

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


@dataclass(frozen=True, eq=False)
class SeenSums(Seen):
    """Sums over tokens, which suffice for a matrix that nothing is refitted together with.

    Parameters
    ----------
    sums
        Of its inputs and of what the stream lacks.
    """

    sums: HeldOutSums

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.sums.nbytes

    def add(self, addends: Addends, values: Mapping[fx.Node, Any], wanted: Tensor) -> None:
        """Take more tokens, each a row of the matrix's inputs."""
        lacks, scale = _lacks(addends, values, wanted)
        for rows, _, _ in addends.rows(values):
            self.sums.add(rows * scale, lacks)

    def of_all_processes(self) -> Self:
        """Add up, in place."""
        self.sums.add_up_over_ranks()
        return self

    def solved(self, damp: float | None) -> Solved:
        """Solve the normal equations."""
        tried = DAMPS if self.sums.held.any else (UNTRIED_DAMP,)
        best, before, after = self.sums.best(tried if damp is None else (damp,))
        return {0: self.sums.change(best)}, (before, after)


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
        held = torch.cat([held_out(len(each), each.device) for each in self.lacks])
        fitted = {u: (x[~held[at]], at[~held[at]]) for u, (x, at) in rows.items()}
        judged = held if bool(held.any()) else ~held
        grams = _grams(fitted)

        tried = DAMPS if bool(held.any()) else (UNTRIED_DAMP,)

        def error(each: float) -> float:
            changes = _together(fitted, grams, lacks, each)
            return float(_left(rows, lacks, changes)[judged].square().mean())

        errors = {each: error(each) for each in (tried if damp is None else (damp,))}
        best = min(errors, key=errors.__getitem__)
        changes = _together(rows, _grams(rows), lacks, best)
        return changes, (float(lacks[judged].square().mean()), errors[best])


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
    factors = {unit: damped_factor(gram, damp) for unit, gram in grams.items()}
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
