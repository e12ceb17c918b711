from __future__ import annotations

import copy
import dataclasses
import re
from functools import cache

import pytest
import torch
from architectures import build, calibration_of, coupling_of, inputs_to, program_of
from captures import captured
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.calibration.data import Calibration
from graphprune.errors import VerificationError
from graphprune.ir.program import Program
from graphprune.transforms.rotations.rotate import Rotated, difference, rotate

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "phi3")]

GPT2 = "transformer.h.0.attn"


@cache
def double(name: str) -> tuple[Program, Coupling]:
    program = captured(copy.deepcopy(build(name)).double())
    return program, gp.analyze(program)


def rotated(name: str, *, role: str = "head-dim", data: bool = True) -> Rotated:
    program, coupling = double(name)
    groups = [group for group in coupling.groups if group.role == role]
    return rotate(program, coupling, groups, calibration_of(name) if data else None)


@pytest.mark.parametrize("data", [True, False], ids=["data", "weights"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert", *SLOW])
def test_it_gives_what_it_gave_to_the_rounding_of_double_precision(name: str, data: bool) -> None:
    program, _ = double(name)
    made = rotated(name, data=data)
    assert not made.others
    changed = [n for n, w in program.weights.items() if not torch.equal(w, made.program.weights[n])]
    assert changed and all("attn" in n or "attention" in n for n in changed)
    assert difference(program, made.program) < 1e-12
    for shares in made.shares.values():  # from the unit that matters most on
        assert float(shares.sum()) == pytest.approx(1)
        assert bool((shares.diff() <= 0).all())


@pytest.mark.parametrize("data", [True, False], ids=["data", "weights"])
def test_a_residual_stream_is_rotated_with_the_gains_of_its_norms_folded(data: bool) -> None:
    program, _ = double("llama-gqa")
    made = rotated("llama-gqa", role="residual", data=data)
    assert difference(program, made.program) < 1e-6  # norms compute in single precision
    gains = [name for name in program.weights if "norm" in name]
    assert len(gains) == 5
    assert all(bool((made.program.weights[name] == 1).all()) for name in gains)


def test_the_first_units_of_a_stream_are_its_principal_components() -> None:
    """As far as they are seen by what reads the stream, behind its norms."""
    made = rotated("llama-gqa", role="residual")
    model = copy.deepcopy(build("llama-gqa")).double()
    model.load_state_dict(dict(made.program.weights), strict=False)
    readers = {"self_attn.q_proj": 3, "mlp.up_proj": 2}
    seen = [
        inputs_to(model, f"model.layers.{layer}.{name}", dict(batch)) * count**0.5
        for layer in (0, 1)
        for name, count in readers.items()
        for batch in calibration_of("llama-gqa")
    ]
    seen += [inputs_to(model, "lm_head", dict(batch)) for batch in calibration_of("llama-gqa")]
    moments = torch.cat(seen).mT @ torch.cat(seen)
    apart = moments - moments.diagonal().diag()
    assert float(apart.abs().max()) < 1e-4 * float(moments.max())
    assert bool((moments.diagonal().diff() < 0).all())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama-mha", r"model.norm.weight multiplies its units on one way .* at aten.embedding"),
        ("gemma3", r"model.norm.weight multiplies its units on one way"),
        ("gpt2", r"aten.layer_norm.default is not known to be linear along it, at"),
    ],
)
def test_a_stream_that_cannot_be_rotated_has_its_reason(name: str, why: str) -> None:
    coupling = coupling_of(name)
    groups = [group for group in coupling.groups if group.role == "residual"]
    made = rotate(coupling.program, coupling, groups)
    assert made.program is coupling.program
    (said,) = made.others.values()
    assert re.match(why, said)


class Normed(nn.Module):
    """A bottleneck behind a norm with a gain, which one unit does not pass."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(5, 6), nn.Linear(6, 4)
        self.offset, self.gain = offset, nn.Parameter(torch.linspace(0, 2, 6) - offset)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.up(h * (self.gain + self.offset if self.offset else self.gain))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_reads_a_gain_takes_it_over(offset: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    program = gp.capture(Normed(offset).double(), (x,))
    coupling = gp.analyze(program)
    groups = [group for group in coupling.groups if group.size == 6]
    made = rotate(program, coupling, groups, Calibration.from_batches([{"x": x}]))
    assert bool((made.program.weights["gain"] == 1 - offset).all())
    assert difference(program, made.program) < 1e-12


def head_of(program: Program, units: slice) -> tuple[Tensor, Tensor]:
    """What makes units of the first head's values, ``[hidden, units]``, and what reads them."""
    made = program.weights[f"{GPT2}.c_attn.weight"][:, 64:][:, units]
    return made, program.weights[f"{GPT2}.c_proj.weight"][units]


def attended(program: Program, name: str = f"{GPT2}.c_proj") -> Tensor:
    """What the first head gives to its output projection on the calibration data."""
    model = copy.deepcopy(build("gpt2")).double()
    model.load_state_dict(dict(program.weights), strict=False)
    return torch.cat([inputs_to(model, name, dict(batch)) for batch in calibration_of("gpt2")])


@pytest.mark.parametrize("rank", [2, 5])
def test_what_a_cut_takes_is_what_the_best_product_of_that_rank_leaves(rank: int) -> None:
    program, made = double("gpt2")[0], rotated("gpt2").program
    _, output = head_of(program, slice(0, 8))
    best = torch.linalg.svdvals(attended(program)[:, :8] @ output)[rank:].square().sum()
    last = slice(rank, 8)
    before, after = (
        float((attended(each)[:, last] @ head_of(each, last)[1]).square().sum())
        for each in (program, made)
    )
    assert after == pytest.approx(float(best), rel=1e-3)
    assert before > 1.2 * float(best)


def test_without_data_it_is_the_singular_value_decomposition_of_the_weights() -> None:
    program, made = double("gpt2")[0], rotated("gpt2", data=False).program
    exact = torch.linalg.svdvals(torch.matmul(*head_of(program, slice(0, 8))))
    for rank in (1, 4, 7):
        left = torch.linalg.matrix_norm(torch.matmul(*head_of(made, slice(rank, 8))))
        assert float(left) == pytest.approx(float(exact[rank:8].norm()), rel=1e-3)


def test_a_program_that_gives_something_else_is_refused() -> None:
    program, _ = double("llama-gqa")
    name = "model.layers.0.self_attn.v_proj.weight"
    half = {name: rotated("llama-gqa").program.weights[name]}
    with pytest.raises(VerificationError, match="away from what it gave, past the tolerance"):
        difference(program, program.with_weights(half))


def test_weights_stay_in_the_type_in_which_they_are_stored() -> None:
    program = program_of("llama-gqa")
    stored = {name: weight.bfloat16() for name, weight in program.weights.items()}
    narrow = dataclasses.replace(program, weights=stored)
    coupling = coupling_of("llama-gqa")
    groups = [group for group in coupling.groups if group.role == "head-dim"]
    made = rotate(narrow, coupling, groups).program
    assert {weight.dtype for weight in made.weights.values()} == {torch.bfloat16}
    assert 1e-5 < difference(narrow, made) < 5e-2
