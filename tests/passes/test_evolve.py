"""`evolve`: budgets met, better than equal parts, going on, and what it refuses before any work."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import byte_llama

import graphprune as gp
from graphprune.backends.onnx.kernel_times import KernelTimes
from graphprune.calibration.data import Calibration
from graphprune.errors import (
    BackendError,
    CalibrationError,
    OutputError,
    SelectionError,
    UsageError,
)
from graphprune.evolution import clock
from graphprune.evolution.fitness import Departures, divided
from graphprune.evolution.ladder import Subject
from graphprune.ir.program import Program
from graphprune.passes.evolve import Evolve
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline
from graphprune.selection.cost import Costs, Kernel


@cache
def program() -> Program:
    return gp.capture(byte_llama())


def data(seed: int = 0) -> Calibration:
    ids = torch.randint(0, 250, (8, 16), generator=torch.Generator().manual_seed(seed))
    return Calibration.from_batches([{"input_ids": ids}])


def run(folder: Path | None = None, seed: int = 0, **options: Any) -> Result:
    given = {"params": 0.2, "criterion": "wanda", "generations": 3, "children": 4, "steps": 2}
    pass_ = Evolve(("ffn", "kv-heads"), **{**given, **options}, folder=folder and str(folder))
    return Pipeline([pass_]).run(program(), calibration=data(), seed=seed, quiet=True)


def details(result: Result) -> dict[str, Any]:
    return dict(result.report.passes[0].details)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("evolve") / "work"
    return folder, run(folder)


def test_what_is_found_meets_the_budget_and_is_nearer_than_equal_parts(
    found: tuple[Path, Result],
) -> None:
    result = found[1]
    assert result.program.parameter_count() <= 0.8 * program().parameter_count()
    before, after = details(result)["divergence, of equal parts and as found"]
    assert 0 < after < before
    # That is KL(original || smaller), and what is measured of masked weights is what comes out.
    ids = data().batches[0]["input_ids"]
    whole = byte_llama()(ids).logits.log_softmax(-1)
    smaller = result.program(input_ids=ids)["logits"].log_softmax(-1)
    own = (whole.exp() * (whole - smaller)).sum(-1).mean()
    assert own.item() < before


def test_it_goes_on_where_it_stopped_and_gives_what_it_would_have_given(
    found: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = found
    journal = folder / "measured.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-5]) + lines[-5][:7])
    measured: list[int] = []
    of = Departures.of

    def counting(self: Departures, *args: Any) -> float:
        measured.append(1)
        return of(self, *args)

    monkeypatch.setattr(Departures, "of", counting)
    again = run(folder)
    assert len(measured) == 5
    assert again.plan.to_json() == first.plan.to_json() and details(again) == details(first)
    weights = first.program.weights
    assert all(torch.equal(weights[name], again.program.weights[name]) for name in weights)
    assert {path.name for path in folder.iterdir()} >= {"progress.json", "progress.svg"}
    progress = json.loads((folder / "progress.json").read_text())
    assert [(each["step"], each["generation"]) for each in progress][:2] == [(0, 0), (0, 1)]
    assert progress[-1]["fitness"] == details(first)["divergence, of equal parts and as found"][1]


def test_a_limit_of_time_is_kept_and_one_without_a_generation_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="1e-09 seconds are too few for one generation"):
        run(seconds=1e-9)
    now = iter(range(10**6))
    monkeypatch.setattr(clock, "monotonic", lambda: next(now))
    result = run(seconds=30, steps=50, generations=50)
    assert details(result)["note"] == "time was over before all generations were"


def test_what_is_found_again_says_nothing_of_how_long_work_takes(tmp_path: Path) -> None:
    with clock.Clock(None, tmp_path / "seconds.json").timing("refit"):
        pass
    (tmp_path / "seconds.json").write_text('{"refit": 50.0}')
    again = clock.Clock(60, tmp_path / "seconds.json")
    with again.timing("refit"):
        pass
    assert again.has_time_for("refit") and not again.has_time_for("refit", "refit")
    (tmp_path / "seconds.json").write_text("[]")
    with pytest.raises(OutputError, match="does not say what took how long"):
        clock.Clock(60, tmp_path / "seconds.json")


def test_a_latency_is_met_by_times_that_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Kernel] = []

    def seconds(_: KernelTimes, kernel: Kernel) -> float:
        asked.append(kernel)
        return 1e-9 * math.prod(kernel.sizes)

    monkeypatch.setattr(KernelTimes, "_measured", seconds)
    options = {"params": None, "latency": 0.1, "generations": 1, "steps": 1}
    result = run(times=str(tmp_path / "times.json"), **options)
    times = KernelTimes(path=tmp_path / "times.json")
    before, after = (
        times.total(Costs(gp.analyze(each)).kernels({})) for each in (program(), result.program)
    )
    assert after <= 0.9 * before
    assert len(asked) == len(set(asked)) + 1  # the first one of each table is a probe


def test_a_provider_that_is_not_here_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="was built without NoSuchProvider"):
        run(tmp_path / "work", latency=0.1, provider="NoSuchProvider")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"params": None}, SelectionError, "no budget; give one of params, macs, kv_bytes"),
        ({"params": 25}, SelectionError, r"params 25 is not in \(0, 1\); 25 % is 0\.25"),
        ({"steps": 0}, UsageError, "steps 0 is not positive"),
        ({"tokens": -1}, UsageError, "tokens -1 is negative"),
        ({"provider": "cuda"}, UsageError, "provider is of a latency, and none is asked for"),
        ({"params": 0.99}, SelectionError, r"params 0\.99 is not met: all that these groups may"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()


def test_the_residual_stream_has_no_levels() -> None:
    with pytest.raises(SelectionError, match="its removal is no zeroing of weights"):
        Pipeline([Evolve(("hidden",), params=0.1)]).run(program(), calibration=data(), quiet=True)


def test_a_folder_of_other_data_is_refused(found: tuple[Path, Result]) -> None:
    pass_ = Evolve(("ffn",), params=0.1, folder=str(found[0]))
    with pytest.raises(CalibrationError, match="holds an evolution on other calibration data"):
        Pipeline([pass_]).run(program(), calibration=data(1), quiet=True)


def test_states_are_measured_on_what_no_level_was_fitted_to() -> None:
    whole = Calibration.from_batches([{"input_ids": torch.arange(160).view(10, 16)}])
    fitted, measured = (
        torch.cat([batch["input_ids"] for batch in each]) for each in divided(whole, 0)
    )
    assert fitted.flatten().tolist() == list(range(128)) and len(measured) == 2
    assert measured.flatten().tolist() == list(range(128, 160))
    assert divided(whole, 16)[1].samples == 1 and divided(whole, 10**6)[1].samples == 2
    alone = Calibration.from_batches([{"input_ids": torch.arange(16)[None]}])
    assert divided(alone, 0) == (alone, alone)


def test_what_is_found_is_refitted_to_all_data(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    refit = Subject.refit

    def watched(self: Subject, state: Any, **options: Any) -> Any:
        seen.append(("look" in options, self.calibration.samples))
        return refit(self, state, **options)

    monkeypatch.setattr(Subject, "refit", watched)
    run(steps=1, generations=1)
    assert seen == [(True, 6), (False, 8)]
