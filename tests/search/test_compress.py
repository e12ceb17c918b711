"""`compress`: what is tried, what is chosen, that the text of it gives the same, going on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import coupling_of
from byte_llama import byte_llama, byte_tokenizer
from fakes import pipelines_run

import graphprune as gp
from graphprune import ranks
from graphprune.analysis.coupling import analyze
from graphprune.calibration.data import Calibration
from graphprune.errors import (
    CalibrationError,
    OutputError,
    ProcessError,
    SelectionError,
    UsageError,
)
from graphprune.evaluation.journal import POINTS
from graphprune.io import reference
from graphprune.ir.program import Program
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.search.bench import Figures, Tried
from graphprune.search.candidates import Candidate, candidates, scores_all
from graphprune.search.choice import choose
from graphprune.search.result import Compressed

TEXT = reference.calibration_text()


@cache
def program() -> Program:
    return gp.capture(byte_llama(num_hidden_layers=1))


@cache
def text() -> Calibration:
    return Calibration.from_text(TEXT, byte_tokenizer(), samples=16, length=32)


def run(folder: Path | None = None, **options: Any) -> Compressed:
    given = {"params": 0.1, "targets": ["ffn"], "criteria": ["wanda", "l2"], "calibration": text()}
    return gp.compress(program(), folder=folder, **{**given, **options})


@pytest.fixture(autouse=True, scope="module")
def short_searches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphprune.search.compress._GENERATIONS", (1,))
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compressed]:
    folder = tmp_path_factory.mktemp("search") / "work"
    return folder, run(folder)


# -- the search ---------------------------------------------------------------------------------


def test_the_best_of_what_was_tried_is_taken_and_its_text_gives_the_same_weights(
    searched: tuple[Path, Compressed],
) -> None:
    found = searched[1]
    texts = [str(each.candidate) for each in found.tried]
    assert "prune{target=ffn criterion=wanda scope=local params=0.1}" in texts
    assert "prune{target=ffn criterion=l2 scope=local params=0.1},reconstruct" in texts
    assert any("scope=global normalize=loss" in each for each in texts)
    assert any(each.startswith("evolve{target=ffn params=0.1 criterion=") for each in texts)
    assert any(each.endswith("},reconstruct{method=gradient}") for each in texts)
    full = [each for each in found.tried if each.figures and len(each.figures.values) > 16]
    assert full and all(found.added(full[0]) <= found.added(each) for each in full)
    assert found.program.parameter_count() <= 0.9 * program().parameter_count()
    assert str(found.pipeline).endswith(",verify") and str(full[0].candidate) in found.why
    assert found.calibration is not None
    again = gp.Pipeline.parse(str(found.pipeline)).run(program(), calibration=found.calibration)
    for name, weight in found.program.weights.items():
        assert torch.equal(weight, again.program.weights[name])


def test_what_it_fits_to_a_draw_of_the_same_size_gives(
    searched: tuple[Path, Compressed],
) -> None:
    fitted = searched[1].calibration
    assert fitted is not None and fitted.sha256 == text().sha256
    grown = run(calibration=Calibration.from_text(TEXT, byte_tokenizer()), criteria=["l2"])
    assert grown.calibration is not None
    drawn = {"samples": grown.calibration.samples, "length": grown.calibration.length}
    assert Calibration.from_text(TEXT, byte_tokenizer(), **drawn).sha256 == grown.calibration.sha256


def test_a_search_goes_on_where_it_stopped(
    searched: tuple[Path, Compressed], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = searched
    journal = folder / POINTS
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))
    ran = pipelines_run(monkeypatch)
    again = run(folder)
    missing = json.loads(lines[-1])["identity"]["pipeline"]
    assert [each.partition(" scores=")[0] for each in ran[:1]] == [
        missing.partition("}")[0] for _ in ran[:1]
    ]
    assert ran[1:] == [str(found.pipeline)]
    assert again.why == found.why and again.pipeline == found.pipeline


def test_when_the_time_is_over_the_best_so_far_is_taken(tmp_path: Path) -> None:
    found = run(seconds=1e-6)
    assert [str(each.candidate) for each in found.tried if each.figures] == [
        "prune{target=ffn criterion=wanda scope=local params=0.1}"
    ]
    assert found.program.parameter_count() < program().parameter_count()
    assert any("no time for" in note for note in found.notes)


def test_without_data_nothing_is_measured_and_that_is_said() -> None:
    found = run(calibration=None)
    assert str(found.pipeline) == "prune{target=ffn criterion=l2 scope=local params=0.1},verify"
    assert "no calibration data" in found.why and found.tried == ()


def test_a_criterion_that_cannot_score_is_no_obstacle() -> None:
    layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    module = gp.capture(torch.nn.Sequential(*layers), (torch.zeros(2, 8),))
    batches = Calibration.from_batches([{"input": torch.randn(32, 8)}])
    found = gp.compress(module, params=0.2, calibration=batches, criteria=["taylor", "l2"])
    reasons = {str(each.candidate): each.reason for each in found.tried}
    assert "needs logits" in reasons["prune{target=ffn scope=local params=0.2}"]
    assert not reasons[str(found.tried[0].candidate)]
    assert "relative squared change" in found.why


def test_labels_are_what_is_measured_where_there_are_some() -> None:
    layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    module = gp.capture(torch.nn.Sequential(*layers), (torch.zeros(2, 8),))
    labeled = {"input": torch.randn(32, 8), "labels": torch.randint(4, (32,))}
    found = gp.compress(
        module, params=0.2, calibration=Calibration.from_batches([labeled]), criteria=["l2"]
    )
    assert found.measure == "cross entropy" and found.whole is not None
    assert len(found.whole.values) == 8


# -- what is tried ------------------------------------------------------------------------------


def test_branches_are_trained_last_and_from_least_squares() -> None:
    prune, merge = Prune("ffn", 0.25), MergeKvHeads(1)
    told = [str(Candidate(heads, prune).trained()) for heads in (None, merge)]
    assert told == [
        "prune{target=ffn ratio=0.25},reconstruct{method=gradient}",
        "prune{target=ffn ratio=0.25},reconstruct,merge-kv-heads{groups=1},"
        "reconstruct{method=gradient}",
    ]


def texts(budgets: Any, targets: Any = (), **options: Any) -> list[str]:
    return [str(each) for each in candidates(analyze(program()), budgets, targets, **options)]


def test_widths_heads_and_both_are_tried() -> None:
    found = texts({"params": 0.1})
    assert found[0] == "prune{target=ffn criterion=l2 scope=local params=0.1}"
    assert "prune{target=ffn,kv-heads criterion=l2 scope=local params=0.1}" in found
    assert found[-1].startswith("prune{target=kv-heads ratio=0.25 criterion=l2 scope=local},prune")


def test_criteria_of_experts_are_tried_where_nothing_else_goes() -> None:
    coupling = coupling_of("mixtral")
    pruned = {each.targets for each in candidates(coupling, {"params": 0.1})}
    assert ("experts",) in pruned and len(pruned) > 1
    assert [each for each in pruned if scores_all("reap", coupling, each)] == [("experts",)]
    assert all(scores_all("wanda", coupling, each) for each in pruned)


def test_a_smaller_cache_is_pruned_or_merged_and_the_rest_is_met_by_widths() -> None:
    found = candidates(analyze(program()), {"kv_bytes": 0.5, "params": 0.2})
    kinds = {type(each.heads) for each in found}
    assert kinds == {Prune, MergeKvHeads}
    for each in found:
        made = each.pipeline().run(program()).program
        assert made.parameter_count() <= 0.8 * program().parameter_count()
        assert made.kv_bytes_per_token() <= 0.5 * program().kv_bytes_per_token()


def test_a_plain_checkpoint_is_asked_of_every_pass() -> None:
    assert all("form=plain" in each for each in texts({"params": 0.1}, plain=True))


# -- the choice ---------------------------------------------------------------------------------


def tried(scope: str, *values: float) -> Tried:
    prune = Prune(("ffn",), params=0.1, scope=scope)  # type: ignore[arg-type]
    return Tried(Candidate(None, prune), Figures(values, 90, 8, 1.0))


@pytest.mark.parametrize(
    ("alike", "taken"), [((2.2, 2.1), "local"), ((2.4, 2.4), "global"), ((1.9, 2.9), "local")]
)
def test_layers_that_stay_alike_are_preferred_where_it_costs_little(
    alike: tuple[float, ...], taken: str
) -> None:
    """By a tenth of what is added, or by less than the samples differ in."""
    whole, other = Figures((1.0, 1.0), 100, 8, 1.0), tried("global", 2.1, 2.1)
    pool = [tried("local", *alike), other]
    found = choose(whole, pool, "loss", prefer_alike=True)
    assert found.tried.candidate.widths is not None
    assert found.tried.candidate.widths.scope == taken
    assert choose(whole, pool, "loss", prefer_alike=False).tried is min(
        pool, key=lambda each: each.figures.mean if each.figures else 0
    )


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"params": None}, SelectionError, "no budget"),
        ({"params": 25}, UsageError, "25 % is 0.25"),
        ({"params": 0.9}, SelectionError, "nothing meets params 0.9: ffn can lose at most"),
        ({"params": None, "kv_bytes": 0.9, "targets": []}, SelectionError, "at most 0.75"),
        ({"targets": ["fnn"]}, SelectionError, "did you mean 'ffn'"),
        ({"criteria": ["tailor"]}, UsageError, "did you mean 'taylor'"),
        ({"criteria": []}, UsageError, "no criterion"),
        ({"criteria": ["reap"]}, SelectionError, "reap cannot score what is to be pruned"),
        ({"seconds": 0}, UsageError, "no time"),
    ],
)
def test_what_cannot_be_searched_for_is_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gp.Pipeline, "run", None)
    with pytest.raises(error, match=words):
        run(**options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(ProcessError, match="without torchrun"):
        run()


def test_too_little_to_hold_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a line " * 15)
    short = Calibration.from_text(tmp_path / "short.txt", byte_tokenizer(), samples=3, length=32)
    with pytest.raises(CalibrationError, match="too short to hold some of it out"):
        run(calibration=short)
    one = Calibration.from_batches([{"input_ids": torch.ones(1, 8, dtype=torch.int64)}])
    with pytest.raises(CalibrationError, match="too little to hold some out"):
        run(calibration=one)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no search"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
