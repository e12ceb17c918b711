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
