"""How far results are apart, and how far they may be."""

from __future__ import annotations

import pytest
import torch

from graphprune.ir.compare import relative_error, tolerance_of

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        ([1000.0, 1e-3, INF], [1000.0, 1e-3, INF], 0.0),
        ([1000.0, 1e-3, NAN], [1000.0, 10.0, NAN], 9.999e-3),
        ([1000.0, INF], [1000.0, 0.0], INF),
        ([1000.0, 0.0], [1000.0, NAN], INF),
        ([0.0, 0.0], [0.0, 1e-9], INF),
        ([], [], 0.0),
        ([3, 4], [3, 4], 0.0),
        ([3000, 4], [3000, 5], INF),
        ([True, False], [True, True], INF),
        ([3 + 4j, 0], [3 + 4j, 1j], 0.2),
    ],
)
def test_relative_errors(expected: list[float], found: list[float], error: float) -> None:
    one, other = torch.tensor(expected), torch.tensor(found)
    assert relative_error(one, other) == pytest.approx(error)


def test_half_precision_is_compared_in_double() -> None:
    one = torch.tensor([60000.0, 1.0], dtype=torch.float16)
    assert relative_error(one, -one) == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tolerance_of_half_precision_is_a_random_walk_of_roundings(dtype: torch.dtype) -> None:
    """A layer may round its result a few times: two orders of rounding stay within the bound."""
    generator = torch.Generator().manual_seed(0)
    exact = rounded = torch.randn(512, generator=generator, dtype=torch.float64)
    for _ in range(40):
        factor = torch.rand(512, generator=generator, dtype=torch.float64) / 4 + 0.875
        exact, rounded = exact * factor, (rounded * factor).to(dtype).double()
    assert 0 < relative_error(exact, rounded) < tolerance_of(dtype)


def test_other_types_are_held_to_what_float32_is() -> None:
    assert tolerance_of(torch.int64) == tolerance_of(torch.float32) == 1e-4
