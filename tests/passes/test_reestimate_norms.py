"""Taking the statistics of batch norms anew, in a pipeline."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import inputs_of, program_of

from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError
from graphprune.passes.reestimate_norms import ReestimateNorms
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline

CUT = "prune{target=channels ratio=0.25 criterion=l2}"


@cache
def data_of(name: str) -> Calibration:
    return Calibration.from_batches([inputs_of(program_of(name), batch=4, seed=i) for i in (0, 1)])


@cache
def run(text: str, name: str = "resnet") -> Result:
    return Pipeline.parse(text).run(program_of(name), calibration=data_of(name))


def test_what_is_left_after_a_cut_has_its_own_statistics() -> None:
    cut, anew = run(CUT).program, run(f"{CUT},reestimate-norms,verify").program
    changed = {n for n, weight in anew.weights.items() if not torch.equal(weight, cut.weights[n])}
    assert changed == {name for name in cut.weights if "running" in name}
    assert set(run(f"{CUT},reestimate-norms,verify").report.passes[1].details["set"]) == changed


def test_they_do_not_change_when_taken_twice() -> None:
    once, twice = run("reestimate-norms").program, run("reestimate-norms,reestimate-norms").program
    for name, weight in once.weights.items():
        assert torch.allclose(weight, twice.weights[name], rtol=1e-5, atol=1e-6)


def test_it_comes_before_a_cut_as_well() -> None:
    result = run(f"reestimate-norms,{CUT},verify")
    first = run("reestimate-norms").program
    removed = result.plan.removed
    name = next(name for name in removed if name.endswith("running_var"))
    kept = [at for at in range(len(first.weights[name])) if at not in removed[name][0]]
    assert torch.equal(result.program.weights[name], first.weights[name][kept])


def test_a_program_without_batch_norms_is_left_as_it_is() -> None:
    result = run("reestimate-norms", "llama-gqa")
    assert result.program is program_of("llama-gqa")
    assert not result.plan
    assert result.report.passes[0].details == {"note": "no batch norm keeps statistics"}


def test_data_is_needed() -> None:
    assert ReestimateNorms().requires_calibration
    with pytest.raises(CalibrationError):
        Pipeline.parse("reestimate-norms").run(program_of("resnet"))


def test_data_of_one_value_for_a_channel_is_refused() -> None:
    from torch import nn

    import graphprune as gp

    program = gp.capture(
        nn.Sequential(nn.BatchNorm1d(3)).eval(), example_inputs=(torch.ones(2, 3),)
    )
    one = Calibration.from_batches([{program.inputs[0].name: torch.ones(1, 3)}])
    with pytest.raises(CalibrationError, match="the data has 1 value of each channel"):
        Pipeline.parse("reestimate-norms").run(program, calibration=one)
