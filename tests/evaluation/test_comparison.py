"""Predictions of two programs are compared over what is not padding, alike for every batch size."""

from __future__ import annotations

import pytest
import torch
from architectures import inputs_of, program_of
from torch.nn import functional

import graphprune as gp
from graphprune.calibration import logits as logits_module
from graphprune.errors import EvaluationError
from graphprune.evaluation.comparison import compare


def noisy(program: gp.Program) -> gp.Program:
    name = next(name for name in program.weights if "down_proj" in name)
    return program.with_weights({name: program.weights[name] * 3})


def test_a_program_agrees_with_itself() -> None:
    program = program_of("llama-gqa")
    found = compare(program, program, [inputs_of(program, batch=2, length=9)])
    assert (found.agreement, found.kl, found.predictions) == (1.0, 0.0, 18)
    assert found.loss_before == found.loss_after


def test_figures_are_those_of_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("llama-gqa")
    other, batch = noisy(program), inputs_of(program, batch=3, length=8)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    old, new = (each(**batch)["logits"] for each in (program, other))
    kept = batch["attention_mask"].bool()
    kl = functional.kl_div(
        new[kept].log_softmax(-1), old[kept].log_softmax(-1), log_target=True, reduction="sum"
    )
    found = compare(program, other, [batch])
    assert found.predictions == int(kept.sum()) == 21
    assert found.kl == pytest.approx(float(kl) / 21, rel=1e-4)
    assert found.agreement == float((old.argmax(-1) == new.argmax(-1))[kept].double().mean())
    monkeypatch.setattr(logits_module, "_AT_ONCE", 1)  # row by row
    by_row = compare(program, other, [batch])
    assert by_row.predictions == 21
    assert by_row.kl == pytest.approx(found.kl, rel=1e-4)
    assert by_row.loss_after == pytest.approx(found.loss_after, rel=1e-4)


def test_a_classifier_has_no_loss_of_next_tokens() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
    program = gp.capture(model, example_inputs=(torch.ones(2, 4),))
    with pytest.raises(EvaluationError, match="no logits"):
        compare(program, program, [{"input": torch.ones(2, 4)}])
