from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import calibration_of, inputs_of, program_of, relative_error

import graphprune as gp
from graphprune.errors import SelectionError
from graphprune.passes.prune import Prune
from graphprune.passes.reconstruct import Reconstruct
from graphprune.passes.rotate import Rotate
from graphprune.passes.verify import Verify
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline

HALF = Prune("head-dim", 0.5, "order")


def run(name: str, *passes: Any, **options: Any) -> Result:
    options = {"calibration": calibration_of(name), **options}
    return Pipeline(passes).run(program_of(name), **options)


def lost(result: Result, name: str) -> float:
    """How far the calibration data's outputs are, all together."""
    total = 0.0
    for batch in calibration_of(name):
        ours, theirs = (dict(each(**batch)) for each in (program_of(name), result.program))
        total += float((ours["logits"] - theirs["logits"]).square().sum())
    return math.sqrt(total)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_half_of_a_head_that_was_rotated_loses_less_with_and_without_a_refit(name: str) -> None:
    for after in ((), (Reconstruct(),)):
        plain = run(name, Prune("head-dim", 0.5), *after)
        turned = run(name, Rotate(), HALF, *after, Verify())
        assert turned.plan.edits is not None
        assert lost(turned, name) < 0.8 * lost(plain, name)


def test_a_quarter_of_a_residual_stream_that_was_rotated_loses_less() -> None:
    plain = run("llama-gqa", Prune("hidden", 0.25))
    turned = run("llama-gqa", Rotate("hidden"), Prune("hidden", 0.25, "order"), Verify())
    assert lost(turned, "llama-gqa") < 0.6 * lost(plain, "llama-gqa")


def test_what_is_cut_in_order_are_the_last_units() -> None:
    wide = run("llama-gqa", Rotate()).program
    narrow = run("llama-gqa", Rotate(), HALF).program
    name = "model.layers.0.self_attn.v_proj.weight"
    kept = wide.weights[name].unflatten(0, (2, 8))[:, :4].flatten(0, 1)
    assert torch.equal(narrow.weights[name], kept)


def test_it_says_what_the_first_units_have_and_what_stays_as_it_is() -> None:
    result = run("llama-gqa", Rotate(target=("head-dim", "ffn")))
    (record,) = result.report.passes
    assert record.verified is not None and record.verified < 1e-5
    assert set(record.details["rotated"]) == {
        f"model.layers.{layer}.self_attn:head-dim" for layer in (0, 1)
    }
    for three_quarters, half in record.details["rotated"].values():
        assert 0.5 < half < three_quarters < 1
    reasons = record.details["not rotated"]
    assert set(reasons) == {f"model.layers.{layer}.mlp:ffn" for layer in (0, 1)}
    assert all("aten.silu.default is not known to be linear" in why for why in reasons.values())
    skipped = run("llama-gqa", Rotate(skip=("*.0.*",)), calibration=None)
    assert len(skipped.report.passes[0].details["rotated"]) == 1


def test_nothing_is_done_where_nothing_may_be() -> None:
    result = run("llama-gqa", Rotate(target=("ffn",)))
    assert result.program is program_of("llama-gqa")
    assert not result.plan
    assert result.report.passes[0].details["rotated"] == {}


def test_what_matches_nothing_is_refused() -> None:
    with pytest.raises(SelectionError, match="target 'channels' matches no group"):
        run("llama-gqa", Rotate(target=("channels",)))
    with pytest.raises(SelectionError, match="skip pattern 'nowhere' matches no group"):
        run("llama-gqa", Rotate(skip=("nowhere",)))


def test_it_follows_other_cuts_and_its_plan_replays() -> None:
    cut = Prune(("ffn", "kv-heads"), 0.5, "l2")
    result = run("llama-gqa", cut, Rotate(), HALF, Verify())
    again = gp.apply(program_of("llama-gqa"), result.plan)
    for name, weight in result.program.weights.items():
        assert torch.equal(again.weights[name], weight)


def test_a_rotated_model_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    program = program_of("gemma3")
    program.save_pretrained(tmp_path / "before")
    lazy = gp.load(tmp_path / "before")
    made = Pipeline((Rotate(),)).run(lazy, quiet=True).program
    made.save_pretrained(tmp_path / "after")
    config = (tmp_path / "before" / "config.json").read_text()
    assert (tmp_path / "after" / "config.json").read_text() == config
    batch = inputs_of(program)
    expected, found = (p(**batch)["logits"] for p in (program, gp.load(tmp_path / "after")))
    assert relative_error(expected, found) < 1e-5
