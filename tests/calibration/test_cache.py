"""What was measured is read back for what it was measured on, and for nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import coupling_of, inputs_of, program_of
from safetensors.torch import save_file

from graphprune.calibration.cache import read_cache, write_cache
from graphprune.calibration.data import Calibration
from graphprune.criteria import CRITERIA, ScoringContext
from graphprune.criteria.score_cache import load_or_score
from graphprune.errors import CalibrationError, OutputError
from graphprune.ir.program import Program


def calibration_of(name: str, seed: int = 0) -> Calibration:
    return Calibration.from_batches([inputs_of(program_of(name), seed=seed)])


def other_weights(program: Program) -> Program:
    name = next(name for name, kind in program.kinds.items() if kind == "parameter")
    changed = program.weights[name].clone()
    changed.view(-1)[0] += 1
    return program.with_weights({name: changed})


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path, program = tmp_path / "kept.safetensors", program_of("llama-gqa")
    write_cache(
        path, "things", {"x": torch.arange(3)}, program, calibration_of("llama-gqa"), seed=1
    )
    return path


def test_it_is_read_back_for_the_same_program_data_and_options(kept: Path) -> None:
    program = program_of("llama-gqa")
    for data in (calibration_of("llama-gqa"), None):
        found = read_cache(kept, "things", program, data, seed=1)
        assert found.keys() == {"x"}
        assert torch.equal(found["x"], torch.arange(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"what": "others"}, "holds no others, but things"),
        (lambda: {"program": program_of("gpt2")}, "holds the things of another program"),
        (
            lambda: {"program": other_weights(program_of("llama-gqa"))},
            "of this program with other weights",
        ),
        (
            lambda: {"calibration": calibration_of("llama-gqa", 1)},
            "holds the things on other calibration",
        ),
        (lambda: {"seed": 2}, "holds the things for seed 1, not 2"),
        (lambda: {"more": True}, "holds the things for more None, not True"),
    ],
)
def test_it_is_refused_for_anything_else(
    kept: Path, change: Callable[[], dict[str, Any]], message: str
) -> None:
    given = {"what": "things", "program": program_of("llama-gqa"), "seed": 1}
    given["calibration"] = calibration_of("llama-gqa")
    with pytest.raises(CalibrationError, match=message):
        read_cache(kept, **{**given, **change()})


def test_a_file_that_something_else_wrote_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("no")
    for name in ("model.safetensors", "text", "absent"):
        with pytest.raises(CalibrationError, match=f"{name} holds no things") as caught:
            read_cache(tmp_path / name, "things", program_of("llama-gqa"), None)
        assert "\n" not in str(caught.value)


def test_a_file_is_never_written_over(kept: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        write_cache(kept, "things", {}, program_of("llama-gqa"), None)


# -- scores ---------------------------------------------------------------------------------------


def context_of(name: str, **changes: Any) -> ScoringContext:
    coupling = coupling_of(name)
    groups = [group for group in coupling.groups if group.role == "ffn"]
    found = ScoringContext(program_of(name), coupling, groups, calibration_of(name))
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize("name", ["taylor", "wanda", "l2"])
def test_scores_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, context = tmp_path / "scores", context_of("llama-gqa")
    first = load_or_score(path, name, context)

    def scores(*_: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr(CRITERIA[name], "scores", scores)
    for again in (context, dataclasses.replace(context, calibration=None)):
        found = load_or_score(path, name, again)
        assert found.keys() == first.keys() == {group.name for group in context.groups}
        assert all(torch.equal(found[key], value) for key, value in first.items())
    (one, *_) = context.groups
    assert load_or_score(path, name, dataclasses.replace(context, groups=[one])).keys() == {
        one.name
    }


def test_scores_without_data_do_not_depend_on_it(tmp_path: Path) -> None:
    path, context = tmp_path / "scores", context_of("llama-gqa")
    first = load_or_score(path, "l2", context)
    other = dataclasses.replace(context, calibration=calibration_of("llama-gqa", 1))
    assert load_or_score(path, "l2", other).keys() == first.keys()


@pytest.mark.parametrize(
    ("criterion", "changes", "message"),
    [
        ("l2", {}, "holds the scores for criterion taylor, not l2"),
        ("taylor", {"aggregate": "max"}, "holds the scores for aggregate sum, not max"),
        ("taylor", {"seed": 3}, "holds the scores for seed 0, not 3"),
        ("taylor", {"calibration": calibration_of("llama-gqa", 1)}, "on other calibration data"),
        ("taylor", {"groups": coupling_of("llama-gqa").groups}, "lacks the scores of"),
    ],
)
def test_scores_of_something_else_are_refused(
    tmp_path: Path, criterion: str, changes: dict[str, Any], message: str
) -> None:
    load_or_score(tmp_path / "scores", "taylor", context_of("llama-gqa"))
    with pytest.raises(CalibrationError, match=message):
        load_or_score(tmp_path / "scores", criterion, context_of("llama-gqa", **changes))


def test_a_place_that_cannot_be_written_is_refused_before_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(CRITERIA["taylor"], "scores", lambda *_: pytest.fail("scored"))
    with pytest.raises(OutputError, match="cannot be written"):
        load_or_score(tmp_path / "file" / "scores", "taylor", context_of("llama-gqa"))
