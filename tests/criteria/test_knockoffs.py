"""Knockoff inputs are real inputs of other samples, each used once."""

from __future__ import annotations

import pytest
import torch

from graphprune.calibration.data import Calibration
from graphprune.criteria.knockoffs import permuted
from graphprune.errors import CalibrationError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_stands_in_for_another_one_and_once(seed: int) -> None:
    values = torch.arange(7)
    batches = [
        {"x": values[:4, None], "m": 10 * values[:4]},
        {"x": values[4:, None], "m": 10 * values[4:]},
    ]
    found = permuted(Calibration.from_batches(batches), generator(seed))
    assert [batch["x"].shape for batch in found] == [(4, 1), (3, 1)]
    other = torch.cat([batch["x"].flatten() for batch in found])
    assert not bool((other == values).any())
    assert torch.equal(other.sort().values, values)
    assert torch.equal(torch.cat([batch["m"] for batch in found]), 10 * other)


def test_who_stands_in_is_drawn_anew_and_by_the_seed() -> None:
    data = Calibration.from_batches([{"x": torch.arange(20)}])
    source = generator()
    first, second = (permuted(data, source)[0]["x"] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, permuted(data, generator())[0]["x"])


def test_only_samples_of_the_same_shape_stand_in_for_each_other() -> None:
    data = [torch.zeros(2, 3), torch.ones(1, 5), torch.ones(2, 3), torch.zeros(3, 5)]
    found = permuted(Calibration.from_batches([{"x": each} for each in data]), generator())
    assert [batch["x"].shape for batch in found] == [each.shape for each in data]
    assert float(torch.cat([found[0]["x"], found[2]["x"]]).sum()) == 6
    assert float(torch.cat([found[1]["x"], found[3]["x"]]).sum()) == 5


def test_labels_stay_behind() -> None:
    batch = {"x": torch.arange(3), "labels": torch.arange(3)}
    (found,) = permuted(Calibration.from_batches([batch]), generator())
    assert list(found) == ["x"]


def test_a_sample_without_another_of_its_shape_is_refused() -> None:
    data = Calibration.from_batches([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(1, 5)}])
    with pytest.raises(CalibrationError, match="batch 1: no other sample has the shapes"):
        permuted(data, generator())
