"""Every source of text gives its documents in order, or one line that says why not."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graphprune.errors import CalibrationError, EvaluationError
from graphprune.io.text_sources import read_documents


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def records(*texts: str, field: str = "text") -> bytes:
    return "\n\n".join(json.dumps({field: t}, ensure_ascii=False) for t in texts).encode() + b"\n"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a"])
def test_a_text_is_one_document(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, "one\r\ntwo\u2028thrée\n".encode())
    assert read_documents(path) == ["one\ntwo\u2028thrée\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_are_a_document_each(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, records("first", "with \u2028 inside"))
    assert read_documents(path) == ["first", "with \u2028 inside"]


def test_the_field_of_json_lines_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", records("first", "second", field="body"))
    assert read_documents(f"{path}:body") == ["first", "second"]
    with pytest.raises(CalibrationError, match=r"a\.jsonl:1 has no field 'text' that holds a text"):
        read_documents(path)
    with pytest.raises(CalibrationError, match=r"b\.jsonl does not exist"):
        read_documents(tmp_path / "b.jsonl:body")


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    text = written(tmp_path / "a.txt", b"one\ntwo\nthree \xff is never decoded")
    assert read_documents(text, most=6) == ["one\ntw"]
    lines = written(tmp_path / "a.jsonl", records("first", "second") + b"no JSON")
    assert read_documents(lines, most=7) == ["first", "se"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "absent does not exist"),
        ("empty.txt", b"\n ", r"empty\.txt is empty"),
        ("latin.txt", b"line\ncaf\xe9", r"latin\.txt is not UTF-8: byte 8"),
        ("broken.jsonl", records("a") + b"{", r"broken\.jsonl:2 is not JSON: .* at column 2; each"),
        ("half.jsonl", b'{"text": "\\ud800"}', r"half\.jsonl:1 holds half of a character"),
        ("zeros.txt", b"a\n\0\0b", r"zeros\.txt is no text: it holds bytes of zero"),
        ("list.json", b'["a"]', r"list\.json:1 has no field 'text'"),
        ("blank.jsonl", records("", " "), r"blank\.jsonl is empty"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_documents(tmp_path / name, EvaluationError)
    assert "\n" not in str(caught.value)


def test_what_is_not_compressed_or_cut_off_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.gz").write_bytes(b"text")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    for name in ("plain.gz", "cut.gz"):
        with pytest.raises(CalibrationError, match=f"{name} cannot be read"):
            read_documents(tmp_path / name)


# -- data sets ------------------------------------------------------------------------------------


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As much of the package `datasets` as is used; what it was asked for is noted."""
    asked: list[Any] = []

    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"body": text, "number": 1} for text in ("first", None, "second"))
        raise AssertionError("read further than was asked for")

    def load_dataset(name: str, *config: str, split: str, streaming: bool) -> Any:
        asked.append((name, *config, split, streaming))
        if name == "absent":
            raise FileNotFoundError("no such data set\nwith details")
        return rows() if name == "some/set" else iter(())

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    return asked


def test_a_column_of_a_data_set_is_streamed(datasets: list[Any]) -> None:
    assert read_documents("some/set:train:body", most=11) == ["first", "", "second"]
    assert read_documents("some/set:en:train:body", most=2) == ["fi"]
    assert datasets == [("some/set", "train", True), ("some/set", "en", "train", True)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent:train:text", "absent:train:text: the data set cannot be read: no such data set$"),
        ("some/set:train:text", "no column 'text' holds texts; there are body, number"),
        ("some/set:train:number", "no column 'number' holds texts"),
        ("empty:train:text", "empty:train:text is empty"),
    ],
)
def test_a_data_set_without_such_texts_is_refused(
    datasets: list[Any], source: str, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_documents(source)


def test_without_the_package_a_data_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="is no file, and .* package 'datasets' is needed"):
        read_documents("some/set:train:text")
