"""How much a least squares fit is damped: as much as rows that it did not see ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.calibration.input_statistics import InputStatistics
from graphprune.errors import CalibrationError

DAMPS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What is tried, as parts of the mean of the second moments' diagonal."""

UNTRIED_DAMP = 0.1
"""What is taken where no rows were set aside: on a published model with two rows for each input,
0.1 to 0.3 are best, and 0.01 costs a third more (`tools/REAL_MODELS.md`)."""


def damped(gram: Tensor, damp: float) -> Tensor:
    """Add `damp` times the mean of the diagonal of `gram`, ``[..., in, in]``, to its diagonal."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[..., None, None]
    return gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) * damp * mean


def damped_factor(gram: Tensor, damp: float) -> Tensor:
    """Return the Cholesky factor of `gram`, ``[in, in]``, with `damp` added as `damped` does.

    Raises
    ------
    CalibrationError
        When inputs are too alike in spite of the damping.
    """
    factor, failed = torch.linalg.cholesky_ex(damped(gram, damp))
    if int(failed):
        raise CalibrationError("its inputs are too alike to refit: give more data or damp")
    return factor


def without_columns(weight: Tensor, gram: Tensor, gone: Tensor, damp: float) -> Tensor:
    """Return the matrix without some columns that gives most nearly the same outputs.

    With K the columns that stay, W' = W C[:, K] (C[K, K] + lambda I)^-1 up to a penalty that draws
    W' towards W[:, K] and not towards zero: lambda is `damp` times the mean of C[K, K]'s diagonal.

    Parameters
    ----------
    weight
        W, ``[out, in]``.
    gram
        C up to a factor, ``[in, in]``: second moments of the inputs.
    gone
        ``[in]``, boolean.
    damp
        As above.

    Raises
    ------
    CalibrationError
        When the inputs are too much alike in spite of the damping.
    """
    factor = damped_factor(gram[~gone][:, ~gone], damp)
    lost = weight[:, gone] @ gram[gone][:, ~gone]
    best = torch.zeros_like(weight)
    best[:, ~gone] = weight[:, ~gone] + torch.cholesky_solve(lost.mT, factor).mT
    return best


def validated_damp(
    weight: Tensor, seen: InputStatistics, part: int, gone: Tensor, *, centered: bool = False
) -> float:
    """Return the damping whose fit without some columns is best on rows that it did not see.

    Each of `DAMPS` is fitted on all rows but those that `seen` has set aside, and judged by the
    squared error of the outputs on these.

    Parameters
    ----------
    weight
        ``[out, in]``.
    seen
        Statistics of its inputs, of kind "gram".
    part
        Which part of them.
    gone
        ``[in]``, boolean: the columns that go.
    centered
        Whether a bias takes up the means, so that only deviations from them matter.
    """
    assert seen.gram is not None
    rows = seen.rows_aside(part)
    count = int(seen.count[part]) - len(rows)
    if not len(rows) or not count:
        return UNTRIED_DAMP
    mean = (seen.total[part] - rows.sum(0)) / count
    moments = (seen.gram[part] - rows.mT @ rows) / count
    if centered:
        moments, rows = moments - torch.outer(mean, mean), rows - mean

    def error(damp: float) -> float:
        try:
            lost = weight - without_columns(weight, moments, gone, damp)
        except CalibrationError:
            return float("inf")
        return float((rows @ lost.mT).square().sum())

    errors = {damp: error(damp) for damp in DAMPS}
    best = min(DAMPS, key=errors.__getitem__)
    return best if errors[best] < float("inf") else UNTRIED_DAMP
