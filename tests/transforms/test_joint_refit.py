"""Experts refitted together, against one least squares problem, however code takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from architectures import inputs_of, program_of
from mixtures import CHOSEN, INNER, WIDTH, Dense, Looped, Mixture, Picked
from torch import Tensor

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.transforms.apply import apply_plan
from graphprune.transforms.joint import refit
from graphprune.transforms.joint.addends import Addends, behind_merges
from graphprune.transforms.joint.seen import WORSE, Seen

TOKENS, DAMP = 120, 0.1


def calibration_of(program: gp.Program, x: Tensor) -> Calibration:
    return Calibration.from_batches([{program.inputs[0].name: part} for part in x.split(40)])


def given_by(program: gp.Program, x: Tensor) -> Tensor:
    (output,) = program.outputs
    parts = [program(**batch)[output.name] for batch in calibration_of(program, x)]
    return torch.cat(parts)


def expected(model: Mixture, kept: list[int], x: Tensor) -> Tensor:
    """What the mixture gives after its experts were fitted in one problem of all their inputs."""
    whole = model(x)
    shares, chosen = model.router(x)[:, kept].softmax(-1).topk(CHOSEN, -1)
    gates = torch.zeros(len(x), len(kept)).scatter(1, chosen, shares)
    inputs = torch.stack([torch.relu(x @ model.up[each].T) for each in kept], 1) * gates[..., None]
    biases = gates @ model.bias[kept]
    now = x + torch.einsum("neh,ewh->nw", inputs, model.down[kept]) + biases
    squares = whole.square().mean(-1, keepdim=True)
    scale = squares.clamp(min=squares.mean() / 100).rsqrt()
    rows = (inputs.flatten(1) * scale).double()
    products = rows.T @ rows
    each = products.diagonal().view(len(kept), -1).mean(1, keepdim=True)
    ridge = torch.diag((DAMP * each).expand(-1, INNER).flatten())
    change = torch.linalg.solve(products + ridge, rows.T @ ((whole - now) * scale).double())
    return now + (inputs.flatten(1).double() @ change).float()


@pytest.mark.parametrize("form", [Picked, Dense, Looped])
def test_experts_are_fitted_together_whatever_runs_them(form: type[Mixture]) -> None:
    model = form().eval()
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    program = gp.capture(model, (x[:40],))
    result = gp.Pipeline.parse(
        f"prune{{target=experts ratio=0.4 criterion=reap}},reconstruct{{damp={DAMP}}},verify"
    ).run(program, calibration=calibration_of(program, x), quiet=True)
    (cut,) = result.plan.steps[0].cuts
    kept = [each for each in range(len(model.up)) if each not in cut.units[()]]
    found = given_by(result.program, x)
    with torch.no_grad():
        wanted, whole = expected(model, kept, x), model(x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    before = given_by(apply_plan(program, result.plan.without_edits()), x)
    assert (found - whole).square().mean() < 0.5 * (before - whole).square().mean()


def test_experts_and_their_units_are_refitted_together() -> None:
    program = program_of("mixtral")
    data = Calibration.from_batches([inputs_of(program)])
    text = "prune{target=experts,ffn ratio=0.25 criterion=l2},reconstruct,verify"
    made = gp.Pipeline.parse(text).run(program, calibration=data)
    details = made.report.passes[1].details
    fits = [pair for name, pair in details["held-out error"].items() if "expert" in name]
    assert sum("down_proj" in name for name in details["refitted"]) == len(fits) == 2
    assert all(after < before for before, after in fits)


def refitted_behind_heads() -> tuple[gp.Program, dict[str, tuple[float, float]]]:
    program = program_of("llama-mha")
    data = Calibration.from_batches(
        [inputs_of(program, batch=2, length=24, seed=s) for s in (0, 1)]
    )
    plan = gp.Pipeline.parse("merge-kv-heads{groups=1 init=mean}").run(program, quiet=True).plan
    merged = apply_plan(program, plan)
    found = refit.refit_together(merged, program, behind_merges(merged, plan, program), data)
    assert {name.split(".")[-2] for name in found.names} == {
        "q_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }  # queries of the second layer
    return found.program, found.errors


def refitted_experts() -> tuple[gp.Program, dict[str, tuple[float, float]]]:
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    program = gp.capture(Picked().eval(), (x[:40],))
    recipe = gp.Pipeline.parse("prune{target=experts ratio=0.4 criterion=reap},reconstruct")
    made = recipe.run(program, calibration=calibration_of(program, x), quiet=True)
    return made.program, made.report.passes[1].details["held-out error"]


@pytest.mark.parametrize(
    ("refitted", "most"),
    [(refitted_behind_heads, 0), (refitted_experts, 0), (refitted_experts, 5000)],
    ids=["heads", "experts", "experts after a batch"],
)
def test_sums_over_tokens_give_what_all_rows_give(
    refitted: Callable[[], tuple[gp.Program, dict[str, tuple[float, float]]]],
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing, seen = Seen.nothing, list[Seen]()

    def holding(most: float) -> None:
        def start(addends: Addends, device: torch.device) -> Seen:
            seen.append(replace(nothing(addends, device), most=most))
            return seen[-1]

        monkeypatch.setattr(Seen, "nothing", start)

    holding(math.inf)
    rows, errors = refitted()
    assert all(each.rows.lacks for each in seen)
    seen.clear()
    holding(most)
    sums, theirs = refitted()
    assert seen and all(each.sums is not None and not each.rows.lacks for each in seen)
    assert any(after < before for before, after in errors.values())
    for name, (before, after) in errors.items():
        assert after <= WORSE * before
        assert theirs[name] == pytest.approx((before, after), rel=1e-6)
    for name, weight in rows.weights.items():
        torch.testing.assert_close(sums.weights[name], weight, rtol=1e-5, atol=1e-6)
