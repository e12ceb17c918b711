"""Choose elements of a matrix that become zero, by scores such as Wanda's; by ratio or n of m.

Everything here is about one matrix ``[parts, out, in]`` (see `analysis.matrices`), where a
part is an expert or a group of a convolution, and ``in`` is the axis that is summed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graphprune.calibration.input_statistics import InputStatistics
from graphprune.errors import SelectionError
from graphprune.weights.tensors import type_name

Scope = Literal["row", "layer", "global"]
"""What elements are compared within: an output row, a part of a matrix, or all matrices."""


@dataclass(frozen=True)
class Pattern:
    """The number of elements that stay, of all or of each few.

    Parameters
    ----------
    ratio
        The part that becomes zero, in [0, 1).
    kept, of
        Of every `of` neighbors along the summed axis, `kept` stay; `of` is 0 where only the ratio
        counts.
    """

    ratio: float
    kept: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``0.5`` (a ratio) or ``2:4`` (two stay of every four).

        Raises
        ------
        SelectionError
            When it is neither.

        Examples
        --------
        >>> Pattern.parse("2:4")
        Pattern(ratio=0.5, kept=2, of=4)
        """
        left, colon, right = text.partition(":")
        try:
            if colon:
                kept, of = int(left), int(right)
                if 0 < kept < of:
                    return cls(1 - kept / of, kept, of)
            elif 0 <= (ratio := float(text)) < 1:
                return cls(ratio)
        except ValueError:
            pass
        raise SelectionError(
            f"pattern {text!r} is neither a ratio in [0, 1) nor n:m with n of m elements kept"
        )

    def check(self, name: str, channels: int) -> None:
        """Refuse a matrix whose neighbors do not make whole blocks.

        Raises
        ------
        SelectionError
            Naming it.
        """
        if self.of and channels % self.of:
            raise SelectionError(
                f"{name}: its {channels} inputs cannot be divided into blocks of {self.of}"
            )


def check_values(name: str, values: Tensor, *, moved: bool) -> None:
    """Refuse values that cannot be scored, or, where they are to be `moved`, not be changed.

    Raises
    ------
    SelectionError
        When one is not finite, or they are integers and would be moved.
    """
    if moved and not values.is_floating_point():
        kind = type_name(values.dtype)
        raise SelectionError(f"{name}: its values are {kind}, which cannot hold what is fitted")
    if not bool(torch.isfinite(values).all()):
        raise SelectionError(f"{name}: it has values that are not finite")


def wanda_scores(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Return |W| times the L2 norm of the input (Wanda, Sun et al. 2306.11695, equation 1).

    A part that saw no rows (an expert that no token was routed to) is scored by magnitude alone.

    Parameters
    ----------
    weight
        ``[parts, out, in]``.
    statistics
        Of its inputs.

    Returns
    -------
    Tensor
        ``[parts, out, in]``, float32.
    """
    return weight.float().abs().mul_(_norms(statistics))


def ria_scores(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Return relative importance and activations (RIA; Zhang et al., "Plug-and-Play", ICLR 2024).

    (|W| over the sum of its row + |W| over the sum of its column) times the square root of the L2
    norm of the input: no row and no column is emptied because all that it holds is small. A part
    that saw no rows is scored by relative importance alone. Sizes are as in `wanda_scores`.
    """
    size = weight.float().abs()
    least = torch.finfo(size.dtype).tiny
    rows, columns = (size.sum(axis, keepdim=True).clamp(min=least) for axis in (-1, -2))
    return (size / rows + size / columns).mul_(_norms(statistics).sqrt())


def _norms(statistics: InputStatistics) -> Tensor:
    """Return the norms of inputs, ``[parts, 1, in]``; one for a part that saw no rows."""
    seen = statistics.count[:, None] > 0
    return torch.where(seen, statistics.norm, 1.0)[:, None].float()


def zeros_by_score(scores: Sequence[Tensor], pattern: Pattern, scope: Scope) -> list[Tensor]:
    """Choose the elements that go: the lowest scores, of equal ones the first.

    Parameters
    ----------
    scores
        One ``[parts, out, in]`` for each matrix.
    pattern
        How many go. With n of m they go in every block, and `scope` does not matter.
    scope
        What elements are compared within.

    Returns
    -------
    list of Tensor
        Boolean masks of the same shapes. In scope "row" exactly ``floor(ratio in)`` of every row;
        in the others ``floor`` of the ratio of all that are compared.
    """
    if pattern.of:
        return [
            lowest(score.reshape(-1, pattern.of), pattern.of - pattern.kept).view(score.shape)
            for score in scores
        ]
    if scope == "global":
        joined = torch.cat([score.reshape(-1) for score in scores])
        gone = lowest(joined[None], math.floor(joined.numel() * pattern.ratio))[0]
        pieces = gone.split([score.numel() for score in scores])
        return [piece.view(score.shape) for piece, score in zip(pieces, scores, strict=True)]
    rows = [score.flatten(0, 1) if scope == "row" else score.flatten(1) for score in scores]
    return [
        lowest(row, math.floor(row.shape[1] * pattern.ratio)).view(score.shape)
        for row, score in zip(rows, scores, strict=True)
    ]


_AT_ONCE = 2**20
"""Elements that are ordered together, which takes several times the room of their scores."""

_FEW = 8
"""Elements of a row up to which each is compared with every other: no order has to be made."""


def lowest(rows: Tensor, count: int) -> Tensor:
    """Return a boolean mask of the `count` lowest of each row; of equal ones the first."""
    found = torch.zeros_like(rows, dtype=torch.bool)
    if not count:
        return found
    together = max(1, _AT_ONCE // rows.shape[1])
    choose = _lowest_of_few if rows.shape[1] <= _FEW else _lowest_of_many
    for part, gone in zip(rows.split(together), found.split(together), strict=True):
        gone.copy_(choose(part.masked_fill(part.isnan(), torch.inf), count))
    return found


def _lowest_of_few(rows: Tensor, count: int) -> Tensor:
    columns = rows.unbind(1)
    places = torch.zeros_like(rows, dtype=torch.uint8)
    for at, (column, place) in enumerate(zip(columns, places.unbind(1), strict=True)):
        for other in columns[:at]:
            place += other <= column
        for other in columns[at + 1 :]:
            place += other < column
    return places < count


def _lowest_of_many(rows: Tensor, count: int) -> Tensor:
    bar = _ordered_at(rows, count)
    gone = rows <= bar
    if int(gone.sum()) > count * len(rows):
        gone = rows < bar
        equal = rows == bar
        gone |= equal & (equal.cumsum(1) <= count - gone.sum(1, keepdim=True))
    return gone


def _ordered_at(rows: Tensor, count: int) -> Tensor:
    """Return the `count`-th lowest of each row, ``[rows, 1]``."""
    if rows.device.type != "cpu" or rows.dtype == torch.bfloat16:
        return rows.kthvalue(count, dim=1, keepdim=True).values
    # NumPy's takes a tenth of the time of torch's on a CPU.
    ordered = np.partition(rows.numpy(), count - 1, axis=1)
    return torch.from_numpy(ordered[:, count - 1 : count])


def zeros_by_share(scores: Tensor, ratio: float) -> Tensor:
    """Choose the elements that go when each row loses the same share of its score, not elements.

    Wanda's variant (2306.11695, appendix on the pruning metric; ``use_variant`` in its code): in
    each row the lowest scores go whose sum is at most alpha of the row's; one alpha for each
    part is found by bisection so that `ratio` of its elements go. Rows may lose unlike many.

    Parameters
    ----------
    scores
        ``[parts, out, in]``.
    ratio
        The part of the elements that goes.
    """
    ordered, indices = scores.double().sort(dim=-1, stable=True)
    shares = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True).clamp(min=torch.finfo().tiny)
    low = shares.new_zeros(len(scores), 1, 1)
    high = torch.ones_like(low)
    gone = shares <= low
    for _ in range(50):
        alpha = (low + high) / 2
        gone = shares <= alpha
        share = gone.double().mean((1, 2), keepdim=True)
        if bool(((share - ratio).abs() <= 1e-3).all()):
            break
        low, high = torch.where(share < ratio, alpha, low), torch.where(share < ratio, high, alpha)
    return torch.zeros_like(gone).scatter_(-1, indices, gone)
