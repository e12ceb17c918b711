"""`save-pretrained` and `export-onnx`: where they write, and what they hand to the back ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakePlan, fake_program

from graphprune.errors import PipelineError, UsageError
from graphprune.passes.export_onnx import ExportOnnx
from graphprune.passes.save_pretrained import SavePretrained
from graphprune.pipeline.pass_base import Context
from graphprune.pipeline.pass_manager import PassManager
from graphprune.pipeline.pipeline import Pipeline


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    written: list[Any] = []

    def note(self: Any, path: Path, **options: Any) -> Any:
        written.append((path, options))
        attention = {"layer": "gqa"}
        return SimpleNamespace(opset=options.get("opset"), attention=attention, quantized={})

    for method in ("save_pretrained", "export_onnx"):
        monkeypatch.setattr(f"fakes.FakeProgram.{method}", note, raising=False)
    monkeypatch.setattr(ExportOnnx, "refuse_early", lambda *_, **__: None)  # asks the back end
    return written


def run(output: Path, *passes: Any) -> Any:
    program: Any = fake_program()
    result = PassManager(passes).run(Context(program, FakePlan(), output=output))  # type: ignore[arg-type]
    assert result.program is program
    return result


def test_paths_are_under_the_output_folder(written: list[Any], tmp_path: Path) -> None:
    run(tmp_path, SavePretrained("hf/small"), ExportOnnx(), ExportOnnx(path="/other/m.onnx"))
    paths = [path for path, _ in written]
    assert paths == [tmp_path / "hf/small", tmp_path / "model.onnx", Path("/other/m.onnx")]


def test_the_report_says_the_path_as_it_was_given(written: list[Any], tmp_path: Path) -> None:
    report = run(tmp_path, SavePretrained("small"), ExportOnnx(opset=21)).report
    assert [each.details for each in report.passes] == [
        {"path": "small"},
        {"path": "model.onnx", "opset": 21},
    ]


def test_options_reach_the_exporter(written: list[Any], tmp_path: Path) -> None:
    run(tmp_path, ExportOnnx(opset=18, check=False))
    assert written[0][1] == {"target": None, "opset": 18, "logits": "all", "check": False}


def test_the_report_of_a_target_says_what_attention_became(
    written: list[Any], tmp_path: Path
) -> None:
    (step,) = run(tmp_path, ExportOnnx(target="cpu", opset=23)).report.passes
    assert written[0][1] == {"target": "cpu", "opset": 23, "logits": "all", "check": True}
    details = {"path": "model.onnx", "opset": 23, "target": "cpu", "attention": {"layer": "gqa"}}
    assert step.details == details


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("save-pretrained", PipelineError, "pass 'save-pretrained' needs the option 'path'"),
        ('save-pretrained{path=""}', UsageError, "save-pretrained: the path is empty"),
        ('export-onnx{path=""}', UsageError, "export-onnx: the path is empty"),
        ("export-onnx{opset=17}", UsageError, "export-onnx: opset 17 is below 18"),
    ],
)
def test_bad_options_are_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^pipeline column 1: {message}$"):
        Pipeline.parse(text)
