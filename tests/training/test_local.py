"""Local training against a plain loop over two modules; what it keeps, and what it leaves alone."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.errors import TrainingError
from graphprune.ir.program import Program
from graphprune.pipeline.pass_manager import Result
from graphprune.training.local import relative_error, train_locally
from graphprune.weights.placement import Placement

ROWS, LENGTH, WIDTH, UNITS = 9, 4, 6, 16


class Branch(nn.Module):
    """A stream, and what a gated MLP adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.gate, self.up = (nn.Linear(WIDTH, UNITS, bias=False) for _ in range(2))
        self.down = nn.Linear(UNITS, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Branch() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@cache
def stream() -> tuple[Stream, Program, Tensor]:
    torch.manual_seed(0)
    model, data = Stream().eval(), torch.randn(ROWS, LENGTH, WIDTH)
    return model, gp.capture(model, example_inputs=(data,)), data


def calibration(program: Program, data: Tensor) -> Calibration:
    return Calibration.from_batches([{program.inputs[0].name: data}])


@cache
def pruned() -> Result:
    _, program, data = stream()
    names = ",".join(g.name for g in gp.analyze(program).groups if g.size == UNITS)
    pipeline = gp.Pipeline.parse(f"prune{{target={names} ratio=0.25 criterion=l2}}")
    return pipeline.run(program, calibration=calibration(program, data))


def cut(model: Stream, result: Result) -> Stream:
    """Cut the module itself."""
    model = copy.deepcopy(model)
    for name, dims in result.plan.removed.items():
        weight = model.get_parameter(name)
        for dim, gone in dims.items():
            left = [at for at in range(weight.shape[dim]) if at not in gone]
            weight.data = weight.data.index_select(dim, torch.tensor(left))
    return model


def error_of(found: Tensor, wanted: Tensor) -> Tensor:
    sizes = (wanted**2).mean(-1)
    return (((found - wanted) ** 2).mean(-1) / sizes.clamp(min=sizes.mean().item() / 100)).mean()


def trained_plainly(model: Stream, small: Stream, x: Tensor, steps: int, lr: float) -> Stream:
    """Train every branch by itself; the last row is held out, and looked at eight times."""
    given = x
    for branch, teacher in zip(small.layers, model.layers, strict=True):
        wanted = teacher(x).detach()
        sizes = {p: p.square().mean().sqrt().item() for p in branch.parameters()}
        best = error_of(branch(given[-1:]), wanted[-1:]).item()
        state, part, optimizer = copy.deepcopy(branch.state_dict()), 1.0, adamw(branch)
        for step in range(steps):
            for group in optimizer.param_groups:
                rate = min(1, 10 * (step + 1) / steps) * (1 - step / steps)
                group["lr"] = lr * part * rate * sizes[group["params"][0]]
            optimizer.zero_grad()
            error_of(branch(given[:-1]), wanted[:-1]).backward()
            optimizer.step()
            if (step + 1) % (steps // 8) == 0:
                error = error_of(branch(given[-1:]), wanted[-1:]).item()
                if error < best:
                    best, state = error, copy.deepcopy(branch.state_dict())
                else:
                    branch.load_state_dict(state)
                    part, optimizer = part / 3, adamw(branch)
        branch.load_state_dict(state)
        given, x = branch(given).detach(), wanted
    return small


def adamw(branch: nn.Module) -> torch.optim.AdamW:
    groups = [{"params": [each]} for each in branch.parameters()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)


def test_it_is_a_plain_loop_over_the_branches() -> None:
    model, program, data = stream()
    found = train_locally(pruned().program, program, calibration(program, data), steps=16, lr=0.2)
    expected = trained_plainly(model, cut(model, pruned()), data, steps=16, lr=0.2).state_dict()
    assert list(found.errors) == ["layers.0", "layers.1"]
    assert all(after < 0.9 * before for before, after in found.errors.values())
    assert found.weights.keys() == expected.keys()
    for name, weight in found.weights.items():
        assert torch.allclose(weight, expected[name], rtol=1e-4, atol=1e-6), name


def test_a_rate_that_only_does_harm_changes_nothing() -> None:
    _, program, data = stream()
    found = train_locally(pruned().program, program, calibration(program, data), steps=4, lr=100.0)
    assert not found.weights
    assert all(before == after for before, after in found.errors.values())


def test_what_nothing_was_done_to_is_not_trained() -> None:
    _, program, data = stream()
    found = train_locally(program, program, calibration(program, data), steps=4, lr=0.1)
    assert not found.weights and not found.errors
    name = "layers.0.down.weight"
    changed = program.with_weights({name: program.weights[name] * 1.1})
    found = train_locally(changed, program, calibration(program, data), steps=4, lr=0.01)
    assert list(found.errors) == ["layers.0"]


def test_a_weight_that_others_use_too_stays_as_it_is() -> None:
    _, _, data = stream()
    twice = Stream().eval()
    twice.layers[1] = twice.layers[0]
    program = gp.capture(twice, example_inputs=(data,))
    name = "layers.0.down.weight"
    changed = program.with_weights({name: program.weights[name] * 1.1})
    found = train_locally(changed, program, calibration(program, data), steps=2, lr=0.01)
    assert not found.weights and not found.errors
    assert name in found.shared


def test_under_a_limit_of_memory_it_gives_the_same_bits_in_the_stored_type() -> None:
    _, program, data = stream()
    start = pruned().program
    narrow = {name: weight.bfloat16() for name, weight in start.weights.items()}
    stored = dataclasses.replace(start, weights=narrow)
    given = calibration(program, data)
    free = train_locally(stored, program, given, steps=8, lr=0.03)
    assert {weight.dtype for weight in free.weights.values()} == {torch.bfloat16}
    limited = dataclasses.replace(stored, placement=Placement(memory=4000))
    found = train_locally(limited, program, given, steps=8, lr=0.03)
    assert found.errors == free.errors
    for name, weight in free.weights.items():
        assert torch.equal(found.weights[name][:], weight), name


def test_one_sample_is_too_few() -> None:
    _, program, data = stream()
    with pytest.raises(TrainingError, match="one sample is too little"):
        train_locally(pruned().program, program, calibration(program, data[:1]), steps=1, lr=0.1)


def test_a_large_row_does_not_drown_the_others() -> None:
    wanted = torch.tensor([[1000.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    others, large = wanted.clone(), wanted.clone()
    others[1:, 1], large[0, 1] = 0.5, 5.0
    assert relative_error(others, wanted) > relative_error(large, wanted) > 0
    assert relative_error(wanted, wanted) == 0
