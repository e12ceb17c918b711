"""Logits made a few tokens at a time, against those that a program gives whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from architectures import program_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import graphprune as gp
from graphprune.calibration import layerwise as layerwise_module
from graphprune.calibration import logits as logits_module
from graphprune.calibration.layerwise import BatchExecution
from graphprune.calibration.logits import Readout, output_node, run_to_logits
from graphprune.calibration.losses import cross_entropy, next_token_loss, sample_losses
from graphprune.calibration.segments import segments

BATCH, LENGTH, WIDE, CLASSES = 2, 5, 6, 11


class Head(nn.Module):
    """Hidden values to logits, with what models do behind their last projection."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(CLASSES, WIDE)
        self.linear = nn.Linear(WIDE, CLASSES, bias=kind in ("bias", "cap"))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.linspace(-1, 1, CLASSES))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids).tanh()
        if self.kind == "tied":
            return functional.linear(hidden, self.embed.weight)
        logits = self.linear(hidden)
        if self.kind == "cap":
            return (logits / 3).tanh() * 3
        if self.kind == "scaled":
            return (logits * self.scale + self.shift).double()
        if self.kind == "normalized":
            return logits.log_softmax(-1)
        if self.kind == "mixed":
            return logits + logits.flip(1)
        return logits


def captured(kind: str) -> gp.Program:
    torch.manual_seed(0)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    return gp.capture(Head(kind).eval(), {"input_ids": ids})


KINDS = {"plain": 0, "bias": 0, "tied": 0, "cap": 3, "scaled": 3, "normalized": None, "mixed": None}


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "_AT_ONCE", 3 * CLASSES)


@pytest.mark.parametrize(("kind", "behind"), KINDS.items())
def test_the_end_is_found_where_it_is_element_by_element(kind: str, behind: int | None) -> None:
    readout = Readout.of(output_node(captured(kind)))
    assert (None if readout is None else len(readout.tail)) == behind


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_whole_logits(kind: str) -> None:
    program = captured(kind)
    ids = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}

    def gradients(whole: bool) -> tuple[Tensor, list[Tensor | None]]:
        weights = {name: w.detach().requires_grad_() for name, w in program.weights.items()}
        inputs = {"input_ids": ids}
        if whole:
            logits = next(iter(program.run(weights, inputs).values()))
            at = functional.pad(mask[:, 1:].bool(), (0, 1))
            loss = functional.cross_entropy(logits[at].float(), ids[:, 1:][mask[:, 1:].bool()])
        else:
            loss = next_token_loss(run_to_logits(program, inputs, weights=weights), batch)
        return loss, list(torch.autograd.grad(loss * 2, [*weights.values()], allow_unused=True))

    expected, found = gradients(True), gradients(False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    values = run_to_logits(program, {"input_ids": ids}).all()
    torch.testing.assert_close(values, next(iter(program(input_ids=ids).values())))


def test_losses_of_samples_are_each_their_own() -> None:
    program = captured("cap")
    ids = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    found = sample_losses(run_to_logits(program, {"input_ids": ids}), {"input_ids": ids})
    whole = next(iter(program(input_ids=ids).values()))
    each = [next_token_loss(whole[at : at + 1], {"input_ids": ids[at : at + 1]}) for at in range(2)]
    torch.testing.assert_close(found, torch.stack(each))


def test_no_more_logits_are_made_at_once_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured("cap")
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    logits = run_to_logits(program, {"input_ids": ids})
    made = []

    def loss(piece: Tensor, at: Tensor) -> Tensor:
        made.append(tuple(piece.shape))
        return cross_entropy(torch.zeros(BATCH * LENGTH, dtype=torch.int64))(piece, at)

    logits.summed(torch.arange(BATCH * LENGTH), loss)
    assert made == [(3, CLASSES)] * 3 + [(1, CLASSES)]


def test_an_end_that_something_else_looks_at_is_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDE, CLASSES)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.linear(x)
            return logits * 2, logits.amax(-1)

    program = gp.capture(Two().eval(), (torch.zeros(2, WIDE),))
    assert Readout.of(output_node(program)) is None


def test_a_run_forward_makes_nothing_elsewhere_on_tensors_without_values() -> None:
    program = program_of("llama-gqa")
    with FakeTensorMode():
        weights = {
            name: torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
            for name, weight in program.weights.items()
        }
        there = dataclasses.replace(program, weights=weights)
        batch = {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}
        logits = run_to_logits(there, batch)
        rows = torch.arange(18, device="cuda")
        found = logits.rows(rows)
        assert {found.device, logits.device} == {torch.device("cuda", 0)}
        assert {output.device for output in there(**batch).values()} == {torch.device("cuda", 0)}
        parts = [segment.nodes for segment in segments(there)]
        (execution,) = BatchExecution.of_all(there, [batch], parts)
        for part in parts:
            execution.advance(part)


@pytest.mark.parametrize("kind", ["cap", "normalized"])
def test_batches_that_go_together_give_what_each_gives(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(layerwise_module, "AT_ONCE", 2)
    program = captured(kind)
    halves = {name: weight.bfloat16() for name, weight in program.weights.items()}
    stored = dataclasses.replace(program, weights=halves)  # converted wherever it is used
    made = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(0, CLASSES, (BATCH, LENGTH), generator=made)} for _ in range(3)
    ]
    together = [logits.all() for logits in layerwise_module.logits_of_all(stored, batches)]
    each = [run_to_logits(stored, batch).all() for batch in batches]
    torch.testing.assert_close(together, each)
