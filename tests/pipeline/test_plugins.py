"""Passes and criteria of one's own: from a file, by entry point, as an object."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import program_of
from distributions import write_metadata

from graphprune.criteria import CRITERIA, Criterion, Scores, ScoringContext, criterion
from graphprune.errors import CalibrationError, PipelineError, UsageError
from graphprune.passes.prune import Prune
from graphprune.pipeline import plugins, registry
from graphprune.pipeline.pipeline import Pipeline

FILE = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import torch
from graphprune.criteria import Criterion
from graphprune.pipeline.pass_base import Outcome, Pass

class FromTheEnd(Criterion):
    """The last units go first."""
    name = "from-the-end"
    def scores(self, context):
        return {g.name: -torch.arange(g.size).double() for g in context.groups}

@dataclass(frozen=True)
class Nothing(Pass):
    """Do nothing."""
    name: ClassVar[str] = "nothing"
    times: int = 1
    def run(self, program, context):
        return Outcome(program)
'''


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test made known."""
    before = dict(CRITERIA)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_passes_and_criteria_of_a_file_are_known_by_their_names(file: Path) -> None:
    assert plugins.load_plugin(file) == ["from-the-end", "nothing"]
    assert "nothing" in registry.names()
    assert registry.find("nothing").options()["times"].type_text == "int"
    pipeline = Pipeline.parse(
        "nothing{times=3},prune{target=ffn ratio=0.25 criterion=from-the-end}"
    )
    (step,) = pipeline.run(program_of("llama-gqa"), quiet=True).plan.steps
    assert [cut.units for cut in step.cuts] == [{(): tuple(range(36, 48))}] * 2
    plugins.load_plugin(file)  # again is no conflict with itself


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("x = 1", "defines no pass and no criterion"),
        ("raise ValueError('no')", "ValueError: no"),
        ("def f(:", "SyntaxError"),
        (FILE.replace("from-the-end", "taylor"), "criterion 'taylor' is there already"),
        (FILE.replace('"nothing"', '"verify"'), "pass 'verify' is there already"),
    ],
)
def test_a_file_that_is_no_plugin_is_refused_and_leaves_nothing(
    tmp_path: Path, text: str | None, words: str
) -> None:
    path, before = tmp_path / "mine.py", dict(CRITERIA)
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        plugins.load_plugin(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == CRITERIA
    assert "nothing" not in registry.names()


def test_a_criterion_of_another_distribution_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "example_criteria.py").write_text(FILE)
    found = {"from-the-end": "example_criteria:FromTheEnd", "other": "example_criteria:FromTheEnd"}
    write_metadata(tmp_path, "example-criteria", found, "graphprune.criteria")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(criterion("from-the-end")).__name__ == "FromTheEnd"
    with pytest.raises(UsageError, match="calls itself 'from-the-end'"):
        criterion("other")
    with pytest.raises(UsageError, match="did you mean 'from-the-end'"):
        criterion("from-the-ends")


class Near(Criterion):
    """Units near one that is given are kept."""

    name = "near"

    def __init__(self, unit: int) -> None:
        self.unit = unit

    def scores(self, context: ScoringContext) -> Scores:
        return {g.name: -(torch.arange(g.size).double() - self.unit).abs() for g in context.groups}


def test_a_criterion_is_given_as_an_object(tmp_path: Path) -> None:
    chosen = []
    for unit in (0, 47):
        prune = Prune("ffn", 0.5, Near(unit))
        assert str(prune) == "prune{target=ffn ratio=0.5 criterion=near}"
        (step,) = Pipeline([prune]).run(program_of("llama-gqa"), quiet=True).plan.steps
        chosen.append(step.cuts[0].units[()])
    assert chosen == [tuple(range(24, 48)), tuple(range(24))]


def test_scores_in_a_file_know_the_object_that_they_are_of(tmp_path: Path) -> None:
    scores = str(tmp_path / "scores")
    Pipeline([Prune("ffn", 0.5, Near(0), scores=scores)]).run(program_of("llama-gqa"), quiet=True)
    Pipeline([Prune("ffn", 0.2, Near(0), scores=scores)]).run(program_of("llama-gqa"), quiet=True)
    other = Pipeline([Prune("ffn", 0.5, Near(9), scores=scores)])
    with pytest.raises(CalibrationError, match="settings"):
        other.run(program_of("llama-gqa"), quiet=True)


def test_what_is_no_criterion_is_refused() -> None:
    for given in (3, Near, object()):
        with pytest.raises((UsageError, PipelineError), match="criterion") as caught:
            Prune("ffn", 0.5, given)  # type: ignore[arg-type]
        assert "object of a class" in str(caught.value)
