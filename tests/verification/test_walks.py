"""Verification walks both programs a segment at a time, and says where they part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from architectures import coupling_of, program_of, random_plan, renamed_outputs
from limits import least_memory
from torch import Tensor, fx

import graphprune as gp
from graphprune.calibration.layerwise import SegmentWeights
from graphprune.calibration.segments import segments
from graphprune.errors import VerificationError
from graphprune.ir.interpreter import run_program
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.verification.walks import Walk
from graphprune.weights.placement import Placement
from graphprune.weights.scratch import ScratchFile

NAME = "llama-gqa"


def pruned() -> tuple[Program, Plan, Program]:
    plan = random_plan(coupling_of(NAME), roles={"ffn"})
    return program_of(NAME), plan, gp.apply(program_of(NAME), plan)


def with_change(program: Program, name: str, change: Callable[[Tensor], object]) -> Program:
    weight = program.weight(name).clone()
    change(weight)
    return program.with_weights({name: weight})


def limited(program: Program) -> tuple[Program, int]:
    """Return the program with a limit that leaves a byte beside a segment's weights."""
    parts = [part.nodes for part in segments(program)]
    needed = least_memory(program, lambda roomy: SegmentWeights(roomy, parts=parts).room)
    return dataclasses.replace(program, placement=Placement(memory=needed + 1)), needed


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What went to scratch files."""
    found: list[Tensor] = []
    write = ScratchFile.write
    monkeypatch.setattr(
        ScratchFile, "write", lambda file, each: (found.append(each), write(file, each))[1]
    )
    return found


def test_no_more_than_a_segment_is_held(
    monkeypatch: pytest.MonkeyPatch, written: list[Tensor]
) -> None:
    program, plan, smaller = pruned()
    expected = gp.verify(program, plan, smaller)
    (wide, most), (narrow, _) = limited(program), limited(smaller)
    held: list[int] = []
    of = SegmentWeights.of

    def counted(weights: SegmentWeights, nodes: list[fx.Node]) -> dict[fx.Node, Tensor]:
        found = of(weights, nodes)
        held.append(sum(tensor.nbytes for tensor in found.values()))
        return found

    monkeypatch.setattr(SegmentWeights, "of", counted)
    assert gp.verify(wide, plan, narrow) == expected
    assert written and max(held) == most < sum(w.nbytes for w in program.weights.values()) / 2


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_of_a_weight_that_is_off_is_named(layer: int, written: list[Tensor]) -> None:
    program, plan, smaller = pruned()
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    wrong = with_change(smaller, name, lambda weight: weight[0].mul_(-1))
    with pytest.raises(
        VerificationError, match=f"first layer that differs is model.layers.{layer}$"
    ):
        gp.verify(limited(program)[0], plan, limited(wrong)[0])
    assert written


def test_the_layer_is_named_where_only_a_filled_cache_shows_it() -> None:
    program, plan, smaller = pruned()
    swapped = {"present.1.key": "present.1.value", "present.1.value": "present.1.key"}
    wrong = renamed_outputs(smaller, swapped)
    with pytest.raises(VerificationError, match=r"first layer that differs is model.layers.1$"):
        gp.verify(program, plan, wrong)


def test_a_walk_gives_what_a_run_gives() -> None:
    program = program_of(NAME)
    inputs = {"input_ids": torch.arange(6).view(2, 3)}
    walked, ran = Walk(program, inputs).to_end(), run_program(program, inputs)
    assert walked.keys() == ran.keys()
    assert all(torch.equal(walked[name], value) for name, value in ran.items())
