"""The benchmark for GPUs, as far as the CPU's provider goes."""

from __future__ import annotations

import json
from pathlib import Path

import bench_gpu
import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_everything_that_the_cpu_can_do_is_done_and_the_rest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "RECIPES", {"dense": ""})
    size = bench_gpu.Size(64, 64, 1, 4, batches=(1, 2), pasts=(8,), turns=1)
    monkeypatch.setattr(bench_gpu, "TINY", size)
    rows, tables = tmp_path / "rows.jsonl", tmp_path / "tables.md"
    bench_gpu.main(provider="cpu", dtypes="float16", tiny=True, rows=rows, tables=tables)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    by_kind = {kind: [r for r in found if r["kind"] == kind] for kind in {r["kind"] for r in found}}
    (package,), (parity,) = by_kind["package"], by_kind["parity"]
    assert (package["forms"], package["kv_bytes_per_token"]) == ({"gqa": 1}, 256)
    assert 0 < parity["error"] < 1e-2
    (placement,) = by_kind["placement"]
    assert placement["copies"] == 0
    assert set(placement["nodes"]) == {"CPUExecutionProvider"}
    assert [(row["batch"], row["past"]) for row in by_kind["rate"]] == [(1, 8), (2, 8)]
    assert all(row["decode"] > 0 for row in by_kind["rate"])
    assert [row["by"] for row in by_kind["sparse"] if "what" in row] == ["torch", "TensorRT"]
    assert "| TensorRT | TensorRT does not run here |" in tables.read_text()
