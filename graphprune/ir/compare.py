"""The relative error of two results, and the tolerances: for all that compares two programs."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# Two ways to compute the same differ by roundings, which add up as a random walk does: after n of
# them, one for each operator that a value goes through, by about sqrt(n) times the unit roundoff,
# which is 2^-11 in float16 and 2^-8 in bfloat16. The bounds allow for some 170 roundings in
# bfloat16 and 400 in float16, the depth of a model of 20 to 40 layers. Wider formats have room to
# spare: what they allow for is sums of thousands of terms in another order, and a wrong unit moves
# an output by a hundred times as much.


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest `relative_error` at which results of this type count as the same."""
    return _TOLERANCES.get(dtype, _TOLERANCES[torch.float32])


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference over the largest finite magnitude of `expected`.

    Entries that are the same infinity, or both NaN, are equal. It is infinite where something
    differs from zeros, from a value that is no number, or from an integer or a boolean.

    Examples
    --------
    >>> relative_error(torch.tensor([100.0, 1.0]), torch.tensor([100.0, 2.0]))
    0.01
    """
    if not expected.numel():
        return 0.0
    exact = not (expected.is_floating_point() or expected.is_complex())
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(wide), found.to(expected.device, wide)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    difference = torch.where(same, 0.0, (a - b).abs()).max().item()
    scale = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
    if exact or not scale or difference != difference:
        return float("inf")
    return difference / scale
