"""Sums over what a matrix is multiplied with: counts, moments, products of pairs, and some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphprune import ranks
from graphprune.analysis.matrices import Matrix

Kind = Literal["moments", "gram"]
"""Sums and sums of squares of each input, or all products of two inputs as well."""


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Sums over the inputs of a matrix, from `count` rows (tokens, or windows of an image).

    Parameters
    ----------
    count
        ``[parts]``: rows that each part saw. An expert sees only the tokens routed to it.
    total, squares
        ``[parts, in]``: sums of the inputs and of their squares, float64.
    gram
        ``[parts, in, in]``: the sum of x xᵀ, float64; or None where it was not asked for.
    aside
        ``[parts, rows, in]``: some of the rows themselves, float32, with which a fit on the others
        is judged; zero where a part saw fewer. None without `gram`.
    aside_count
        ``[parts]``: how many of them there are.
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    gram: Tensor | None = None
    aside: Tensor | None = None
    aside_count: Tensor | None = None

    @classmethod
    def empty(
        cls, matrix: Matrix, kind: Kind, device: torch.device | None = None
    ) -> InputStatistics:
        """Nothing seen yet."""
        parts, _, size = matrix.shape

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        sums = zeros(parts, dtype=torch.int64), zeros(parts, size), zeros(parts, size)
        if kind == "moments":
            return cls(*sums)
        aside = zeros(parts, _rows_aside(size), size, dtype=torch.float32)
        return cls(*sums, zeros(parts, size, size), aside, torch.zeros_like(sums[0]))

    @staticmethod
    def needed(matrix: Matrix, kind: Kind) -> int:
        """Bytes that those of `matrix` will take."""
        parts, _, size = matrix.shape
        held = 8 * parts * (1 + 2 * size)
        if kind == "moments":
            return held
        return held + 8 * parts * (size * size + 1) + 4 * parts * _rows_aside(size) * size

    @property
    def mean(self) -> Tensor:
        """``[parts, in]``; zero where a part saw nothing."""
        return self.total / self.count.clamp(min=1)[:, None]

    @property
    def variance(self) -> Tensor:
        """``[parts, in]``, over the rows (not corrected); zero where a part saw nothing."""
        square = self.squares / self.count.clamp(min=1)[:, None]
        return (square - self.mean.square()).clamp(min=0)

    @property
    def norm(self) -> Tensor:
        """``[parts, in]``: the L2 norm of each input over all rows."""
        return self.squares.sqrt()

    def add(self, part: int, rows: Tensor) -> None:
        """Count ``[n, in]`` more rows of `part` in."""
        wide = rows.double()
        self.count[part] += len(rows)
        self.total[part] += wide.sum(0)
        self.squares[part] += wide.square().sum(0)
        if self.gram is not None:
            self.gram[part].addmm_(wide.mT, wide)
        if self.aside is not None and self.aside_count is not None:
            filled = int(self.aside_count[part])
            # The last ones, neighbors in a text: scattered ones would resemble those around them.
            last = rows[len(rows) - len(rows) // _ONE_ASIDE_OF :]
            room = last[: self.aside.shape[1] - filled]
            self.aside[part, filled : filled + len(room)] = room
            self.aside_count[part] += len(room)

    def _make_room(self, before: Tensor) -> None:
        """Move the rows set aside behind ``[parts]`` others, and drop those that have no room."""
        assert self.aside is not None and self.aside_count is not None
        for rows, count, first in zip(self.aside, self.aside_count, before.tolist(), strict=True):
            moved = rows[: int(count)].clone()[: max(len(rows) - first, 0)]
            rows.zero_()
            rows[first : first + len(moved)] = moved
            count.fill_(len(moved))

    def rows_aside(self, part: int) -> Tensor:
        """Return the rows of `part` that were set aside, ``[n, in]``, float64."""
        if self.aside is None or self.aside_count is None:
            return self.total.new_zeros(0, self.total.shape[1])
        return self.aside[part, : int(self.aside_count[part])].double()


_ONE_ASIDE_OF = 8
"""One of so many rows is set aside, as long as there is room."""


def _rows_aside(size: int) -> int:
    """Return for how many rows of `size` inputs there is room: less than products of pairs take."""
    return min(1024, max(64, size // 2))


def over_ranks(seen: Sequence[InputStatistics]) -> None:
    """Add up what all processes have seen, in place, as if one had seen all of it in their order.

    The rows set aside are those that the one would have set aside.
    """
    counts = [each.aside_count for each in seen if each.aside_count is not None]
    if counts:
        before = ranks.gathered(torch.cat(counts))[: ranks.rank()].sum(0)
        firsts = iter(before.split([len(each) for each in counts]))
        for each in seen:
            if each.aside_count is not None:
                each._make_room(next(firsts))
    ranks.sum_of(tensor for each in seen for tensor in vars(each).values() if tensor is not None)
