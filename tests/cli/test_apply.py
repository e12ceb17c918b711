"""`apply`: weights go from file to file, in their stored types, in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import byte_llama
from command_line import PRUNE, Run, assert_refused
from safetensors.torch import load_file

from graphprune.backends import load as loading
from graphprune.weights.files import TensorFile


@pytest.fixture
def half(tmp_path: Path) -> Path:
    byte_llama().to(torch.bfloat16).save_pretrained(tmp_path / "half", max_shard_size="20KB")
    return tmp_path / "half"


@pytest.fixture
def plan(graphprune: Run, half: Path, tmp_path: Path) -> Path:
    done = graphprune("run", half, "--passes", PRUNE, "-o", tmp_path / "whole")
    assert (done.status, done.err) == (0, ""), done
    return tmp_path / "whole/plan.json"


def test_apply_gives_what_run_did_and_holds_a_tensor_at_a_time(
    graphprune: Run, half: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = TensorFile.read

    def noted(self: TensorFile, name: str) -> Any:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(TensorFile, "read", noted)
    done = graphprune("apply", half, plan, "-o", tmp_path / "out", "--shard-size", "20KB")
    assert (done.status, done.err) == (0, ""), done
    assert len(read) == len(set(read))  # each is read once, for its own file
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert all((tmp_path / "out" / file).stat().st_size < 40_000 for file in files)
    found = {n: w for file in files for n, w in load_file(tmp_path / "out" / file).items()}
    expected = load_file(plan.parent / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}


def test_what_cannot_be_loaded_so_is_refused(graphprune: Run, half: Path, plan: Path) -> None:
    out = plan.parent.parent / "out"
    for option, value, word in (
        ("--memory", "lots", "'lots' is no size of memory"),
        ("--memory", "1KB", "too low"),
        ("--device", "cuda:99", "there is no device 'cuda:99' here"),
    ):
        done = graphprune("run", half, "--passes", PRUNE, "-o", out, option, value)
        assert_refused(done, word)
    assert_refused(graphprune("apply", half, plan, "-o", out, "--shard-size", "big"), "'big'")
    assert not out.exists()


@pytest.mark.parametrize("verb", ["run", "apply"])
def test_a_broken_tokenizer_is_found_before_the_work(
    verb: str, graphprune: Run, half: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (half / "tokenizer.json").write_text('{"model":')
    monkeypatch.setattr(loading, "load", None)
    monkeypatch.setattr(loading, "load_unrun", None)
    given = [plan] if verb == "apply" else ["--passes", PRUNE]
    done = graphprune(verb, half, *given, "-o", plan.parent.parent / "out")
    assert_refused(done, f"{half / 'tokenizer.json'} cannot be read")
    assert not (plan.parent.parent / "out").exists()
