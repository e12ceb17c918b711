"""The cost of leaving against least squares, set by set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphprune.criteria.obs import removal_errors


def drawn(units: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(units)
    size = units * width
    weight = torch.randn(5, size, generator=generator, dtype=torch.float64)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, size, generator=generator, dtype=torch.float64) @ mix
    return weight, inputs, torch.arange(size) // width


def error_without(weight: Tensor, hessian: Tensor, gone: Tensor) -> float:
    """The least of tr((W - W') H (W - W')^T) over all W' that are zero at `gone`."""
    keep = (~gone).nonzero().flatten()
    fitted = torch.zeros_like(weight)
    if len(keep):
        right = hessian[keep] @ weight.T
        fitted[:, keep] = torch.linalg.solve(hessian[keep][:, keep], right).T
    lost = weight - fitted
    return float((lost @ hessian * lost).sum())


@pytest.mark.parametrize("width", [1, 3])
def test_units_leave_by_the_error_that_is_left_when_the_rest_is_refitted(width: int) -> None:
    weight, inputs, units = drawn(6, width)
    gram = inputs.T @ inputs
    hessian = gram + torch.eye(len(gram)) * 0.01 * gram.diagonal().mean()
    costs = removal_errors(weight, gram, units, batches=1000)
    gone = torch.zeros(len(units), dtype=torch.bool)
    before, floor = 0.0, 0.0
    for _ in range(6):
        left = [unit for unit in range(6) if not bool(gone[units == unit].all())]
        after = {unit: error_without(weight, hessian, gone | (units == unit)) for unit in left}
        best = min(after, key=after.__getitem__)
        floor = max(floor, after[best] - before)
        assert float(costs[best]) == pytest.approx(floor, rel=1e-4)
        before = after[best]
        gone |= units == best


def test_of_two_alike_one_leaves_for_nothing_and_the_other_does_not() -> None:
    weight, inputs, units = drawn(6, 1)
    inputs[:, 5] = inputs[:, 0]
    costs = removal_errors(weight, inputs.T @ inputs, units, batches=1000, damp=1e-6)
    one, other = sorted((float(costs[0]), float(costs[5])))
    assert one < 1e-3 * other


def test_columns_of_no_unit_stay() -> None:
    weight, inputs, units = drawn(6, 1)
    some = units.clone()
    some[3:] = -1
    costs = removal_errors(weight, inputs.T @ inputs, some, batches=1000)
    assert costs.shape == (3,)
    whole = removal_errors(weight, inputs.T @ inputs, units, batches=1000)
    assert float(costs.min()) == pytest.approx(float(whole.min()), rel=1e-6) or (
        int(whole.argmin()) > 2
    )
