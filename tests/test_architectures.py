"""Every architecture from end to end: pruned, then exported and equal in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, coupling_of, program_of, random_plan
from torch.export import ExportedProgram

from graphprune.transforms.apply import apply_plan
from graphprune.verification.verify import verify

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pruned_by_a_quarter_it_equals_its_masked_original_and_its_onnx(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(name)
    plan = random_plan(coupling_of(name))
    pruned = apply_plan(program, plan)
    assert pruned.parameter_count() < program.parameter_count()
    assert verify(program, plan, pruned).max_relative_error <= TOLERANCE
    # Its operators are taken apart one by one: running the graph anew takes longer than all else.
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    report = pruned.export_onnx(tmp_path / "model.onnx")
    assert report.max_relative_error is not None
    assert report.max_relative_error <= TOLERANCE
