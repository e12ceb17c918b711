"""Several processes that divide one work: the same result as one process, and how all end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import string
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from byte_llama import byte_llama, save_checkpoint
from captures import captured
from mixtures import WIDTH, Picked
from processes import Ended, together
from torch import Tensor, nn

import graphprune as gp
from graphprune import ranks
from graphprune.analysis.matrices import contractions
from graphprune.calibration.data import Calibration
from graphprune.calibration.statistics import observe
from graphprune.cli.main import main
from graphprune.criteria.base import ScoringContext
from graphprune.criteria.gradients import loss_gradients
from graphprune.errors import CalibrationError, UsageError
from graphprune.ir.program import Program
from graphprune.weights.placement import device_of

PIPELINES = {
    "experts": "prune{target=experts ratio=0.4 criterion=reap},reconstruct",
    "samples": "prune{target=ffn ratio=0.25 criterion=taylor-mixed}",
    "refit": "prune{target=ffn ratio=0.25 criterion=obs},reconstruct",
    "aligned": "merge-kv-heads{groups=2 init=aligned}",
    "full": "recover{method=full steps=2 batch=4 micro=1 held_out=0.3}",
    "norms": "reestimate-norms",
}

MORE = {
    "gates": "prune{target=kv-heads ratio=0.25 criterion=gate}",
    "taylor": "prune{target=ffn ratio=0.25 criterion=taylor}",
    "gates of batches": "prune{target=ffn ratio=0.25 criterion=gate-batch}",
    "wanda": "prune{target=ffn ratio=0.25 criterion=wanda}",
    "knockoffs": "prune{target=ffn ratio=0.25 criterion=scop}",
    "measured loss": "prune{target=ffn ratio=0.25 criterion=l2 scope=global normalize=loss}",
    "rotated": "rotate,prune{target=head-dim ratio=0.25 criterion=order}",
    "sparsegpt": "sparsify{pattern=2:4 criterion=sparsegpt}",
    "alps": "sparsify{pattern=2:4 criterion=alps}",
    "lora": "recover{steps=2 batch=4 micro=1 held_out=0.3 dropout=0.3}",
    "branches": "prune{target=ffn ratio=0.25 criterion=l2},reconstruct{method=gradient steps=4}",
    "two kinds": "prune{target=ffn,kv-heads ratio=0.25 criterion=obs},reconstruct",
}


class Images(nn.Module):
    """Convolutions with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@cache
def given(name: str) -> tuple[Program, Calibration]:
    """A program, and data for it: batches of unlike sizes and lengths, some of it padding."""
    torch.manual_seed(1)
    if name == "norms":
        program = gp.capture(Images().eval(), (torch.zeros(2, 2, 8, 8),))
        (value,) = program.inputs
        images = [{value.name: torch.randn(rows, 2, 8, 8)} for rows in (3, 1, 2)]
        return program, Calibration.from_batches(images)
    if name == "experts":
        program = gp.capture(Picked().eval(), (torch.zeros(3, WIDTH),))
        (value,) = program.inputs
        rows = [{value.name: torch.randn(count, WIDTH)} for count in (30, 9, 20)]
        return program, Calibration.from_batches(rows)
    program, batches = captured(byte_llama()), []
    sizes = [(3, 12), (2, 9), (4, 12), (2, 20), (2, 12)]
    for rows, length in sizes[-1:] if name == "aligned" else sizes:  # one process has none
        ids = torch.randint(0, 256, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = name == "aligned"
        batches.append({"input_ids": ids, "attention_mask": mask})
    return program, Calibration.from_batches(batches)


def run(name: str) -> tuple[str, dict[str, Tensor]]:
    program, data = given(name)
    result = gp.Pipeline.parse({**PIPELINES, **MORE}[name]).run(program, calibration=data)
    steps = gp.Plan(result.plan.steps).to_json()
    return steps, {name: weight.detach() for name, weight in result.program.weights.items()}


class Layers(nn.Module):
    """Four numbered layers with three matrices in each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


LOOKED_AT = "layers.[01].0.*", "layers.[01].*", "layers.*.0.*"
"""One matrix in each of two layers, three in each of two, one in each of four."""

MEASURED = "gram", "gradients"


@cache
def layers() -> Program:
    return gp.capture(Layers().eval(), (torch.zeros(2, 4),))


def collectives(pattern: str, what: Any) -> int:
    """How often processes wait for each other while something is measured of some matrices."""
    program, seen = layers(), list[object]()
    inputs, labels = program.inputs[0].name, torch.zeros(3, dtype=torch.int64)
    data = Calibration.from_batches([{inputs: torch.ones(3, 4), "labels": labels}] * 2)
    found = [m for m in contractions(program).matrices if fnmatchcase(m.weight, pattern)]

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (seen.append(function), function(*args, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast"):
            patch.setattr(dist, name, noting(getattr(dist, name)))
        if what == "gradients":
            context = ScoringContext(program, gp.analyze(program), (), data)
            list(loss_gradients(context, [matrix.weight for matrix in found]))
        else:
            observe(program, found, data, what)
    return len(seen)


Made = dict[str, tuple[str, dict[str, Tensor]]]


def made(names: Iterable[str]) -> Made:
    return {name: run(name) for name in names}


def made_together(names: Iterable[str]) -> tuple[Made, dict[tuple[str, str], int]]:
    with ranks.joined([]):
        counts = {(what, of): collectives(of, what) for what in MEASURED for of in LOOKED_AT}
        return made(names), counts


Both = tuple[Made, list[Ended]]
"""What one process makes, and what two make together."""


def by_both(names: Iterable[str], count: int = 2) -> Both:
    alone, _ = made(names), layers()
    found = together(lambda: made_together(names), count)
    assert not any(each.status for each in found), [each.errors for each in found]
    return alone, found


@pytest.fixture(scope="module")
def both() -> Both:
    return by_both(PIPELINES)


def check(name: str, both: Both) -> None:
    steps, weights = both[0][name]
    for each in both[1]:
        plan, found = each.result[0][name]
        assert plan == steps
        for of, weight in weights.items():
            difference = (found[of] - weight).double()
            assert difference.norm() <= 1e-5 * weight.double().norm(), of


@pytest.mark.unverified
@pytest.mark.parametrize("name", PIPELINES)
def test_two_processes_make_what_one_makes(name: str, both: Both) -> None:
    check(name, both)


@pytest.mark.slow
@pytest.mark.unverified
def test_three_processes_make_what_one_makes() -> None:
    everything = {**PIPELINES, **MORE}
    both = by_both(everything, 3)
    for name in everything:
        check(name, both)


@pytest.mark.unverified
@pytest.mark.parametrize("what", MEASURED)
def test_how_often_processes_wait_depends_on_layers_alone(what: str, both: Both) -> None:
    for each in both[1]:
        few, more_matrices, more_layers = (each.result[1][what, of] for of in LOOKED_AT)
        assert 0 < few == more_matrices < more_layers <= 2 * few


# -- how all end -----------------------------------------------------------------------------------


def command(*arguments: str, other: tuple[str, ...] = ()) -> list[Ended]:
    """Give a command line to two processes; the second takes `other` where that is given."""

    def called() -> None:
        second = os.environ["RANK"] == "1"
        sys.argv = ["graphprune", *(other if second and other else arguments)]
        main()

    return together(called)


def said(ended: list[Ended]) -> list[str]:
    """The lines that processes wrote to standard error."""
    return [line for each in ended for line in each.errors.splitlines()]


def test_different_arguments_are_refused_in_one_line() -> None:
    ended = command("run", "reference", "--dry-run", other=("run", "reference", "--json"))
    assert all(each.status for each in ended)
    (line,) = said(ended)
    assert line == "graphprune: ranks were started with different arguments: rank 1 not as rank 0"


def test_what_is_not_divided_is_refused_in_one_line() -> None:
    ended = command("inspect", "reference")
    assert all(each.status for each in ended)
    assert said(ended) == ["graphprune: inspect is not divided: start it without torchrun"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(string.printable * 8)
    save_checkpoint(folder / "model")
    gp.load(folder / "model")  # captured before they part
    return folder / "model"


def pruned(checkpoint: Path, output: Path) -> list[Ended]:
    text, passes = checkpoint.parent / "text.txt", "prune{target=ffn ratio=0.25},verify"
    size = "--samples", "4", "--calibration-length", "16"
    return command(
        *("run", str(checkpoint), "--passes", passes, "--calibration", str(text), *size),
        *("-o", str(output)),
    )


@pytest.mark.unverified
def test_a_run_is_written_and_told_once(checkpoint: Path, tmp_path: Path) -> None:
    first, second = pruned(checkpoint, tmp_path / "out")
    assert (first.status, second.status, second.output, second.errors) == (0, 0, "", "")
    assert first.output.count("verified: max relative error") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["summary"]["verified"] < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("end", ["refuses", "is killed"])
def test_one_that_ends_ends_all(
    end: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(calibration: Calibration, program: Program) -> None:
        if ranks.rank() == 1 and end == "refuses":
            raise CalibrationError("its data is gone")
        if ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Calibration, "check", ends)
    ended = pruned(checkpoint, tmp_path / "out")
    assert all(each.status for each in ended)
    (line,) = said(ended)
    assert ("its data is gone" if end == "refuses" else "ended") in line
    assert not list(tmp_path.iterdir())


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 2)
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="cpu:0 would be the device of every process: say cpu"):
        device_of("cpu:0")


def test_one_that_took_its_end_for_an_error_does_not_speak_of_that() -> None:
    def called() -> None:
        signal.signal(signal.SIGTERM, ranks._terminated)
        with contextlib.suppress(SystemExit):  # as code may do that is run
            signal.raise_signal(signal.SIGTERM)
        sys.argv = ["graphprune", "inspect", "/nowhere"]
        main()

    (ended,) = together(called, 1)
    assert ended.status == 1 and "told to end" in ended.errors and "nowhere" not in ended.errors
