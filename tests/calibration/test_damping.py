"""The damping of least squares is chosen by rows that a fit did not see."""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.calibration.damping import (
    DAMPS,
    UNTRIED_DAMP,
    damped,
    validated_damp,
    without_columns,
)
from graphprune.calibration.input_statistics import InputStatistics

SIZE = 48


def seen(rows: Tensor, calls: int = 4, aside: int = 64) -> InputStatistics:
    """Statistics of one part, counted in over some calls as batches are."""
    size = rows.shape[1]
    found = InputStatistics(
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, size, dtype=torch.float64),
        torch.zeros(1, size, dtype=torch.float64),
        torch.zeros(1, size, size, dtype=torch.float64),
        torch.zeros(1, aside, size),
        torch.zeros(1, dtype=torch.int64),
    )
    for batch in rows.chunk(calls):
        found.add(0, batch)
    return found


def drawn(count: int, seed: int) -> Tensor:
    """Inputs of which a few directions carry most, the same ones for every seed."""
    directions = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    scales = 1.0 / torch.arange(1, SIZE + 1)
    noise = torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))
    return (noise * scales) @ directions + 0.3 * torch.randn(
        count, SIZE, generator=torch.Generator().manual_seed(seed + 1)
    )


def costs(fitted_on: Tensor, judged_on: Tensor, weight: Tensor, gone: Tensor) -> dict[float, float]:
    """Error of the outputs after a fit with every damping."""
    gram = (fitted_on.mT @ fitted_on).double() / len(fitted_on)
    rows = judged_on.double()
    lost = {damp: weight - without_columns(weight, gram, gone, damp) for damp in DAMPS}
    return {damp: float((rows @ each.mT).square().sum()) for damp, each in lost.items()}


def weight_and_gone() -> tuple[Tensor, Tensor]:
    weight = torch.randn(16, SIZE, generator=torch.Generator().manual_seed(7)).double()
    return weight, torch.arange(SIZE) < SIZE // 3


def test_few_rows_ask_for_more_damping_than_many() -> None:
    weight, gone = weight_and_gone()
    few = validated_damp(weight, seen(drawn(60, 1)), 0, gone)
    many = validated_damp(weight, seen(drawn(20_000, 1)), 0, gone)
    assert few > many
    fresh = costs(drawn(60, 1), drawn(20_000, 5), weight, gone)
    assert fresh[few] < 0.9 * fresh[min(DAMPS)]


def test_rows_set_aside_are_the_last_of_every_call_and_have_a_bound() -> None:
    rows = drawn(160, 2)
    found = seen(rows, calls=4, aside=12)
    expected = torch.cat([rows[35:40], rows[75:80], rows[115:117]])
    torch.testing.assert_close(found.rows_aside(0), expected.double())
    assert int(found.count) == 160


def test_what_fits_on_other_rows_is_all_but_those_aside() -> None:
    weight, gone = weight_and_gone()
    rows = drawn(64, 3)
    kept = torch.ones(64, dtype=torch.bool)
    kept[56:] = False
    expected = costs(rows[kept], rows[~kept], weight, gone)
    assert validated_damp(weight, seen(rows, 1), 0, gone) == min(expected, key=expected.__getitem__)


def test_without_rows_aside_it_is_a_fixed_part() -> None:
    weight, gone = weight_and_gone()
    assert validated_damp(weight, seen(drawn(7, 3), 1), 0, gone) == UNTRIED_DAMP


def test_a_fit_without_columns_minimizes_error_and_change() -> None:
    weight, gone = weight_and_gone()
    gram = (drawn(60, 1).mT @ drawn(60, 1)).double()
    fit = without_columns(weight, gram, gone, 0.1)
    assert bool((fit[:, gone] == 0).all())
    penalty = 0.1 * gram[~gone][:, ~gone].diagonal().mean()
    # The gradient of tr((W - V) C (W - V)ᵀ) + penalty |V - W|² over the columns that stay.
    slope = ((fit - weight) @ gram)[:, ~gone] + penalty * (fit - weight)[:, ~gone]
    assert slope.abs().max() < 1e-9 * gram.abs().max()
    assert torch.equal(damped(gram, 0.0), gram)
