from __future__ import annotations

from typing import Any

import pytest
import torch
from fakes import FakePlan

from graphprune import capture
from graphprune.errors import PipelineError
from graphprune.ir.printer import program_text
from graphprune.ir.program import Program
from graphprune.passes.print import Print
from graphprune.pipeline.pass_base import Context


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    return capture(torch.nn.Sequential(*layers), example_inputs=(torch.randn(2, 8),))


def run(what: Any, program: Any, *steps: str) -> None:
    context: Any = Context(program, FakePlan(steps))  # type: ignore[arg-type]
    assert Print(what=what).run(program, context).program is program


def test_groups(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    run("groups", program)
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    (row,) = [row for row in rows if "16" in row]
    assert row[-1] == "exact"


def test_types(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    run("types", program)
    lines = [line.partition("  ") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _, _ in lines] == list(program.weights)
    types = {name: kind.strip() for name, _, kind in lines}
    hidden = types["0.bias"].strip("[]")
    assert types["0.weight"].startswith(f"[{hidden}, ")
    assert types["2.weight"].endswith(f", {hidden}]")


def test_graph(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    run("graph", program)
    text = capsys.readouterr().out
    assert text == program_text(program) + "\n"
    assert "weight 0.weight: f32[16, 8]" in text.splitlines()


def test_long_lines_are_not_wrapped(
    program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.ir.printer.program_text", lambda program: "node" * 100)
    run("graph", program)
    assert capsys.readouterr().out == "node" * 100 + "\n"


def test_plan(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", program, "up 4")
    assert "up 4" in capsys.readouterr().out
    run("plan", program)
    assert capsys.readouterr().out == "the plan is empty\n"


def test_anything_else_is_refused() -> None:
    with pytest.raises(PipelineError, match="did you mean 'groups'"):
        Print(what="group")  # type: ignore[arg-type]
