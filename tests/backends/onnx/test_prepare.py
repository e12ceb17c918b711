"""What the exporter is given: taken apart by operators, and run anew where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphprune import capture
from graphprune.backends.onnx.export import export


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The graphs that were run anew."""
    seen: list[ExportedProgram] = []
    run = ExportedProgram.run_decompositions

    def spy(exported: ExportedProgram, *args: Any, **options: Any) -> ExportedProgram:
        seen.append(exported)
        return run(exported, *args, **options)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", spy)
    return seen


def written_after_it_was_read(x: Tensor) -> Tensor:
    twice = x * 2
    return x.add_(1) + twice


def written_before_it_is_read(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    return y + x.mul_(3)


def written_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    half = y[..., :3]
    half.mul_(5)
    return y.sum(-1)


def read_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    half = y[..., :3]
    y.mul_(5)
    return half + 1


def written_in_pieces(x: Tensor) -> Tensor:
    y = x * 2
    first, second = y.split(3, -1)
    first.mul_(second)
    return y + 1


@pytest.mark.parametrize(
    ("function", "anew"),
    [
        (written_after_it_was_read, 0),
        (written_before_it_is_read, 0),
        (written_through_a_view, 1),
        (read_through_a_view, 1),
        (written_in_pieces, 1),
    ],
)
def test_what_is_written_in_place_keeps_its_meaning(
    function: Any, anew: int, runs: list[ExportedProgram], tmp_path: Path
) -> None:
    program = capture(Function(function), (torch.randn(2, 6),))
    report = export(program, tmp_path / "model.onnx")
    assert len(runs) == anew
    assert report.max_relative_error is not None and report.max_relative_error < 1e-5
