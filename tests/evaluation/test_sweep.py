"""Sweeps: what is asked for, what is measured, and going on where one stopped."""

from __future__ import annotations

import io
import json
import math
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import program_of
from byte_llama import byte_llama, byte_tokenizer
from fakes import pipelines_run
from rich.console import Console

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError, OutputError, PipelineError, UsageError
from graphprune.evaluation.held_out import HeldOut, HeldOutSamples
from graphprune.evaluation.journal import POINTS, Journal
from graphprune.evaluation.perplexity import perplexity
from graphprune.evaluation.sweep import PICTURE, RESULT, sweep
from graphprune.evaluation.sweep_result import MeasuredProgram, Sweep, SweepPoint
from graphprune.evaluation.template import PipelineTemplate, read_ratios
from graphprune.ir.program import Program

TEXT = "".join(f"line {number} of a text that is long enough\n" for number in range(20))
FFN = "prune{target=ffn ratio={ratio} criterion=l2}"
RANDOM = "prune{target=ffn ratio={ratio} criterion=random}"


@cache
def program() -> Program:
    return gp.capture(byte_llama())


@cache
def heldout() -> HeldOut:
    return HeldOut(TEXT, byte_tokenizer(), length=32)


def run(
    folder: Path, *recipes: str, ratios: tuple[float, ...] = (0.25, 0.5), **options: Any
) -> Sweep:
    return sweep(
        program(), [PipelineTemplate.read(r) for r in recipes], ratios, heldout(), folder, **options
    )


# -- what is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps", "ratios"),
    [
        ("0.25", 6, (0.25,)),
        ("0.1..0.6", 6, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
        ("0.1..0.6", 2, (0.1, 0.6)),
        ("0.1..0.6..0.2", 6, (0.1, 0.3, 0.5)),
        ("0.1..0.7..0.2, 0.5,0", 6, (0.1, 0.3, 0.5, 0.7, 0)),
    ],
)
def test_ratios_are_numbers_and_ranges(text: str, steps: int, ratios: tuple[float, ...]) -> None:
    assert read_ratios(text, steps) == ratios


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no number"),
        ("some", "'some' is no number"),
        ("0.1...0.3", "no number"),
        ("0.1..0.2..0.1..3", "no number"),
        ("0.3..0.1", "goes nowhere"),
        ("0.1..0.3..0", "goes nowhere"),
        ("0.1..inf", "no number"),
        ("0.5..1", "1 is not in"),
        ("-0.1", "-0.1 is not in"),
        ("nan", "nan is not in"),
    ],
)
def test_other_ratios_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_ratios(text)


def test_the_ratio_goes_wherever_it_is_marked(tmp_path: Path) -> None:
    text = "prune{target=ffn ratio={ratio}},prune{target=kv-heads ratio={ratio}},verify"
    assert str(PipelineTemplate.read(text).at(0.5)) == text.replace("{ratio}", "0.5")
    path = tmp_path / "recipe.yaml"
    path.write_text("- prune: {target: ffn, ratio: {ratio}}\n- verify\n")
    assert str(PipelineTemplate.read(str(path)).at(0.25)) == "prune{target=ffn ratio=0.25},verify"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune{target=ffn ratio=0.5}", r"has no \{ratio\}"),
        ("nowhere/recipe.yaml", "cannot read the recipe nowhere/recipe.yaml"),
    ],
)
def test_a_recipe_without_a_place_for_the_ratio_is_refused(text: str, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        PipelineTemplate.read(text)


def test_a_bad_recipe_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"recipe 'prun\{.*at ratio 0.25: .*did you mean"):
        run(tmp_path / "out", FFN, "prun{target=ffn ratio={ratio}}")
    with pytest.raises(CalibrationError, match=r"prune\{.*\} needs calibration data"):
        run(tmp_path / "out", FFN, "prune{target=ffn ratio={ratio}}")
    assert not (tmp_path / "out").exists()


# -- what is measured ---------------------------------------------------------------------------


def test_points_are_what_the_pipelines_give(tmp_path: Path) -> None:
    found = run(tmp_path / "out", FFN, RANDOM, draws=(None, None))
    assert [(p.recipe, p.ratio, p.seed) for p in found.points] == [
        (recipe, ratio, seed)
        for recipe in (FFN, RANDOM)
        for ratio in (0.25, 0.5)
        for seed in (0, 1)
    ]
    point = found.points[7]
    smaller = gp.Pipeline.parse(RANDOM.replace("{ratio}", "0.5")).run(program(), seed=1).program
    expected = perplexity(smaller, **vars(heldout()))
    assert point.size is not None
    assert point.size.perplexity == pytest.approx(expected.perplexity)
    assert point.size.parameters == smaller.parameter_count()
    assert found.dense.parameters == program().parameter_count()
    assert found.tokens == expected.tokens
    last = found.summaries()[-1]
    sizes = [p.size for p in found.points[6:] if p.size]
    assert last.spread == pytest.approx(statistics.stdev(size.perplexity for size in sizes))
    assert last.perplexity == pytest.approx(statistics.mean(size.perplexity for size in sizes))


def test_models_that_predict_no_next_token_are_measured_by_how_far_they_are(tmp_path: Path) -> None:
    encoder = program_of("bert")
    batches = [{"input_ids": torch.arange(18).reshape(2, 9)}]
    recipes, ratios = [PipelineTemplate.read(FFN)], (0.25, 0.5)
    found = sweep(encoder, recipes, ratios, HeldOutSamples(batches), tmp_path / "out")
    assert found.measure.startswith(("divergence", "relative squared change of "))
    assert (found.dense.loss, found.dense.perplexity, found.tokens) == (0.0, None, 2)
    losses = [point.size.loss for point in found.points if point.size]
    assert 0 < losses[0] < losses[1]
    console = Console(file=io.StringIO(), width=100)
    console.print(found)
    assert found.measure in console.file.getvalue()  # type: ignore[attr-defined]
    again = sweep(encoder, recipes, ratios, HeldOutSamples(batches), tmp_path / "out")
    assert again == found


def test_recipes_share_the_calibration(tmp_path: Path) -> None:
    batches = [{"input_ids": ids} for ids in (perplexity_ids(0), perplexity_ids(1))]
    draws = [Calibration.from_batches([batch]) for batch in batches]
    text = "prune{target=ffn ratio={ratio} criterion=wanda}"
    found = run(tmp_path / "out", text, ratios=(0.5,), draws=draws)
    for seed, point in enumerate(found.points):
        pipeline = gp.Pipeline.parse(text.replace("{ratio}", "0.5"))
        smaller = pipeline.run(program(), calibration=draws[seed], seed=seed).program
        assert point.size is not None
        assert point.size.loss == pytest.approx(perplexity(smaller, **vars(heldout())).loss)


def perplexity_ids(seed: int) -> Any:

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 16), generator=generator)


def test_a_point_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    found = run(tmp_path / "out", "prune{target=experts ratio={ratio}  criterion=l2}", FFN)
    assert [point.size is None for point in found.points] == [True, True, False, False]
    assert "'experts' matches no group" in found.points[0].reason
    assert found.summaries()[0].measured == 0
    text = printed(found)
    assert text.count("failed: prune") == 1
    assert "0.25 (seed 0), 0.5 (seed 0)" in text
    assert json.loads((tmp_path / "out" / RESULT).read_text())["points"][0]["size"] is None


def test_zeros_count_where_sizes_stay(tmp_path: Path) -> None:
    found = run(tmp_path / "out", "sparsify{pattern={ratio} criterion=magnitude}", ratios=(0.5,))
    size = found.points[0].size
    assert size is not None
    assert size.parameters == found.dense.parameters == found.dense.nonzero
    assert size.nonzero < 0.8 * size.parameters


def test_files_of_passes_go_into_a_directory_of_the_point(tmp_path: Path) -> None:
    run(tmp_path / "out", FFN + ",save-pretrained{path=model}", ratios=(0.5,))
    assert (tmp_path / "out" / "1-0.5-0" / "model" / "config.json").is_file()


# -- going on -----------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    first = run(folder, FFN)
    journal = folder / POINTS
    whole = journal.read_text()
    journal.write_text(whole.splitlines(keepends=True)[0] + whole.splitlines()[1][:40])
    ran = pipelines_run(monkeypatch)
    again = run(folder, FFN)
    assert ran == [FFN.replace("{ratio}", "0.5")]
    assert again == first
    assert journal.read_text() == whole
    run(folder, FFN, ratios=(0.5, 0.75))
    assert ran[1:] == [FFN.replace("{ratio}", "0.75")]
    other = HeldOut(TEXT, byte_tokenizer(), length=16)
    sweep(program(), [PipelineTemplate.read(FFN)], (0.5,), other, folder)
    assert ran[2:] == [FFN.replace("{ratio}", "0.5")]


def test_what_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room\nleft")

    with monkeypatch.context() as patch:
        patch.setattr(gp.Pipeline, "run", fail)
        assert run(tmp_path / "out", FFN, ratios=(0.5,)).points[0].reason == "no room left"
    assert run(tmp_path / "out", FFN, ratios=(0.5,)).points[0].size is not None


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no sweep"):
        run(tmp_path, FFN)
    with pytest.raises(OutputError, match="is a file"):
        run(tmp_path / "mine.txt", FFN)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"size": null}', '{"size": {"a": 1}}'])
def test_a_journal_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / POINTS).write_text(line + "\n")
    with pytest.raises(OutputError, match=rf"{POINTS}:1 is no point of a sweep"):
        run(tmp_path, FFN)
    assert (tmp_path / POINTS).read_text() == line + "\n"


# -- what it looks like -------------------------------------------------------------------------


def printed(found: Sweep) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


def made(*perplexities: float | None) -> Sweep:
    points = tuple(
        SweepPoint("first", 0.5, seed, MeasuredProgram(50, 8, 40, 1.0, value))
        for seed, value in enumerate(perplexities)
    )
    return Sweep(MeasuredProgram(100, 8, 100, 0.5, 2.0), 10, "digest", points)


def test_the_table_shows_mean_and_spread() -> None:
    line = next(line for line in printed(made(3.0, 5.0)).splitlines() if "first" in line)
    assert line.split() == ["first", "0.5", "50", "(-50.0%)", "40.0%", "4.00", "±", "1.41"]


def test_one_seed_has_no_spread_and_an_infinite_perplexity_is_null() -> None:
    assert made(3.0).summaries()[0].spread is None
    assert made(3.0, math.inf).summaries()[0].spread is None
    assert json.loads(made(math.inf).to_json())["points"][0]["size"]["perplexity"] is None


@pytest.mark.parametrize("perplexity", [2.0, math.inf, None])
def test_what_json_keeps_of_a_program_is_read_back(tmp_path: Path, perplexity: Any) -> None:
    size, identity = MeasuredProgram(50, 8, 40, 1e4, perplexity), {"pipeline": "first"}
    Journal(tmp_path, "sweep", MeasuredProgram.from_json).add(identity, size, "")
    assert Journal(tmp_path, "sweep", MeasuredProgram.from_json).find(identity) == size
    (point,) = json.loads(made(perplexity).to_json())["points"]
    assert MeasuredProgram.from_json(point["size"]).perplexity == perplexity


def test_the_picture_shows_every_recipe(tmp_path: Path) -> None:
    found = made(3.0, 5.0)
    found.picture(tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    assert "<!-- first -->" in text
    assert "<!-- unpruned -->" in text
    made(math.inf).picture(tmp_path / "empty.svg")
    assert "<!-- first -->" not in (tmp_path / "empty.svg").read_text()


def test_a_sweep_draws_its_picture(tmp_path: Path) -> None:
    run(tmp_path / "out", FFN, ratios=(0.5,))
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
