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


def test_outputs_without_a_next_token_are_compared_by_their_direction() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3, bias=False))
    program = gp.capture(model, example_inputs=(torch.ones(2, 4),))
    turned = program.with_weights({"1.weight": -program.weights["1.weight"]})
    longer = program.with_weights({"1.weight": 2 * program.weights["1.weight"]})
    batches = [{"input": torch.randn(2, 4)}, {"input": torch.randn(2, 4)}]
    for other, distance in ((turned, 2.0), (longer, 0.0), (program, 0.0)):
        found = compare(program, other, batches)
        assert (found.predictions, found.loss_before, found.agreement, found.kl) == (
            4,
            None,
            None,
            None,
        )
        assert found.distances == {"output": pytest.approx(distance)}


def test_classes_are_compared_where_a_token_is_one_of_a_mask() -> None:
    program = program_of("bert")
    batch = inputs_of(program, batch=2, length=9)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 5:] = 0
    name = next(name for name in program.weights if name.endswith("output.dense.weight"))
    other = program.with_weights({name: program.weights[name] * 3})
    old, new = (each(**batch)["logits"] for each in (program, other))
    kept = batch["attention_mask"].bool()
    found = compare(program, other, [batch])
    assert found.predictions == 14
    assert found.loss_after is None
    assert found.agreement == float((old.argmax(-1) == new.argmax(-1))[kept].double().mean())
    cosine = functional.cosine_similarity(old[kept], new[kept], -1)
    assert found.distances["logits"] == pytest.approx(float(1 - cosine.mean()), rel=1e-3)


def test_maps_and_images_are_compared_sample_by_sample() -> None:
    model = torch.nn.Conv2d(1, 2, 3)
    program = gp.capture(model, example_inputs=(torch.ones(2, 1, 8, 8),))
    found = compare(program, program, [{"input": torch.randn(3, 1, 8, 8)}])
    assert found.predictions == 3


@pytest.mark.parametrize("batches", [[], [{"input": torch.ones(0, 4)}]])
def test_nothing_to_compare_on_is_refused(batches: list[dict[str, torch.Tensor]]) -> None:
    program = gp.capture(torch.nn.Linear(4, 3), example_inputs=(torch.ones(2, 4),))
    with pytest.raises(EvaluationError, match="nothing to compare on"):
        compare(program, program, batches)


def test_programs_with_other_outputs_are_not_compared() -> None:
    programs = [
        gp.capture(torch.nn.Linear(4, size), example_inputs=(torch.ones(2, 4),)) for size in (3, 5)
    ]
    with pytest.raises(EvaluationError, match="no outputs of the same sizes"):
        compare(*programs, [{"input": torch.ones(2, 4)}])
