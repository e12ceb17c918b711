"""`run`, `apply` and `verify` with passes that give weights other values."""

from __future__ import annotations

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
