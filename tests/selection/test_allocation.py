"""The loss of groups, measured by masking ever more of each."""

from __future__ import annotations

import pytest
import torch
from architectures import calibration_of, coupling_of, program_of

from graphprune.calibration.losses import next_token_loss
from graphprune.criteria import ScoringContext, criterion
from graphprune.errors import CalibrationError, SelectionError
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.allocation import _slopes, loss_margins
from graphprune.selection.selector import lowest_units
from graphprune.selection.targets import target_groups
from graphprune.transforms.apply import apply_plan

NAME = "llama-gqa"


def context(*targets: str, data: bool = True) -> ScoringContext:
    coupling = coupling_of(NAME)
    groups = [group for target in targets for group in target_groups(coupling, target)]
    calibration = calibration_of(NAME) if data else None
    return ScoringContext(program_of(NAME), coupling, groups, calibration=calibration)


def test_margins_add_up_to_the_loss_of_the_pruned_program() -> None:
    given = context("ffn", "kv-heads")
    scores = criterion("l2").scores(given)
    margins = loss_margins(given, scores, levels=1)

    def loss(plan: Plan) -> float:
        program = apply_plan(given.program, plan) if plan.steps else given.program
        batches = list(given.data())
        found = [next_token_loss(program(**batch)["logits"], batch) for batch in batches]
        rows = [len(batch["input_ids"]) for batch in batches]
        return sum(f.item() * n for f, n in zip(found, rows, strict=True)) / sum(rows)

    dense = loss(Plan(()))
    for group in given.groups:
        most = group.size - group.min_units
        cut = group.cut(lowest_units(scores[group.name], most))
        pruned = loss(Plan((Step(given.program.fingerprint(), (cut,)),)))
        assert margins[group.name].shape == (group.size,)
        assert margins[group.name][:most].sum() == pytest.approx(max(0, pruned - dense), abs=1e-5)


@pytest.mark.parametrize(
    ("points", "slopes"),
    [
        ([(0, 0.0), (2, 2.0), (4, 6.0)], [1, 1, 2, 2, 2]),
        ([(0, 0.0), (2, 4.0), (4, 6.0)], [1.5, 1.5, 1.5, 1.5, 1.5]),
        ([(0, 0.0), (2, -1.0), (4, 6.0)], [0, 0, 3, 3, 3]),
        ([(0, 0.0), (1, 1.0), (2, 1.0), (4, 7.0)], [0.5, 0.5, 3, 3, 3]),
        ([(0, 0.0)], [0, 0, 0, 0, 0]),
    ],
)
def test_slopes_are_those_of_the_convex_hull(
    points: list[tuple[int, float]], slopes: list[float]
) -> None:
    assert _slopes(points, 5).tolist() == slopes


def test_masking_changes_no_weight_of_the_program() -> None:
    given = context("kv-heads")
    before = {name: weight.clone() for name, weight in given.program.weights.items()}
    loss_margins(given, criterion("l2").scores(given), levels=2)
    assert all(torch.equal(before[name], given.program.weights[name]) for name in before)


def test_a_group_that_cannot_be_masked_is_refused_by_name() -> None:
    given = context("hidden")
    with pytest.raises(SelectionError, match=r"residual.*cannot be measured by masking"):
        loss_margins(given, criterion("l2").scores(given))


def test_data_is_needed() -> None:
    given = context("ffn", data=False)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        loss_margins(given, criterion("l2").scores(given))
