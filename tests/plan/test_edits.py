"""Edits: what a plan brings along beside its steps, and what is refused without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graphprune.errors import PlanError
from graphprune.plan.edits import Edit, Edits
from graphprune.plan.plan import Plan

VALUES = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(2).bfloat16()}
MADE = (
    Edit("sparsify{pattern=2:4}", ("a.weight",), {"a.weight": "2:4"}),
    Edit("recover", ("b.weight",)),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Plan((), Edits(MADE, values=VALUES)).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_values_lie_beside_the_plan_and_come_back(saved: Path) -> None:
    plan = Plan.load(saved)
    assert plan.edits is not None
    assert plan.edits.made == MADE
    found = plan.edits.read()
    assert found.keys() == VALUES.keys()
    assert all(torch.equal(found[name], value) for name, value in VALUES.items())
    assert all(found[name].dtype is value.dtype for name, value in VALUES.items())
    assert len(saved.read_text(encoding="utf-8")) < 1000


def test_a_plan_that_was_read_is_written_with_its_values(saved: Path, tmp_path: Path) -> None:
    Plan.load(saved).save(tmp_path / "other" / "again.json")
    again = Plan.load(tmp_path / "other" / "again.json")
    assert again == Plan.load(saved)
    assert again.edits is not None
    assert torch.equal(again.edits.read()["a.weight"], VALUES["a.weight"])


def test_a_missing_file_is_refused_by_name(saved: Path) -> None:
    saved.with_suffix(".edits").unlink()
    plan = Plan.load(saved)
    assert plan.edits is not None
    with pytest.raises(PlanError, match=r"plan\.edits is missing; it holds what sparsify\{pattern"):
        plan.edits.read()


def test_a_changed_file_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    other = {**VALUES, "b.weight": VALUES["b.weight"] * 2}
    Plan((), Edits(MADE, values=other)).save(tmp_path / "other.json")
    (tmp_path / "other.edits").replace(saved.with_suffix(".edits"))
    plan = Plan.load(saved)
    assert plan.edits is not None
    with pytest.raises(PlanError, match=r"plan\.edits has changed since the plan was written"):
        plan.edits.read()
    saved.with_suffix(".edits").write_bytes(b"nothing")
    with pytest.raises(PlanError, match=r"plan\.edits is cut short or no safetensors"):
        plan.edits.read()


def test_text_alone_brings_no_values(saved: Path) -> None:
    plan = Plan.from_json(saved.read_text(encoding="utf-8"))
    assert plan.edits is not None
    with pytest.raises(PlanError, match="without the file that holds what sparsify"):
        plan.edits.read()


def test_a_graph_that_was_changed_comes_along_with_no_plan() -> None:
    edits = Edits((Edit("fold-it", (), graph=True),), values={})
    with pytest.raises(PlanError, match="fold-it changed the graph itself"):
        edits.read()


def test_a_plan_with_edits_is_of_a_format_that_earlier_releases_refuse(saved: Path) -> None:
    data = json.loads(saved.read_text(encoding="utf-8"))
    assert data["format"] == 2
    assert json.loads(Plan().to_json())["format"] == 1
    for wrong in ({"edits": 1}, {"values": None}, {"edits": [{"pass": 3}]}):
        with pytest.raises(PlanError, match="not a plan"):
            Plan.from_json(json.dumps({**data, **wrong}))


def test_no_step_follows_edits() -> None:
    edited = Plan((), Edits(MADE, values=VALUES))
    assert edited
    assert "other values in 1 weights, by recover" in str(edited)
    assert edited + Plan() == edited
    with pytest.raises(PlanError, match="no step can follow"):
        edited + edited
