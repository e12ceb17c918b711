from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, inputs_of, inputs_to, model_of, program_of
from torch import Tensor, nn

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError, PlanError, UsageError, VerificationError
from graphprune.ir.program import Program
from graphprune.passes import reconstruct
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.passes.reconstruct import Reconstruct
from graphprune.passes.sparsify import Sparsify
from graphprune.passes.verify import Verify
from graphprune.pipeline.pass_base import COUPLING, Pass
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline
from graphprune.plan.plan import Plan
from graphprune.transforms.apply import apply_plan
from graphprune.transforms.refit import refit

DOWN = "model.layers.0.mlp.down_proj"


def calibration_of(name: str) -> Calibration:
    return Calibration.from_batches([inputs_of(program_of(name), batch=8, length=16)])


def run(name: str, *passes: Any, **options: Any) -> Result:
    options = {"calibration": calibration_of(name), **options}
    return Pipeline(passes).run(program_of(name), **options)


def with_consumers_refitted(name: str) -> tuple[Program, Plan]:
    """Return what is left without a quarter of the FFN units, and what went."""
    program, plan = program_of(name), run(name, Prune("ffn", 0.25, "l2")).plan
    coupling, data = COUPLING.compute(program), calibration_of(name)
    found = refit(program, coupling, plan, data, damp=1e-9, onwards=False)
    return apply_plan(found.program, plan), plan


def kept_by(plan: Plan, weight: str, dim: int, size: int) -> Tensor:
    gone = set(plan.removed[weight][dim])
    return torch.tensor([index for index in range(size) if index not in gone])


def test_a_down_projection_is_the_least_squares_fit_of_what_it_gave() -> None:
    smaller, plan = with_consumers_refitted("llama-gqa")
    (batch,) = calibration_of("llama-gqa")
    inputs = inputs_to(model_of("llama-gqa"), DOWN, batch).double()
    weight = program_of("llama-gqa").weights[f"{DOWN}.weight"].double()
    kept = kept_by(plan, f"{DOWN}.weight", 1, 48)
    expected = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    found = smaller.weights[f"{DOWN}.weight"].double()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(smaller.weights[gate], program_of("llama-gqa").weights[gate][kept])


def test_a_bias_takes_up_the_mean_of_what_is_gone() -> None:
    """GPT-2's MLP has one: the fit is that of least squares with an intercept."""
    smaller, plan = with_consumers_refitted("gpt2")
    path = "transformer.h.0.mlp.c_proj"
    (batch,) = calibration_of("gpt2")
    inputs = inputs_to(model_of("gpt2"), path, batch).double()
    weights = program_of("gpt2").weights
    given = inputs @ weights[f"{path}.weight"].double() + weights[f"{path}.bias"].double()
    kept = kept_by(plan, f"{path}.weight", 0, len(weights[f"{path}.weight"]))
    ones = torch.ones(len(inputs), 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([inputs[:, kept], ones], 1), given).solution
    assert torch.allclose(
        smaller.weights[f"{path}.weight"].double(), best[:-1], rtol=1e-3, atol=1e-5
    )
    assert torch.allclose(smaller.weights[f"{path}.bias"].double(), best[-1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt-neox"])
def test_what_units_that_go_reach_is_fitted_towards_the_original(name: str) -> None:
    program, data = program_of(name), calibration_of(name)
    plan = run(name, Prune("ffn", 0.25, "l2")).plan
    coupling = COUPLING.compute(program)
    alone, onwards = (
        refit(program, coupling, plan, data, onwards=more, damp=0.1) for more in (False, True)
    )
    assert set(alone.names) < set(onwards.names)
    gone = plan.masks(program.weights)
    first = [each for each in onwards.names if ".0." in each and each not in gone]
    assert not first, "nothing before the first units that go is reached"
    for weight, mask in gone.items():
        assert not onwards.program.weights[weight][mask].any(), weight
    (batch,) = data.batches
    main = program.outputs[0].name
    expected = program(**batch)[main]
    errors = [(each.program(**batch)[main] - expected).norm() for each in (alone, onwards)]
    assert errors[1] < 0.97 * errors[0]


class Copies(nn.Module):
    """Every unit is there twice, once small, so that what is left can stand for what went."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        with torch.no_grad():
            self.up.weight[4:] = self.up.weight[:4] / 2
            self.up.bias[4:] = self.up.bias[:4] / 2
            self.down.weight[:, 4:] /= 10

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_units_that_are_there_twice_are_not_missed() -> None:
    torch.manual_seed(0)
    program = gp.capture(Copies(), example_inputs=(torch.randn(4, 6),))
    (group,) = gp.analyze(program).groups
    inputs = {program.inputs[0].name: torch.randn(200, 6)}
    prune = Prune(group.name, 0.5, "l2")
    result = Pipeline([prune, Reconstruct(damp=1e-8)]).run(
        program, calibration=Calibration.from_batches([inputs])
    )
    assert result.plan.removed["up.weight"][0] == [4, 5, 6, 7]
    expected, found = (next(iter(p(**inputs).values())) for p in (program, result.program))
    assert torch.allclose(found, expected, atol=1e-4)
    bare = next(iter(gp.apply(program, result.plan.without_edits())(**inputs).values()))
    assert not torch.allclose(bare, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "ffn") for name in ARCHITECTURES if name != "resnet"),
        *((name, "kv-heads") for name in ("llama-gqa", "gpt2", "gpt-neox", "bert", "t5")),
    ],
)
def test_the_outputs_come_closer_in_every_architecture(name: str, target: str) -> None:
    prune = Prune(target, 0.3 if target == "ffn" else 0.5, "l2")
    program = program_of(name)
    bare, fitted = run(name, prune), run(name, prune, Reconstruct(), Verify())
    (batch,) = calibration_of(name)
    main = program.outputs[0].name
    expected, worse, better = (p(**batch)[main] for p in (program, bare.program, fitted.program))
    assert (better - expected).norm() < 0.97 * (worse - expected).norm()
    assert {n: w.shape for n, w in fitted.program.weights.items()} == {
        n: w.shape for n, w in bare.program.weights.items()
    }


def test_channels_of_a_convolution_are_refitted() -> None:
    program = program_of("resnet")
    batch = inputs_of(program, batch=16)
    calibration = Calibration.from_batches([batch])
    prune = Prune("channels", 0.25, "l2")
    bare = run("resnet", prune, calibration=calibration).program
    result = run("resnet", prune, Reconstruct(), calibration=calibration)
    assert len(result.report.passes[-1].details["refitted"]) >= 4
    main = program.outputs[0].name
    expected, worse, better = (p(**batch)[main] for p in (program, bare, result.program))
    assert (better - expected).norm() < (worse - expected).norm()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((Prune("hidden", 0.25, "l2"), Reconstruct()), "residual, rescaled.*is no zeroing"),
    ],
)
def test_what_cannot_be_refitted_is_refused(passes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        run("llama-gqa", *passes)


@pytest.mark.parametrize(("init", "left"), [("mean", 0.8), ("aligned", 1.0)])
def test_what_is_behind_merged_heads_is_refitted_towards_the_original(
    init: Any, left: float
) -> None:
    merge = MergeKvHeads(1, init=init)
    program = program_of("llama-mha")
    data = Calibration.from_batches([inputs_of(program, batch=24, length=24)])
    bare = run("llama-mha", merge, calibration=data)
    result = run("llama-mha", merge, Reconstruct(), Verify(), calibration=data)
    # Aligned queries are in another basis, and those of the first layer get what they got.
    reached = ("o_proj", "mlp", *(["1.self_attn.q_proj"] if init == "mean" else []))
    fitted = {n for n in result.program.weights if any(name in n for name in reached)}
    assert set(result.report.passes[1].details["refitted"]) == fitted
    for name, weight in bare.program.weights.items():
        if name not in fitted:
            assert torch.equal(result.program.weights[name], weight), name
    other = inputs_of(program, batch=8, length=24, seed=1)
    expected, worse, better = (
        p(**other)["logits"] for p in (program, bare.program, result.program)
    )
    assert (better - expected).norm() <= left * (worse - expected).norm()


def test_cuts_and_merges_are_refitted_by_turns() -> None:
    passes = Prune("ffn", 0.25, "l2"), MergeKvHeads(1, init="mean"), Reconstruct(), Verify()
    details = run("llama-mha", *passes).report.passes[2].details
    for name in ("down_proj", "o_proj"):
        assert any(name in each for each in details["refitted"])


def test_where_nothing_was_pruned_it_says_so() -> None:
    result = run("llama-gqa", Reconstruct())
    details = result.report.passes[-1].details
    assert details == {"note": "nothing was pruned before: nothing to refit"}
    assert result.program is program_of("llama-gqa")


def test_it_is_verified_against_what_was_refitted_before_the_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = Prune("ffn", 0.25, "l2"), Reconstruct(), Verify()
    details = run("llama-gqa", *passes).report.passes[-1].details
    assert details["max_relative_error"] < 1e-4

    def slightly_off(program: Program, plan: Plan) -> Program:
        smaller = apply_plan(program, plan)
        name = next(name for name in smaller.weights if "down_proj" in name)
        return smaller.with_weights({name: smaller.weights[name] * 1.01})

    monkeypatch.setattr(reconstruct, "apply_plan", slightly_off)
    with pytest.raises(VerificationError, match=r"down_proj.* away from the masked original"):
        run("llama-gqa", *passes)


def test_it_needs_data_and_a_damping() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run("llama-gqa", Prune("ffn", 0.25, "l2"), Reconstruct(), calibration=None)
    with pytest.raises(UsageError, match="damp 0 is not positive"):
        Reconstruct(damp=0.0)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_with_less_memory_the_fit_is_the_same(name: str) -> None:
    passes = Prune(("ffn", "head-dim"), 0.25, "l2"), Reconstruct()
    free = run(name, *passes)
    details = free.report.passes[1].details
    assert 0 < details["statistics bytes"] < details["calibration bytes"]
    memory = 0.95 * details["statistics bytes"] / 2**20  # of the two matrices of a layer one fits
    bound = run(name, passes[0], Reconstruct(memory=memory), Verify())
    assert bound.report.passes[1].details["statistics bytes"] <= memory * 2**20
    assert bound.report.passes[1].details["refitted"] == details["refitted"]
    for key, weight in free.program.weights.items():
        assert torch.equal(weight, bound.program.weights[key]), key
    with pytest.raises(CalibrationError, match=r"the statistics take .* MiB, and .* are allowed"):
        run(name, passes[0], Reconstruct(memory=memory / 100))
    with pytest.raises(UsageError, match="memory 0 is not positive"):
        Reconstruct(memory=0.0)


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("qwen3", MergeKvHeads(1, init="mean")),  # queries and keys have norms
        ("llama-gqa", Sparsify(pattern="2:4", criterion="magnitude")),
        ("resnet", Prune("channels", 0.25, "l2")),
    ],
)
def test_branches_are_trained_after_any_change(name: str, before: Pass) -> None:
    program = program_of(name)
    batch = inputs_of(program, batch=24, length=24)
    calibration = Calibration.from_batches([batch])
    trained = run(name, before, Reconstruct("gradient", 24, 0.03), calibration=calibration)
    bare = run(name, before, calibration=calibration).program
    details = trained.report.passes[-1].details
    assert all(after <= first for first, after in details["held-out error"].values())
    assert any(after < 0.9 * first for first, after in details["held-out error"].values())
    other = inputs_of(program, batch=8, length=24, seed=1)
    main = program.outputs[0].name
    expected, worse, better = (p(**other)[main] for p in (program, bare, trained.program))
    assert (better - expected).norm() < (worse - expected).norm()
    again = gp.apply(program, trained.plan)
    for key, weight in trained.program.weights.items():
        assert torch.equal(again.weights[key], weight), key
        if isinstance(before, Sparsify):
            assert torch.equal(weight == 0, bare.weights[key] == 0), key


def test_training_starts_from_least_squares() -> None:
    prune = Prune("ffn", 0.25, "l2")
    fitted = run("llama-gqa", prune, Reconstruct())
    trained = run("llama-gqa", prune, Reconstruct("gradient", 1, 1e3))
    details = trained.report.passes[-1].details
    assert details["refitted"] == fitted.report.passes[-1].details["refitted"]
    branches = ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(details["held-out error"])[-2:] == branches
    for key, weight in fitted.program.weights.items():
        assert torch.equal(trained.program.weights[key], weight), key


def test_training_needs_something_to_train_and_steps_of_some_length() -> None:
    result = run("llama-gqa", Reconstruct("gradient"))
    assert "nothing to refit" in result.report.passes[-1].details["note"]
    with pytest.raises(PlanError, match="is no zeroing"):
        run("llama-gqa", Prune("hidden", 0.25, "l2"), Reconstruct("gradient"))
    for options, message in (
        ({"method": "gradient", "steps": 0}, "steps 0 is not positive"),
        ({"method": "gradient", "lr": -1.0}, "lr -1 is not positive"),
        ({"steps": 7}, "steps is of method=gradient"),
        ({"lr": 0.1}, "lr is of method=gradient"),
    ):
        with pytest.raises(UsageError, match=message):
            Reconstruct(**options)
