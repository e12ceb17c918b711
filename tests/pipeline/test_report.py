from __future__ import annotations

import json
from importlib import metadata

import pytest
from rich.console import Console

from graphprune.errors import UsageError
from graphprune.pipeline.report import PassRecord, ProgramSize, Report


def report() -> Report:
    before, between, after = (
        ProgramSize(1_000_000, 4096),
        ProgramSize(750_000, 4096),
        ProgramSize(700_000, 2048),
    )
    return Report(
        pipeline="prune{ratio=0.25},merge-kv-heads{groups=2},verify",
        before=before,
        after=after,
        passes=(
            PassRecord("prune", "prune{ratio=0.25}", 1.25, before, between, {"units": [1, 2]}),
            PassRecord("merge-kv-heads", "merge-kv-heads{groups=2}", 0.5, between, after),
        ),
        skipped=("verify",),
        seed=3,
        calibration={"samples": 2},
    )


def test_json_reads_back() -> None:
    assert Report.from_json(report().to_json()) == report()


def test_json_is_stable_and_says_its_versions() -> None:
    assert report().to_json() == report().to_json()
    data = json.loads(report().to_json())
    assert list(data) == sorted(data)
    assert set(data["versions"]) == {"graphprune", "torch", "transformers"}
    assert data["versions"]["torch"] == metadata.version("torch")
    assert data["calibration"] == {"samples": 2}
    assert data["passes"][0]["details"] == {"units": [1, 2]}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}', "null"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a report of graphprune"):
        Report.from_json(text)


def test_the_plain_table_has_every_pass_and_the_totals() -> None:
    lines = [line.split() for line in str(report()).replace("│", " ").splitlines()]
    assert ["(input)", "1,000,000", "4,096"] in lines
    assert ["prune{ratio=0.25}", "1.25", "750,000", "(-25.0%)", "4,096"] in lines
    merged = ["0.50", "700,000", "(-6.7%)", "2,048", "(-50.0%)"]
    assert ["merge-kv-heads{groups=2}", *merged] in lines
    assert ["verify", "skipped"] in lines
    assert ["total", "1.75", "700,000", "(-30.0%)", "2,048", "(-50.0%)"] in lines


def test_the_plain_table_fits_the_page_and_has_no_color() -> None:
    assert all(len(line) <= 100 for line in str(report()).splitlines())
    assert "\x1b" not in str(report())


def test_rich_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=100).print(report())
    assert "merge-kv-heads{groups=2}" in capsys.readouterr().out
