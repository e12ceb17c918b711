"""`--dtype` of `run` and `apply`: what a checkpoint is stored in, and what is proven of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer
from command_line import PRUNE, Run, assert_refused
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    directory = tmp_path_factory.mktemp("model") / "llama"
    byte_llama().to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def stored(folder: Path) -> tuple[set[torch.dtype], str]:
    """The types of the weights of a checkpoint, and the one that its config names."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    return {weight.dtype for weight in weights.values()}, config["dtype"]


@pytest.mark.parametrize("asked", [None, "float16", "float32"])
def test_run_and_apply_store_what_is_asked_for(
    graphprune: Run, narrow: Path, text: Path, tmp_path: Path, asked: str | None
) -> None:
    wanted = asked or "bfloat16"
    option = ["--dtype", asked] if asked else []
    out, again = tmp_path / "out", tmp_path / "again"
    passes = ["--passes", f"{PRUNE},reconstruct", "--calibration", text, "--samples", 8]
    assert graphprune("run", narrow, *passes, "-o", out, *option).status == 0
    assert stored(out) == ({getattr(torch, wanted)}, wanted)
    assert graphprune("apply", narrow, out / "plan.json", "-o", again, *option).status == 0
    assert stored(again) == stored(out)
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for folder in (out, again):
        done = graphprune("verify", narrow, folder)
        assert (done.status, done.err) == (0, ""), done


def test_what_is_no_type_is_refused_before_the_model_is_loaded(
    graphprune: Run, tmp_path: Path
) -> None:
    options = ["--passes", PRUNE, "-o", tmp_path / "out", "--dtype", "float8"]
    done = graphprune("run", "nowhere", *options)
    assert done.status == 2
    assert "float8" in done.err and "bfloat16" in done.err
    done = graphprune("apply", "nowhere", "plan.json", "-o", tmp_path / "out", "--dtype", "half")
    assert done.status == 2
    assert "half" in done.err


def test_a_value_that_is_too_large_for_the_type_leaves_nothing_behind(
    graphprune: Run, narrow: Path, tmp_path: Path
) -> None:
    large = Path(shutil.copytree(narrow, tmp_path / "large"))
    model = byte_llama().to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    model.save_pretrained(large)
    out = tmp_path / "out"
    done = graphprune("run", large, "--passes", PRUNE, "-o", out, "--dtype", "float16")
    assert_refused(done, "lm_head.weight", "float16")
    assert not out.exists()


def test_an_archive_keeps_its_types_and_says_so(
    graphprune: Run, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphprune.backends.huggingface import save

    monkeypatch.setattr(save, "checkpoint_form", lambda _: save.CheckpointForm("none", "too odd"))
    out = tmp_path / "out"
    done = graphprune("run", narrow, "--passes", PRUNE, "-o", out, "--dtype", "float16")
    assert done.status == 0
    assert "--dtype is for Hugging Face checkpoints" in done.err
