"""Scores, masks and updates against the papers' equations, element by element."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from graphprune.calibration.input_statistics import InputStatistics
from graphprune.errors import SelectionError
from graphprune.transforms import sparsity
from graphprune.transforms.sparse_updates import Alps, SparseGpt
from graphprune.transforms.sparsity import (
    Pattern,
    check_values,
    ria_scores,
    wanda_scores,
    zeros_by_score,
    zeros_by_share,
)


def drawn(parts: int = 1, out: int = 5, inner: int = 8, rows: int = 40) -> tuple[Tensor, Tensor]:
    """A weight and inputs, correlated and of unlike sizes."""
    generator = torch.Generator().manual_seed(parts * 100 + inner)
    weight = torch.randn(parts, out, inner, generator=generator)
    mix = torch.randn(inner, inner, generator=generator)
    inputs = torch.randn(parts, rows, inner, generator=generator) @ mix
    return weight, inputs * torch.logspace(-1, 1, inner)


def statistics_of(inputs: Tensor) -> InputStatistics:
    wide = inputs.double()
    count = torch.full((len(inputs),), inputs.shape[1])
    return InputStatistics(count, wide.sum(1), wide.square().sum(1), wide.mT @ wide)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.5", (0.5, 0, 0)), ("2:4", (0.5, 2, 4)), ("1:4", (0.75, 1, 4)), ("0", (0.0, 0, 0))],
)
def test_a_pattern_is_what_stays_of_how_many(text: str, expected: tuple[float, int, int]) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.ratio, pattern.kept, pattern.of) == expected


@pytest.mark.parametrize("text", ["1", "-0.1", "4:4", "5:4", "0:4", "a:4", "half", "", "nan"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(SelectionError, match="neither a ratio"):
        Pattern.parse(text)


def test_the_score_of_wanda_is_the_papers() -> None:
    weight, inputs = drawn(2)
    scores = wanda_scores(weight, statistics_of(inputs))
    for part, i, j in itertools.product(range(2), range(5), range(8)):
        column = sum(float(x) ** 2 for x in inputs[part, :, j]) ** 0.5
        expected = abs(float(weight[part, i, j])) * column
        assert float(scores[part, i, j]) == pytest.approx(expected, rel=1e-5)


def test_a_scale_moved_from_input_to_weight_changes_no_score() -> None:
    """A norm's gain may be folded into the weight (SEEDS: gain-folding invariance)."""
    weight, inputs = drawn()
    gain = torch.rand(8) + 0.5
    folded = wanda_scores(weight * gain, statistics_of(inputs / gain))
    assert torch.allclose(folded, wanda_scores(weight, statistics_of(inputs)), rtol=1e-5)


def test_a_part_that_saw_nothing_is_scored_by_magnitude() -> None:
    weight, inputs = drawn(2)
    seen = statistics_of(inputs)
    for tensor in (seen.count, seen.squares):
        tensor[1] = 0
    assert torch.equal(wanda_scores(weight, seen)[1], weight[1].abs())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
def test_every_row_loses_its_lowest(ratio: float) -> None:
    scores = drawn(2)[0].abs()
    (gone,) = zeros_by_score([scores], Pattern(ratio), "row")
    for row, mask in zip(scores.flatten(0, 1), gone.flatten(0, 1), strict=True):
        count = int(8 * ratio)
        assert int(mask.sum()) == count
        assert set(mask.nonzero().flatten().tolist()) == set(row.argsort()[:count].tolist())


def test_a_layer_and_all_lose_by_one_threshold() -> None:
    first, second = drawn(2)[0].abs(), drawn(1, 4, 6)[0].abs() * 3
    layer = zeros_by_score([first, second], Pattern(0.5), "layer")
    for score, gone in zip((first, second), layer, strict=True):
        for part, mask in zip(score, gone, strict=True):
            assert int(mask.sum()) == part.numel() // 2
            assert float(part[mask].max()) < float(part[~mask].min())
    everywhere = zeros_by_score([first, second], Pattern(0.5), "global")
    lost = torch.cat([s[m] for s, m in zip((first, second), everywhere, strict=True)])
    kept = torch.cat([s[~m] for s, m in zip((first, second), everywhere, strict=True)])
    assert len(lost) == (first.numel() + second.numel()) // 2
    assert float(lost.max()) < float(kept.min())


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_every_block_keeps_exactly_its_highest(kept: int, of: int) -> None:
    scores = drawn(2, 3, 16)[0].abs()
    (gone,) = zeros_by_score([scores], Pattern.parse(f"{kept}:{of}"), "row")
    for block, mask in zip(scores.reshape(-1, of), gone.reshape(-1, of), strict=True):
        assert set((~mask).nonzero().flatten().tolist()) == set(block.argsort()[-kept:].tolist())


def test_of_equal_scores_the_first_go() -> None:
    (gone,) = zeros_by_score([torch.ones(1, 1, 6)], Pattern(0.5), "row")
    assert gone.flatten().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("width", "count"), [(12, 0), (12, 1), (12, 5), (12, 11), (5, 1), (5, 4)])
def test_the_lowest_are_those_of_a_stable_order_however_few_are_looked_at_together(
    monkeypatch: pytest.MonkeyPatch, width: int, count: int
) -> None:
    rows = torch.randint(0, 6, (9, width), generator=torch.Generator().manual_seed(0)).float()
    rows[3, 2:] = torch.inf
    rows[4, :3] = torch.nan
    monkeypatch.setattr(sparsity, "_AT_ONCE", 30)
    order = rows.argsort(dim=1, stable=True)[:, :count]
    expected = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(sparsity.lowest(rows, count), expected)


def test_rows_that_lose_an_equal_share_lose_unlike_many() -> None:
    weight, inputs = drawn(1, 32, 64)
    scores = wanda_scores(weight, statistics_of(inputs))
    gone = zeros_by_share(scores, 0.5)
    assert float(gone.double().mean()) == pytest.approx(0.5, abs=2e-3)
    assert len(set(gone.sum(-1).flatten().tolist())) > 1
    shares = torch.where(gone, scores, 0).sum(-1) / scores.sum(-1)
    following = torch.where(gone, torch.inf, scores).amin(-1) / scores.sum(-1)
    assert float(shares.max()) <= float((shares + following).min())  # one alpha lies between


def test_a_row_whose_least_score_is_too_much_loses_nothing() -> None:
    scores = torch.ones(1, 3, 4)
    scores[0, 0] = torch.tensor([1.0, 0, 0, 0])
    gone = zeros_by_share(scores, 0.25)
    assert gone[0, 0].tolist() == [False, True, True, True]


def squared_error(weight: Tensor, new: Tensor, inputs: Tensor) -> float:
    return float(((weight - new).double() @ inputs.double().mT).square().sum())


def obs_by_hand(weight: Tensor, hessian: Tensor, gone: Tensor) -> Tensor:
    """The best weights with zeros at `gone`, row by row: least squares on the others."""
    new = torch.zeros_like(weight, dtype=torch.float64)
    for row, mask in enumerate(gone):
        keep = (~mask).nonzero().flatten()
        right = hessian[keep] @ weight[row].double()
        new[row, keep] = torch.linalg.solve(hessian[keep][:, keep], right)
    return new


def test_sparsegpt_of_one_column_is_optimal_brain_surgeon() -> None:
    """The last column cannot be made up for, the first by all others: its update is exact."""
    weight, inputs = drawn()
    gone = torch.zeros(5, 8, dtype=torch.bool)
    gone[:, 0] = True
    scaled = weight.clone()
    scaled[0, :, 0] *= 1e-4  # so that the first column is the one to go in each row
    seen = statistics_of(inputs)
    damped = seen.gram[0] + torch.eye(8) * 0.01 * seen.gram[0].diagonal().mean()  # type: ignore[index]
    new, zero = SparseGpt(block=8)(scaled, seen, Pattern(1 / 8))
    assert torch.equal(zero[0], gone)
    expected = obs_by_hand(scaled[0], damped, gone)
    assert torch.allclose(new[0].double(), expected, rtol=1e-3, atol=1e-5)


def column_by_column(weight: Tensor, gram: Tensor, gone: Tensor, damp: float = 0.01) -> Tensor:
    """Each zero is made up for by the columns to its right, by their own inverse Hessian."""
    hessian = gram + torch.eye(len(gram)) * damp * gram.diagonal().mean()
    new = weight.double()
    for column in range(len(gram)):
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = torch.where(gone[:, column], new[:, column], 0) / inverse[0, 0]
        new[:, column:] -= torch.outer(error, inverse[0])
    return new.masked_fill(gone, 0)


@pytest.mark.parametrize("text", ["0.5", "2:4", "4:8"])
def test_sparsegpt_makes_up_for_each_zero_in_the_columns_to_its_right(text: str) -> None:
    weight, inputs = drawn(2, 16, 32, 200)
    inputs = inputs / torch.logspace(-1, 1, 32)
    pattern, seen = Pattern.parse(text), statistics_of(inputs)
    new, zero = SparseGpt(block=16)(weight, seen, pattern)
    assert float(zero.double().mean()) == pytest.approx(0.5)
    if pattern.of:
        assert set(zero.view(-1, pattern.of).sum(1).tolist()) == {pattern.of - pattern.kept}
    for part in range(2):
        assert seen.gram is not None
        expected = column_by_column(weight[part], seen.gram[part], zero[part])
        assert torch.allclose(new[part].double(), expected, rtol=1e-4, atol=1e-5)
        bare = weight[part].masked_fill(zero[part], 0)
        updated = squared_error(weight[part], new[part], inputs[part])
        assert updated < 0.7 * squared_error(weight[part], bare, inputs[part])
        best = obs_by_hand(weight[part], seen.gram[part], zero[part])
        assert updated >= 0.999 * squared_error(weight[part], best.float(), inputs[part])


def test_sparsegpt_sets_columns_without_input_to_zero_and_lives() -> None:
    weight, inputs = drawn()
    inputs[..., 3] = 0
    new, _ = SparseGpt()(weight, statistics_of(inputs), Pattern(0.25))
    assert bool((new[..., 3] == 0).all())
    assert bool(torch.isfinite(new).all())


@pytest.mark.parametrize("text", ["16:32", "3:32", "10:24"])
def test_a_pattern_wider_than_the_block_of_sparsegpt_is_chosen_whole(text: str) -> None:
    pattern = Pattern.parse(text)
    weight, inputs = drawn(1, 8, 2 * pattern.of, 200)
    new, zero = SparseGpt(block=16)(weight, statistics_of(inputs), pattern)
    kept = (~zero).reshape(-1, pattern.of).sum(1)
    assert set(kept.tolist()) == {pattern.kept}
    assert torch.equal(new == 0, zero)


def ria_by_hand(weight: Tensor, inputs: Tensor) -> Tensor:
    """Zhang et al., ICLR 2024, element by element."""
    size, found = weight.abs().tolist(), torch.empty_like(weight)
    for row in range(len(size)):
        for column in range(len(size[0])):
            relative = size[row][column] / sum(size[row])
            relative += size[row][column] / sum(each[column] for each in size)
            found[row, column] = relative * float(inputs[:, column].norm()) ** 0.5
    return found


def test_ria_is_relative_to_row_and_column() -> None:
    weight, inputs = drawn(2)
    found = ria_scores(weight, statistics_of(inputs))
    for part in range(2):
        expected = ria_by_hand(weight[part], inputs[part])
        assert torch.allclose(found[part], expected, rtol=1e-5)


@pytest.mark.parametrize("text", ["0.5", "2:4", "0.7"])
def test_alps_finds_zeros_that_cost_less_and_refits_what_stays(text: str) -> None:
    weight, inputs = drawn(2, 16, 32, 200)
    mixed = inputs @ (torch.eye(32) + 0.3 * torch.randn(32, 32))  # inputs stand for each other
    pattern, seen = Pattern.parse(text), statistics_of(mixed)
    new, zero = Alps(damp=1e-9)(weight, seen, pattern)
    assert torch.equal(new == 0, zero)
    assert [int(part.sum()) for part in zero] == [math.floor(pattern.ratio * 16 * 32)] * 2
    if pattern.of:
        assert set(zero.view(-1, pattern.of).sum(1).tolist()) == {pattern.of - pattern.kept}
    greedy, _ = SparseGpt(damp=1e-9)(weight, seen, pattern)
    for part in range(2):
        assert seen.gram is not None
        best = obs_by_hand(weight[part], seen.gram[part], zero[part])
        found = squared_error(weight[part], new[part], mixed[part])
        assert found <= 1.01 * squared_error(weight[part], best.float(), mixed[part])
        assert found < 0.8 * squared_error(weight[part], greedy[part], mixed[part])


def test_alps_lives_with_inputs_that_are_zero_and_parts_that_saw_nothing() -> None:
    weight, inputs = drawn(2)
    inputs[..., 3] = 0
    seen = statistics_of(inputs)
    seen.count[1] = 0
    new, zero = Alps()(weight, seen, Pattern(0.25))
    assert bool((new[0, :, 3] == 0).all())
    assert torch.equal(new[1], weight[1].masked_fill(zero[1], 0))  # nothing to make up from


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(SelectionError, match="up: it has values that are not finite"):
        check_values("up", torch.tensor([1.0, value]), moved=False)


def test_integers_can_become_zero_but_not_be_fitted() -> None:
    check_values("up", torch.tensor([1, 2], dtype=torch.int8), moved=False)
    with pytest.raises(SelectionError, match="up: its values are int8, which cannot hold"):
        check_values("up", torch.tensor([1, 2], dtype=torch.int8), moved=True)
