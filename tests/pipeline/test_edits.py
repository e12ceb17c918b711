"""Plans bring along what passes did to values: applied to a fresh copy they give the same model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from architectures import inputs_of, program_of

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.errors import PlanError, VerificationError
from graphprune.ir.program import Program
from graphprune.pipeline.pass_base import Context, Outcome, Pass
from graphprune.pipeline.pass_manager import Result
from graphprune.plan.plan import Plan

PRUNE = "prune{target=ffn ratio=0.25 criterion=l2}"

PIPELINES = {
    "sparsify": "sparsify{pattern=2:4 criterion=magnitude}",
    "sparsify-and-prune": f"sparsify{{pattern=0.5 criterion=magnitude}},{PRUNE}",
    "reconstruct": f"{PRUNE},reconstruct",
    "aligned": "merge-kv-heads{groups=2 init=aligned}",
    "first": "merge-kv-heads{groups=2 init=first}",
    "recover": f"{PRUNE},recover{{method=full steps=2 batch=2 warmup=0}}",
}
PRUNED = f"{PRUNE},merge-kv-heads{{groups=2 init=mean}}"


def run(text: str) -> tuple[Program, Result]:
    program = program_of("llama-mha")
    batches = [inputs_of(program, batch=4, length=9, seed=seed) for seed in range(2)]
    calibration = Calibration.from_batches(batches)
    return program, gp.Pipeline.parse(text).run(program, calibration=calibration)


def same(one: Program, other: Program) -> bool:
    assert one.weights.keys() == other.weights.keys()
    return all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_plan_gives_a_fresh_copy_the_same_values(name: str, tmp_path: Path) -> None:
    program, result = run(PIPELINES[name])
    result.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert same(gp.apply(program, plan), result.program)
    assert not same(gp.apply(program, plan.without_edits()), result.program)
    report = gp.verify(program, plan, result.program)
    assert report.max_weight_error <= 1e-6
    assert list(report.edited) == [edit.by for edit in plan.edits.made]  # type: ignore[union-attr]
    assert all(by in str(report) for by in report.edited)


def test_what_no_pass_edited_takes_no_file(tmp_path: Path) -> None:
    _, result = run(PRUNED)
    assert result.plan.edits is None
    result.plan.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_only_edited_weights_are_brought_along() -> None:
    _, result = run(PIPELINES["reconstruct"])
    assert result.plan.edits is not None
    assert all(name.endswith("_proj.weight") for name in result.plan.edits.weights)


def test_an_edited_weight_that_differs_is_refused() -> None:
    program, result = run(PIPELINES["reconstruct"])
    name = result.plan.edits.weights[0]  # type: ignore[union-attr]
    other = result.program.with_weights({name: result.program.weights[name] * 1.01})
    with pytest.raises(VerificationError, match=f"weight {name} is"):
        gp.verify(program, result.plan, other)


def test_an_untouched_weight_that_differs_is_refused() -> None:
    program, result = run(PIPELINES["reconstruct"])
    name = "model.norm.weight"
    other = result.program.with_weights({name: result.program.weights[name] * 1.01})
    with pytest.raises(VerificationError, match=f"weight {name} is"):
        gp.verify(program, result.plan, other)


def test_the_zeros_that_a_pattern_promises_are_looked_at() -> None:
    program, result = run(PIPELINES["sparsify"])
    assert result.plan.edits is not None
    (edit,) = result.plan.edits.made
    assert set(edit.patterns.values()) == {"2:4"}
    report = gp.verify(program, result.plan, result.program)
    assert report.patterns == len(edit.weights)
    name = edit.weights[0]
    dense = result.program.with_weights({name: program.weights[name]})
    values = {**result.plan.edits.read(), name: program.weights[name]}
    told = Plan((), type(result.plan.edits)((edit,), values=values))
    with pytest.raises(VerificationError, match=f"{name} has not the zeros of its pattern 2:4"):
        gp.verify(program, told, dense)


def test_a_pattern_that_later_passes_broke_is_not_promised() -> None:
    text = f"sparsify{{pattern=2:4 criterion=magnitude}},{PRUNE}"
    program, result = run(text)
    assert result.plan.edits is not None
    (edit,) = result.plan.edits.made
    down = {name for name in edit.weights if "down_proj" in name}
    assert down
    assert not down & edit.patterns.keys()
    gp.verify(program, result.plan, result.program)


@dataclass(frozen=True)
class Renamed(Pass):
    """A pass that gives the graph another node."""

    name: ClassVar[str] = "rename-it"

    def run(self, program: Program, context: Context) -> Outcome:
        import copy
        import dataclasses

        return Outcome(
            dataclasses.replace(program, graph_module=copy.deepcopy(program.graph_module)),
            edited=True,
        )


def test_a_plan_of_a_changed_graph_is_refused() -> None:
    program = program_of("llama-mha")
    result = gp.Pipeline([Renamed()]).run(program)
    with pytest.raises(PlanError, match="rename-it changed the graph itself"):
        gp.apply(program, result.plan)
