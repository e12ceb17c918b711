"""Programs whose weights are stored in another type than they are computed with."""

import dataclasses
from pathlib import Path

import pytest
import torch
from byte_llama import byte_llama

from graphprune.errors import UsageError
from graphprune.frontend.capture import capture
from graphprune.ir.interpreter import run_program
from graphprune.ir.program import Program
from graphprune.weights.deferred import Deferred
from graphprune.weights.placement import Placement
from graphprune.weights.scratch import FOLDER


@pytest.fixture
def stored() -> Program:
    program = capture(byte_llama())
    kinds = program.kinds
    weights = {
        n: w.bfloat16() if kinds[n] == "parameter" else w for n, w in program.weights.items()
    }
    return dataclasses.replace(program, weights=weights)


def test_arithmetic_is_in_the_type_of_the_graph(stored: Program) -> None:
    wide = dataclasses.replace(stored, weights=stored.take(stored.weights))
    assert {w.dtype for w in wide.weights.values() if w.is_floating_point()} == {torch.float32}
    ids = torch.arange(8).view(2, 4)
    expected = wide(input_ids=ids)["logits"]
    assert torch.equal(stored(input_ids=ids)["logits"], expected)
    assert torch.equal(run_program(stored, {"input_ids": ids})["logits"], expected)


def test_new_weights_are_held_in_the_stored_type(stored: Program) -> None:
    name = "lm_head.weight"
    wide = stored.take([name])[name]
    changed = stored.with_weights({name: wide * 1.001})
    assert changed.weights[name].dtype is torch.bfloat16
    with pytest.raises(UsageError, match=f"{name} has values that are too large for bfloat16"):
        stored.with_weights({name: torch.full_like(wide, torch.finfo(torch.float32).max)})


def test_new_weights_go_to_a_scratch_file_past_the_limit(
    stored: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    name = "lm_head.weight"
    limited = dataclasses.replace(stored, placement=Placement(memory=1000))
    changed = limited.with_weights({name: stored.weights[name] * 2})
    assert isinstance(changed.weights[name], Deferred)
    assert torch.equal(changed.weights[name], stored.weights[name] * 2)
    ids = torch.arange(8).view(2, 4)
    in_memory = stored.with_weights({name: stored.weights[name] * 2})
    assert torch.equal(changed(input_ids=ids)["logits"], in_memory(input_ids=ids)["logits"])
