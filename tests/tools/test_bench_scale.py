"""The benchmark at size, on a small model within a limit that holds next to none of it."""

from __future__ import annotations

from pathlib import Path

import bench_scale
import pytest
import torch

import graphprune as gp
from graphprune.weights.overlay import held_bytes
from graphprune.weights.scratch import FOLDER

LIMIT = 3_200_000  # what computes takes a segment in float32, of 3.165 MB
RECIPE = "sparsify{pattern=0.5 criterion=magnitude},prune{target=ffn ratio=0.25 criterion=l2}"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "scratch"))
    bench_scale.write_checkpoint("tiny", tmp_path / "model", shard_size="2MB")
    return tmp_path / "model"


def test_what_passes_change_within_a_limit_is_what_they_change_without(
    model: Path, tmp_path: Path
) -> None:
    limited, free = gp.load(model, memory=LIMIT), gp.load(model)
    assert limited.parameter_count() > 2_000_000
    pipeline = gp.Pipeline.parse(RECIPE)
    small, large = pipeline.run(limited), pipeline.run(free)
    assert held_bytes(small.program.weights) < LIMIT < held_bytes(large.program.weights)
    assert small.plan.to_json() == large.plan.to_json()
    for name, weight in large.program.weights.items():
        assert torch.equal(small.program.weights[name], weight), name
    small.program.save_pretrained(tmp_path / "out", shard_size="2MB")
    again = gp.load(tmp_path / "out")
    assert all(torch.equal(again.weights[n], w) for n, w in large.program.weights.items())
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_table_holds_every_row_that_was_measured() -> None:
    figure = bench_scale.Figure("inspect", 12.4, 11.6, 359_000_000)
    assert "| inspect | 12 | 12 | 0.36 |" in bench_scale.table([figure], "a model")


def test_one_table_is_written_and_the_other_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_scale, "TABLE", tmp_path / "SCALE.md")
    rows = [bench_scale.Figure("inspect", n, n, n) for n in (1, 2)]
    divided = [bench_scale.Divided("moments", 2.0, 1.1, r, 2.0, 1.0, 1e-9) for r in (0.55, 0.5)]
    for row, figure in zip(rows, divided, strict=True):
        bench_scale.write_part(bench_scale.table([row], "a model"))
        bench_scale.write_part(bench_scale.divided_table([figure], 7))
        bench_scale.write_part(bench_scale.table([row], "a model"))
        bench_scale.write_part(bench_scale.table([row], "a model", "measure-on-data"))
    text = (tmp_path / "SCALE.md").read_text()
    assert text.count("| inspect | 2 |") == 2 and text.startswith("# At size")
    assert text.count("# At size") == text.count("## On text") == 1
    assert "| moments | 2.00 | 1.10 | 0.50 | 2.00 | 1.00 | 1e-09 |" in text
    assert text.count("| moments |") == 1 and text.endswith("|\n")
