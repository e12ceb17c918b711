"""Levels on disk: least squares by another way, composed with zeros, refused for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.criteria import Scores
from graphprune.errors import CalibrationError, OutputError
from graphprune.evolution.fitness import Departures
from graphprune.evolution.ladder import Ladder, Subject
from graphprune.evolution.record import Record

DAMP = 1e-9


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers)


def data() -> Calibration:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    return Calibration.from_batches([{"input": part} for part in x.split(50)])


def subject(module: nn.Module | None = None) -> Subject:
    program = gp.capture(module or network(), {"input": torch.zeros(2, 5)})
    coupling = gp.analyze(program)
    groups = [group for group in coupling.groups if group.is_zeroing]
    scores: Scores = {group.name: torch.arange(group.size).double() for group in groups}
    return Subject(coupling, groups, scores, data(), DAMP)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ladder]:
    folder = tmp_path_factory.mktemp("levels")
    return folder, Ladder(subject(), [[0, 2, 4], [0, 1, 3]], (2, 1), folder)


def test_every_level_is_the_least_squares_estimate_from_inputs_around(
    made: tuple[Path, Ladder],
) -> None:
    _, ladder = made
    model = network()
    x = torch.cat([batch["input"] for batch in data()])
    with torch.no_grad():
        first = model[1](model[0](x))
        dense = model[2].weight.clone()
        for lost in (2, 4):
            best = torch.linalg.lstsq(first[:, lost:], first @ dense.T).solution.T
            found = ladder.weights((lost, 0))["2.weight"]
            torch.testing.assert_close(found[:, lost:], best, rtol=1e-3, atol=1e-3)
            assert not found[:, :lost].any()
        # The second group's inputs are those that the refitted first one gives.
        around = ladder.weights((2, 0))["2.weight"]
        second = torch.tanh(first @ around.T)
        ones = torch.ones(len(x), 1)
        for lost in (1, 3):
            columns = torch.cat([second[:, lost:], ones], 1)
            best = torch.linalg.lstsq(columns, model[4](second)).solution.T
            weights = ladder.weights((0, lost))
            torch.testing.assert_close(
                weights["4.weight"][:, lost:], best[:, :-1], rtol=1e-3, atol=1e-3
            )
            torch.testing.assert_close(weights["4.bias"], best[:, -1], rtol=1e-3, atol=1e-3)


def test_levels_are_composed_and_nothing_lost_is_the_original(made: tuple[Path, Ladder]) -> None:
    _, ladder = made
    whole = ladder.weights((0, 0))
    assert all(torch.equal(whole[n], w) for n, w in ladder.subject.program.weights.items())
    both, one, other = (ladder.weights(state) for state in ((4, 3), (4, 0), (0, 3)))
    kept = both["2.weight"][3:]
    assert torch.equal(kept, one["2.weight"][3:]) and not both["2.weight"][:3].any()
    assert torch.equal(both["4.weight"], other["4.weight"])
    departures = Departures(ladder.subject.program, data(), 0)
    assert departures.of(whole, departures.count) == 0
    assert departures.of(both, 2) > departures.of(ladder.weights((2, 0)), 2)


def test_levels_are_read_again_and_those_that_are_missing_are_made(
    made: tuple[Path, Ladder],
) -> None:
    folder, ladder = made
    files = sorted(folder.glob("levels-*"))
    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    again = Ladder(subject(), [[0, 2, 4], [0, 1, 3]], (2, 1), folder)
    assert files[1].exists() and files[0].stat().st_mtime_ns == kept
    mine, theirs = again.weights((4, 3)), ladder.weights((4, 3))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_levels_and_measurements_of_another_program_are_refused(
    made: tuple[Path, Ladder], tmp_path: Path
) -> None:
    folder, _ = made
    other = network()
    with torch.no_grad():
        other[0].bias.zero_()
    with pytest.raises(CalibrationError, match="holds the levels of this program with other"):
        Ladder(subject(other), [[0, 2, 4], [0, 1, 3]], (2, 1), folder)
    Record(tmp_path, subject().program, data(), 0)
    with pytest.raises(CalibrationError, match="of this program with other weights"):
        Record(tmp_path, subject(other).program, data(), 0)
    with pytest.raises(CalibrationError, match="holds an evolution of tokens=0, not 8"):
        Record(tmp_path, subject().program, data(), 8)
    with pytest.raises(OutputError, match="is not empty, and holds no evolution"):
        Record(folder, subject().program, data(), 0)


@pytest.mark.parametrize("line", ["[]", "{}", "nothing", '["a", 1, 2, 3]'])
def test_what_is_no_measurement_is_refused(tmp_path: Path, line: Any) -> None:
    held = Record(tmp_path, subject().program, data(), 0)
    held.add("key", 1, (1, 2), 0.5)
    again = Record(tmp_path, subject().program, data(), 0)
    assert again.find("key", 1, (1, 2)) == 0.5 and again.find("key", 2, (1, 2)) is None
    with (tmp_path / "measured.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(OutputError, match=r"measured.jsonl:3 is no measurement"):
        Record(tmp_path, subject().program, data(), 0)
