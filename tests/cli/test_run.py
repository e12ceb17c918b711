"""`run`: what it says of its result, a dry run, and what it may replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from command_line import PRUNE, Run, assert_refused
from safetensors.torch import save_file

TAYLOR = "prune{target=ffn ratio=0.25},verify"


def test_run_says_what_was_lost_proven_and_written(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--calibration", text, "--samples", 4, "-o", out]
    done = graphprune("run", checkpoint, "--passes", TAYLOR, *options)
    assert (done.status, done.err) == (0, ""), done
    summary = json.loads((out / "report.json").read_text())["summary"]
    for words in ("loss", "agreement", "KL from", "bytes on disk", "verified: max relative error"):
        assert words in done.out
    assert "calibrated with 256 tokens" in done.out
    assert f"{out}: a Hugging Face checkpoint: config.json" in done.out
    assert "plan.json" in done.out and "report.json" in done.out
    before, after = summary["before"], summary["after"]
    assert before["parameters"] > after["parameters"]
    assert after["disk_bytes"] == (out / "model.safetensors").stat().st_size
    assert before["disk_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert 0 < summary["verified"] < 1e-4
    assert 0 < summary["predictions"]["agreement"] <= 1
    assert summary["predictions"]["kl"] > 0


def test_what_is_not_known_of_a_result_is_said(
    graphprune: Run, checkpoint: Path, tmp_path: Path
) -> None:
    done = graphprune("run", checkpoint, "--passes", PRUNE, "-o", tmp_path / "out")
    assert "not verified" in done.out
    assert "no calibration data were used" in done.out
    assert "not compared with the original: there is no text" in done.out


def test_what_predicts_no_tokens_is_compared_by_its_outputs(
    graphprune: Run, text: Path, tmp_path: Path
) -> None:
    model, images, out = tmp_path / "vit", tmp_path / "images.safetensors", tmp_path / "out"
    build("vit").save_pretrained(model)
    save_file({"pixel_values": torch.randn(20, 3, 16, 16)}, images)
    passes = "prune{target=ffn ratio=0.25 criterion=wanda}"
    options = ["--passes", passes, "-o", out, "--calibration"]
    assert_refused(graphprune("run", model, *options, text), "'pixel_values'", "FILE.safetensors")
    done = graphprune("run", model, *options, images)
    assert done.status == 0, done
    for words in ("agreement", "1 - cosine of logits", "on 2 rows", "with 18 samples"):
        assert words in done.out
    found = json.loads((out / "report.json").read_text())["summary"]["predictions"]
    assert found["loss_after"] is None
    assert 0 < found["distances"]["logits"] < 1
    measured = graphprune("evaluate", out, "--original", model, "--text", images)
    for words in ("agreement", "1 - cosine of logits", "20 rows of outputs of images.safetensors"):
        assert words in measured.out
    alone = graphprune("evaluate", out, "--text", images)
    assert_refused(alone, "perplexity needs a causal language model", "--original DIR compares")
    wrong = graphprune("evaluate", out, "--original", model, "--text", text)
    assert_refused(wrong, "'pixel_values'", "--text FILE.safetensors")
    without = ["--passes", PRUNE, "-o", out, "--overwrite"]
    assert "there is no data: give --calibration FILE.safetensors" in (
        graphprune("run", model, *without).out
    )


def test_a_sweep_on_tensors_with_labels_measures_their_cross_entropy(
    graphprune: Run, tmp_path: Path
) -> None:
    model, images, out = tmp_path / "vit", tmp_path / "images.safetensors", tmp_path / "out"
    build("vit").save_pretrained(model)
    labels = torch.arange(11) % 2
    save_file({"pixel_values": torch.randn(11, 3, 16, 16), "labels": labels}, images)
    recipe = ["--passes", "prune{target=ffn ratio={ratio} criterion=l2}", "--ratios", "0.5"]
    done = graphprune("sweep", model, *recipe, "--text", images, "-o", out)
    assert done.status == 0, done
    found = json.loads((out / "sweep.json").read_text())
    assert (found["measure"], found["tokens"]) == ("cross entropy", 11)
    compared = graphprune("evaluate", model, "--original", model, "--text", images)
    assert "11 rows of outputs" in compared.out


def test_json_is_the_report_and_nothing_else(
    graphprune: Run, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = graphprune("run", checkpoint, "--passes", PRUNE, "-o", out, "--json")
    assert json.loads(done.out) == json.loads((out / "report.json").read_text())


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    passes = f"{PRUNE},reconstruct,verify,export-onnx"
    options = ["--calibration", text, "--dry-run"]
    done = graphprune("run", checkpoint, "--passes", passes, *options)
    assert (done.status, done.err) == (0, ""), done
    assert "12 of 48 ffn of model.layers.0.mlp" in done.out
    assert done.out.count("skipped") == 3
    assert "nothing is written" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    data = json.loads(graphprune("run", checkpoint, "--passes", passes, *options, "--json").out)
    assert data["plan"]["steps"] and data["form"] == "plain"
    assert data["skipped"] == ["reconstruct", "verify", "export-onnx"]
    assert data["pipeline"] == passes and "summary" not in data


def test_only_what_graphprune_wrote_is_overwritten(
    graphprune: Run, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = graphprune("run", checkpoint, "--passes", PRUNE, "-o", out)
    assert first.status == 0, first
    (out / "old.txt").write_text("old")
    other = PRUNE.replace("0.25", "0.5")
    assert_refused(graphprune("run", checkpoint, "--passes", other, "-o", out), "is not empty")
    done = graphprune("run", checkpoint, "--passes", other, "-o", out, "--overwrite")
    assert done.status == 0, done
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 24
    assert not (out / "old.txt").exists()
    assert not any(path.name.startswith(".") for path in out.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    options = ["--passes", PRUNE, "--overwrite", "-o"]
    assert_refused(graphprune("run", checkpoint, *options, tmp_path / "mine"), "holds no plan.json")
    assert_refused(graphprune("run", out, *options, out), "is what is read")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("form", ["plain", "any"])
def test_a_form_that_is_not_plain_is_said_before_the_long_work(
    graphprune: Run,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    from graphprune.backends.huggingface import save
    from graphprune.transforms import refit

    seen: list[str] = []
    known = save.CheckpointForm("remote-code", "layers of two sizes")

    def look(_: Any) -> Any:
        seen.append("form")
        return known

    def work(*_: Any, **__: Any) -> Any:
        seen.append("work")
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "checkpoint_form", look)
    monkeypatch.setattr(refit, "refit", work)
    options = ["--calibration", text, "--form", form, "-o", tmp_path / "out"]
    done = graphprune("run", checkpoint, "--passes", f"{PRUNE},reconstruct", *options)
    assert "layers of two sizes" in done.err
    assert seen == (["form", "work"] if form == "any" else ["form"])
    assert done.status == (130 if form == "any" else 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("form", "gone"), [("plain", 2), ("any", 1)])
def test_the_form_that_is_asked_for_decides_sizes(
    graphprune: Run, checkpoint: Path, form: str, gone: int
) -> None:
    passes = "prune{target=kv-heads ratio=0.25 criterion=l2}"  # of 4 heads, and 3 are refused
    options = ["--passes", passes, "--form", form, "--dry-run", "--json"]
    done = graphprune("run", checkpoint, *options)
    data = json.loads(done.out)
    assert data["form"] == ("plain" if form == "plain" else "remote-code")
    removed = data["passes"][0]["details"]["removed"]
    assert set(removed.values()) == {f"{gone} of 4"}
    if form == "plain":
        told = (
            "graphprune: model.layers.{0-1}.self_attn:kv-head: left with 2 of 4: the config refuses"
        )
        assert told in done.err
    if form == "any":
        assert "num_attention_heads of 1, 2, 4 would do" in done.err


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("prune{target=ffn ratio=0.25}", ["needs calibration data", "--calibration", "l2"]),
        ("prune{target=ffn ratio=0.25 criterion=tailor}", ["tailor", "did you mean 'taylor'"]),
    ],
)
def test_what_a_pipeline_lacks_is_found_before_the_model_is_loaded(
    graphprune: Run, tmp_path: Path, passes: str, words: list[str]
) -> None:
    assert_refused(graphprune("run", "nowhere", "--passes", passes, "-o", tmp_path / "out"), *words)


def test_a_missing_text_is_found_before_the_model_is_loaded(
    graphprune: Run, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.txt"
    run = ["run", "nowhere", "--passes", TAYLOR, "--calibration", gone, "-o", tmp_path / "out"]
    sweep = ["sweep", "nowhere", "--passes", "prune{target=ffn ratio={ratio}}", "--text", gone]
    for arguments in (
        run,
        [*sweep, "-o", tmp_path / "out"],
        ["evaluate", "nowhere", "--text", gone],
        ["sensitivity", "nowhere", "--text", gone],
    ):
        assert_refused(graphprune(*arguments), "gone.txt does not exist")
