"""Refitting what stays: what is refused."""

from __future__ import annotations

import pytest
import torch
from architectures import coupling_of, inputs_of, program_of

from graphprune.calibration.data import Calibration
from graphprune.errors import SelectionError
from graphprune.ir.interpreter import Interpreter
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Cut, Step
from graphprune.transforms.refit import refit


def test_weights_that_cannot_be_fitted_are_named_before_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, coupling = program_of("llama-gqa"), coupling_of("llama-gqa")
    group = next(group for group in coupling.groups if group.role == "ffn")
    name = next(member.weight for member in group.members if member.dim == 1)
    broken = program.with_weights({name: torch.full_like(program.weights[name], torch.inf)})
    cut = Cut(group.name, group.size, group.role, {(): (0,)}, (), tuple(group.members))
    plan = Plan((Step(program.fingerprint(), (cut,)),))
    monkeypatch.setattr(Interpreter, "step", lambda *_: pytest.fail("something ran"))
    with pytest.raises(SelectionError, match=f"{name}: it has values that are not finite"):
        refit(broken, coupling, plan, Calibration.from_batches([inputs_of(program)]))
