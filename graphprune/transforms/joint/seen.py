"""What is seen of matrices that are refitted, and the changes that explain most of what is lacking.

They are fitted to sums over tokens, which take as much however many tokens there are. As long as
the rows that they are sums of take less, these are held, and the changes fitted to them. Inputs and
lacks are divided by the size of the stream at their token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.calibration.damping import DAMPS, UNTRIED_DAMP, damped_factor
from graphprune.training.local import squares_of_rows
from graphprune.transforms.joint.addends import Addends
from graphprune.transforms.joint.sums import STILL, SWEEPS, ByUnit, HeldOutSums, held_out

NOISE = 6.0
"""A matrix alone is damped by so much times its inputs over its tokens: a fit to few tokens follows
what is by chance in them. It was chosen on the packaged model, with 512 to 12,288 tokens
(`tools/REAL_MODELS.md`)."""

WORSE = 1.1
"""A matrix alone is not taken where its error on held-out tokens is so much times what it was. Most
that are a little worse there are better for the whole model."""

Solved = tuple[dict[int, Tensor], tuple[float, float]]
"""The change of every unit, ``[out, in]``, and the error before and after."""


@dataclass(eq=False)
class Rows:
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
        """What they take."""
        rows = [x for each in self.inputs.values() for pair in each for x in pair]
        return sum(tensor.nbytes for tensor in (*rows, *self.lacks))

    def add(self, addends: Addends, values: Mapping[fx.Node, Any], wanted: Tensor) -> None:
        """Take more tokens, from the values of a batch and what the stream was."""
        wanted = wanted.reshape(-1, wanted.shape[-1])
        scale = squares_of_rows(wanted).rsqrt()[:, None]
        first = sum(map(len, self.lacks))
        for rows, units, tokens in addends.rows(values):
            tokens = tokens.to(rows.device)
            rows = rows * scale[tokens]
            for unit in units.unique().tolist():
                mine = (units == unit).to(rows.device)
                self.inputs.setdefault(unit, []).append((rows[mine], tokens[mine] + first))
        self.lacks.append(addends.lacks(values, wanted) * scale)

    def append(self, other: Rows) -> None:
        """Take the rows of others after these."""
        first = sum(map(len, self.lacks))
        for unit, rows in other.inputs.items():
            moved = [(x, tokens + first) for x, tokens in rows]
            self.inputs.setdefault(unit, []).extend(moved)
        self.lacks.extend(other.lacks)

    def by_unit(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the rows of each unit together."""
        joined = {unit: zip(*each, strict=True) for unit, each in sorted(self.inputs.items())}
        return {unit: (torch.cat(x), torch.cat(at)) for unit, (x, at) in joined.items()}

    def solved(self, damp: float | None) -> Solved:
        """Fit one after the other and again until nothing moves (block Gauss-Seidel)."""
        rows = {unit: (inputs.double(), at) for unit, (inputs, at) in self.by_unit().items()}
        lacks = torch.cat(self.lacks).double()
        held = torch.cat([held_out(len(each), each.device) for each in self.lacks])
        fitted = {u: (x[~held[at]], at[~held[at]]) for u, (x, at) in rows.items()}
        judged = held if bool(held.any()) else ~held
        grams = _grams(fitted)

        def error(each: float) -> float:
            changes = _together(fitted, grams, lacks, each)
            return float(_left(rows, lacks, changes)[judged].square().mean())

        errors = {each: error(each) for each in _tried(damp, bool(held.any()))}
        best = min(errors, key=errors.__getitem__)
        changes = _together(rows, _grams(rows), lacks, best)
        return changes, (float(lacks[judged].square().mean()), errors[best])


@dataclass(eq=False)
class Seen:
    """What matrices were given for each token, and what the stream behind them lacks.

    Parameters
    ----------
    widths
        Unit -> how many inputs its matrix has.
    outputs
        How many numbers the stream has for each token.
    device
        Where sums are made.
    most
        Bytes of rows that are held, of all processes together, before they are summed up.
    """

    widths: Mapping[int, int]
    outputs: int
    device: torch.device
    most: float
    rows: Rows = field(default_factory=Rows, init=False)
    sums: HeldOutSums | None = field(default=None, init=False)

    @classmethod
    def nothing(cls, addends: Addends, device: torch.device) -> Seen:
        """Return what is to be seen of matrices; rows of one alone are summed up at once."""
        widths = addends.widths
        outputs = addends.matrices[0][0].shape[1]
        each = sum(widths.values()) ** 2 / 2 + sum(widths.values()) * outputs
        both = 2 * each * torch.float64.itemsize
        return cls(widths, outputs, device, both if len(widths) > 1 else 0)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.rows.nbytes + (self.sums.nbytes if self.sums else 0)

    @property
    def tokens(self) -> int:
        """How many tokens there were."""
        counted = self.sums.fitted.count + self.sums.held.count if self.sums else 0
        return int(counted) + sum(map(len, self.rows.lacks))

    def add(self, addends: Addends, values: Mapping[fx.Node, Any], wanted: Tensor) -> None:
        """Take more tokens, from the values of a batch and what the stream was."""
        self.rows.add(addends, values, wanted)
        if self.sums is not None or self.rows.nbytes > self.most:
            self._sum_up()

    def _sum_up(self) -> HeldOutSums:
        """Hold no rows any more but sums over them."""
        if self.sums is None:
            self.sums = HeldOutSums.empty(self.widths, self.outputs, self.device)
        if self.rows.lacks:
            held = [held_out(len(each), each.device) for each in self.rows.lacks]
            self.sums.add(self.rows.by_unit(), torch.cat(self.rows.lacks), torch.cat(held))
            self.rows = Rows()
        return self.sums

    def of_all_processes(self) -> Seen:
        """Return what all have seen: their rows in their order, or sums."""
        count = torch.tensor([float(self.rows.nbytes), float(self.sums is not None)]).double()
        ranks.sum_of([count])
        held, summed = count.tolist()
        if summed or held > self.most:
            self._sum_up().add_up_over_ranks()
            return self
        found = Seen(self.widths, self.outputs, self.device, self.most)
        for each in ranks.each_once([self.rows] * ranks.size(), lambda rows: rows):
            found.rows.append(each)
        return found

    def solved(self, damp: float | None) -> Solved:
        """Return the changes, or none where held-out tokens speak against them.

        Where `damp` is not given, a matrix alone is damped by `NOISE`, and taken unless it predicts
        them by more than `WORSE` worse; several are damped as they ask for.

        Raises
        ------
        CalibrationError
            When inputs are too alike in spite of the damping.
        """
        alone = len(self.widths) == 1
        own = NOISE * self.widths[0] / max(self.tokens, 1) if alone and damp is None else damp
        if self.sums is None:
            changes, (before, after) = self.rows.solved(own)
        else:
            best, before, after = self.sums.best(_tried(own, self.sums.held.any))
            changes = self.sums.changes(best)
        taken = damp is not None or after < before * (WORSE if alone else 1)
        return (changes, (before, after)) if taken else ({}, (before, before))


def _tried(damp: float | None, judged: bool) -> Sequence[float]:
    """Return what to damp by: what is asked for, or all where tokens were held out."""
    if damp is not None:
        return (damp,)
    return DAMPS if judged else (UNTRIED_DAMP,)


def _grams(rows: ByUnit) -> dict[int, Tensor]:
    """Return the products of all pairs of inputs, by unit."""
    return {unit: inputs.mT @ inputs for unit, (inputs, _) in rows.items()}


def _together(
    rows: ByUnit, grams: Mapping[int, Tensor], lacks: Tensor, damp: float
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


def _left(rows: ByUnit, lacks: Tensor, changes: Mapping[int, Tensor]) -> Tensor:
    """Return what is lacking after some changes."""
    left = lacks.clone()
    for unit, (inputs, tokens) in rows.items():
        left.index_add_(0, tokens, inputs @ changes[unit].mT, alpha=-1)
    return left
