"""The opt-in tool for published models: prose out of pages, tables, and a plain refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_models
import typer

PROSE = "This is a paragraph of plain words that is long enough to be taken for prose by a rule."


def test_paragraphs_of_a_page_are_kept_and_listings_are_not() -> None:
    page = f'<p class="a">{PROSE.replace("plain", "<em>plain</em>")}</p><p>Short &amp; plain</p>'
    page += f'<div class="para">{PROSE}\n</div><p># {"ls | wc $x = {1} " * 9}</p>'
    assert real_models.text_of(page) == f"{PROSE}\n{PROSE}"


def test_paragraphs_of_a_text_are_joined_and_tables_are_not_kept() -> None:
    broken = PROSE.replace("that is", "that\n   is")
    assert real_models.reflowed(f"1. Title\n\n{broken}\n\n| {PROSE} | 1 | 2 |\n") == PROSE


def test_what_is_absent_is_refused_plainly(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"gguf is not there: see the top"):
        real_models.need(tmp_path / "gguf", "see the top")
    with pytest.raises(typer.BadParameter, match="is not there"):
        real_models.make(tmp_path / "out", tmp_path, tmp_path)


def test_the_table_gives_what_each_recipe_adds_and_keeps_what_searches_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_models, "TABLE", tmp_path / "table.md")
    tried = {"pipeline": "prune", "samples": 8, "added": 0.25}
    found = {
        "model": "tiny",
        "command": "search",
        "measure": "loss",
        "original": 2.0,
        "size": 100,
        "rows": {"prune": (2.5, 90)},
        "search": {"why": "It is best", "tried": [tried, {"pipeline": "x", "failed": "no"}]},
    }
    for rows in ({"prune": (2.5, 90)}, {"prune": (2.75, 90)}):
        real_models.write_section(real_models.search_lines({**found, "rows": rows}))
    real_models.write_table({"unpruned": (2.0, 100), "taylor": (2.25, 90)}, "2 windows", 1024)
    text = (tmp_path / "table.md").read_text()
    assert "| taylor | -10.0% | 2.250 | +0.250 |" in text
    assert "1,024 tokens" in text
    assert text.count("## What compress finds: tiny") == 1
    assert "| prune | -10.0% | +0.7500 |" in text and "+0.5000" not in text
    assert "| prune | 8 | +0.2500 |" in text
