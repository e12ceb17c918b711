"""`run`, `apply` and `verify` with passes that give weights other values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import PRUNE, Run, assert_refused
from safetensors.torch import load_file, save_file

RECIPES = {
    "sparsify": ("sparsify{pattern=2:4}", "sparsify{pattern=2:4} gave"),
    "reconstruct": (f"{PRUNE},reconstruct", "reconstruct gave"),
}


def run(graphprune: Run, checkpoint: Path, text: Path, passes: str, out: Path) -> None:
    options = ["--calibration", text, "--samples", 8]
    done = graphprune("run", checkpoint, "--passes", passes, *options, "-o", out)
    assert done.status == 0, done
    assert "plan.json, plan.edits" in done.out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plan_gives_the_same_checkpoint_and_verify_says_what_was_edited(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path, recipe: str
) -> None:
    passes, told = RECIPES[recipe]
    run(graphprune, checkpoint, text, passes, tmp_path / "out")
    done = graphprune("apply", checkpoint, tmp_path / "out/plan.json", "-o", tmp_path / "again")
    assert done.status == 0, done
    assert f"planned on 8 windows of 64 tokens of {text.name}, tokenizer " in done.out
    out, again = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert out.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in out.items())
    for folder in ("out", "again"):
        done = graphprune("verify", checkpoint, tmp_path / folder)
        assert done.status == 0, done
        assert told in done.out
    if recipe == "sparsify":
        assert "weights have the zeros that their pattern promises" in done.out
    (tmp_path / "out/plan.edits").unlink()
    done = graphprune("apply", checkpoint, tmp_path / "out/plan.json", "-o", tmp_path / "third")
    assert_refused(done, "plan.edits is missing")
    assert not (tmp_path / "third").exists()


def test_values_as_large_as_the_checkpoint_are_pointed_out(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    options = ["--calibration", text, "--samples", 8]
    passes = "recover{method=full steps=1}"
    done = graphprune("run", checkpoint, "--passes", passes, *options, "-o", tmp_path / "out")
    assert done.status == 0, done
    assert "plan.edits (0.1 MB) holds the values that recover" in done.err
    assert "the checkpoint loads without it" in done.err


def test_an_edited_weight_that_was_damaged_is_found(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    run(graphprune, checkpoint, text, RECIPES["reconstruct"][0], tmp_path / "out")
    held = weights(tmp_path / "out")
    name = next(name for name in held if name.endswith("down_proj.weight"))
    held[name][0, 0] += 1
    save_file(held, tmp_path / "out/model.safetensors", {"format": "pt"})
    assert_refused(graphprune("verify", checkpoint, tmp_path / "out"), f"weight {name} is")


def test_what_is_stored_in_half_precision_is_proven_too(
    graphprune: Run, broken: Path, text: Path, tmp_path: Path
) -> None:
    half = {name: each.bfloat16() for name, each in weights(broken).items()}
    save_file(half, broken / "model.safetensors", {"format": "pt"})
    run(graphprune, broken, text, RECIPES["reconstruct"][0], tmp_path / "out")
    done = graphprune("verify", broken, tmp_path / "out")
    assert done.status == 0, done


def test_diff_says_which_values_were_edited_and_how_data_was_drawn(
    graphprune: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    refitted, sparse = (RECIPES[name][0] for name in ("reconstruct", "sparsify"))
    for out, passes in {"one": refitted, "other": refitted, "sparse": sparse}.items():
        run(graphprune, checkpoint, text, passes, tmp_path / out)
    one, other, third = (tmp_path / name for name in ("one", "other", "sparse"))
    done = graphprune("diff", one, other)
    assert "B is calibrated with 8 windows of 64 tokens" in done.out
    assert "the same values" in done.out
    data = json.loads(graphprune("diff", one, third, "--json").out)
    assert data["calibration"][0]["samples"] == 8
    (down,) = [row for row in data["edited"] if row["weight"].endswith("0.mlp.down_proj.weight")]
    assert (down["first"], down["second"], down["same"]) == ("reconstruct", "sparsify", False)
    (query,) = [
        row for row in data["edited"] if row["weight"].endswith("0.self_attn.q_proj.weight")
    ]
    assert (query["first"], query["second"], query["same"]) == ("", "sparsify", None)
    (one / "plan.edits").unlink()
    assert "the same values" not in graphprune("diff", one, other).out
