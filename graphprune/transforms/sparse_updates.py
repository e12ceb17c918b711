"""Set elements of a matrix to zero and move what stays: SparseGPT and ALPS.

Both take a matrix ``[parts, out, in]`` with the second moments of its inputs, as
`graphprune.transforms.sparsity` does, and make its outputs' squared error small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graphprune.calibration.damping import damped
from graphprune.calibration.input_statistics import InputStatistics
from graphprune.errors import SelectionError
from graphprune.transforms.sparsity import Pattern, lowest, zeros_by_score


class Update(Protocol):
    """Chooses zeros of a matrix and moves what stays."""

    def __call__(
        self, weight: Tensor, statistics: InputStatistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Return new weights and which of them are zero, both ``[parts, out, in]``."""
        ...


def _parts(statistics: InputStatistics, damp: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each part, its damped Gram matrix and which inputs are always zero.

    A part that saw no rows has inputs that are all alike.
    """
    assert statistics.gram is not None, "an update needs the products of all pairs of inputs"
    for part, gram in enumerate(statistics.gram):
        if not statistics.count[part]:
            gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        dead = gram.diagonal() == 0
        yield part, damped(gram, damp) + torch.diag(dead.double()), dead


@dataclass(frozen=True)
class SparseGpt:
    """Zeros with an update of the weights that stay (Frantar and Alistarh 2301.00774, algorithm 1).

    Parameters
    ----------
    block
        Columns for which zeros are chosen at once; made a multiple of m where n of m stay.
    damp
        What is added to the diagonal of the Gram matrix, as a part of its mean.
    """

    block: int = 128
    damp: float = 0.01

    def __call__(
        self, weight: Tensor, statistics: InputStatistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Return new weights and which of them are zero, both ``[parts, out, in]``.

        Raises
        ------
        SelectionError
            When the Gram matrix cannot be inverted.
        """
        new, gone = weight.double(), torch.zeros_like(weight, dtype=torch.bool)
        for part, gram, dead in _parts(statistics, self.damp):
            new[part][:, dead] = 0
            self._part(new[part], gone[part], gram, pattern)
        return new.to(weight.dtype), gone

    def _part(self, weight: Tensor, gone: Tensor, gram: Tensor, pattern: Pattern) -> None:
        """Edit one ``[out, in]`` matrix and its zeros."""
        size = len(gram)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise SelectionError("its inputs' Gram matrix is not positive: give more data or damp")
        upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
        pivots = upper.diagonal()
        width = max(self.block // pattern.of, 1) * pattern.of if pattern.of else self.block
        for start in range(0, size, width):
            stop = min(start + width, size)
            score = weight[:, start:stop].square() / pivots[start:stop].square()
            if not pattern.of:
                count = math.floor(score.numel() * pattern.ratio)
                gone[:, start:stop] = lowest(score.reshape(1, -1), count).view(score.shape)
            errors = torch.zeros_like(score)
            for column in range(start, stop):
                if pattern.of and not column % pattern.of:
                    span = slice(column, column + pattern.of)
                    now = weight[:, span].square() / pivots[span].square()
                    gone[:, span] = lowest(now, pattern.of - pattern.kept)
                kept = weight[:, column].masked_fill(gone[:, column], 0)
                error = (weight[:, column] - kept) / pivots[column]
                weight[:, column] = kept
                weight[:, column + 1 : stop] -= torch.outer(error, upper[column, column + 1 : stop])
                errors[:, column - start] = error
            weight[:, stop:] -= errors @ upper[start:stop, stop:]


@dataclass(frozen=True)
class Alps:
    """Zeros and what stays found together, by operator splitting (ALPS, Meng et al. 2406.07831).

    With H the Gram matrix of the inputs, scaled to a diagonal of one, the matrix is split into B,
    which is near to W in outputs, and D, which has the pattern; what couples them, rho, grows as
    the zeros settle (algorithm 1):

    B = (W H - V + rho D) (H + rho I)^-1,  D = the largest of B + V / rho,  V = V + rho (B - D).

    What stays is then refitted for these zeros by conjugate gradients (algorithm 2), all rows at
    once. Unlike SparseGPT no order of the columns matters.

    Parameters
    ----------
    damp
        What is added to the diagonal of the Gram matrix, as a part of its mean.
    rounds
        The most rounds of splitting.
    """

    damp: float = 0.01
    rounds: int = 300

    def __call__(
        self, weight: Tensor, statistics: InputStatistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Return new weights and which of them are zero, both ``[parts, out, in]``."""
        new, gone = weight.double(), torch.zeros_like(weight, dtype=torch.bool)
        for part, gram, dead in _parts(statistics, self.damp):
            scale = gram.diagonal().sqrt()
            gram = gram / scale / scale[:, None]
            target = new[part] * scale * ~dead
            gone[part] = self._zeros(target, gram, pattern)
            new[part] = refitted(target, gram, gone[part]) / scale
        return new.to(weight.dtype), gone

    def _zeros(self, target: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
        """Choose the zeros of ``[out, in]``, given as `target` in units of its inputs' norms."""
        values, vectors = torch.linalg.eigh(gram)
        wanted, dual, rho = target @ gram, torch.zeros_like(target), 0.1
        (gone,) = zeros_by_score([target.abs()[None]], pattern, "layer")
        sparse, kept = target.masked_fill(gone[0], 0), int((~gone).sum())
        settled = gone
        for round_ in range(1, self.rounds + 1):
            near = (wanted - dual + rho * sparse) @ vectors / (values + rho) @ vectors.mT
            moved = near + dual / rho
            (gone,) = zeros_by_score([moved.abs()[None]], pattern, "layer")
            sparse = moved.masked_fill(gone[0], 0)
            dual += rho * (near - sparse)
            if round_ % _LOOK == 0:
                changed = int((gone != settled).sum()) // 2
                if not changed:
                    break
                settled = gone
                rho *= 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
        return gone[0]


_LOOK = 3
"""Rounds of splitting after which rho grows, by how many zeros have moved."""


def refitted(target: Tensor, gram: Tensor, gone: Tensor, rounds: int = 100) -> Tensor:
    """Return the matrix with given zeros that gives most nearly the same outputs.

    Conjugate gradients for every row at once, each on its own support.

    Parameters
    ----------
    target
        ``[out, in]``: the matrix without zeros.
    gram
        ``[in, in]``, positive definite, with a diagonal of one.
    gone
        ``[out, in]``, boolean: the zeros.
    rounds
        The most steps; fewer where no row has an error left.
    """
    found = target.masked_fill(gone, 0)
    left = ((target - found) @ gram).masked_fill(gone, 0)
    direction, size = left, left.square().sum(1)
    enough = 1e-20 * size
    for _ in range(rounds):
        if bool((size <= enough).all()):
            break
        image = (direction @ gram).masked_fill(gone, 0)
        step = size / (direction * image).sum(1).clamp(min=torch.finfo(size.dtype).tiny)
        found = found + step[:, None] * direction
        left = left - step[:, None] * image
        last, size = size, left.square().sum(1)
        ratio = size / last.clamp(min=torch.finfo(size.dtype).tiny)
        direction = left + ratio[:, None] * direction
    return found


UPDATES: dict[str, Update] = {"sparsegpt": SparseGpt(), "alps": Alps()}
"""By the name that a criterion has."""
