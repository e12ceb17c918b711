"""Norms of weights: what they run over goes without a change to what stays, or is approximate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm

import graphprune as gp
from graphprune.analysis.groups import Group
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.transforms.apply import apply_plan
from graphprune.verification.verify import verify

HIDDEN, DEAD = 12, (1, 4, 5, 10)


class Standardized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return functional.linear(x, weight / (self.weight.std(1, keepdim=True) + 1e-3), self.bias)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.normalize(self.weight, dim=1), self.bias)


class UnitMean(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(self.weight.pow(2).mean(1, keepdim=True) + 1e-5)
        return functional.linear(x, self.weight * scale, self.bias)


class Twice(Cosine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.linear(x, self.weight)


class Similarity(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T / (x.norm(dim=1, keepdim=True) * self.weight.norm(dim=1) + 1e-3)


KEPT: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(HIDDEN, 6)),
    "weight_norm of all": lambda: parametrizations.weight_norm(nn.Linear(HIDDEN, 6), dim=None),
    "spectral_norm of before": lambda: spectral_norm(nn.Linear(HIDDEN, 6)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(HIDDEN, 6)),
    "standardized": lambda: Standardized(HIDDEN, 6),
    "cosine": lambda: Cosine(HIDDEN, 6),
    "unit mean": lambda: UnitMean(HIDDEN, 6),
}


class Net(nn.Module):
    """Some hidden units are always zero, and weigh much where they go."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(5, HIDDEN), layer(), nn.Linear(6, 3)
        with torch.no_grad():
            self.first.weight[list(DEAD)] = 0
            self.first.bias[list(DEAD)] = 0
            for parameter in self.second.parameters():
                if parameter.ndim == 2 and parameter.shape[1] == HIDDEN:
                    parameter[:, list(DEAD)] *= 5

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


def captured(layer: Callable[[], nn.Module]) -> tuple[Program, Group]:
    program = gp.capture(Net(layer).eval(), (torch.randn(4, 5),))
    return program, next(g for g in gp.analyze(program).groups if "first.bias" in g.weights())


def without(program: Program, group: Group, units: tuple[int, ...]) -> Plan:
    return Plan((Step(program.fingerprint(), (group.cut({(): units}),)),))


@pytest.mark.parametrize("kind", KEPT)
def test_units_that_are_always_zero_go_without_a_trace(kind: str) -> None:
    program, group = captured(KEPT[kind])
    assert group.exactness == "exact"
    plan = without(program, group, DEAD)
    pruned = apply_plan(program, plan)
    x = torch.randn(4, 5)
    torch.testing.assert_close(pruned(x)["output"], program(x)["output"])
    verify(program, plan, pruned)


@pytest.mark.parametrize("kind", KEPT)
def test_later_steps_and_other_units_agree_with_the_masked_reference(kind: str) -> None:
    program, group = captured(KEPT[kind])
    once = apply_plan(program, without(program, group, (0, 7)))
    later = next(g for g in gp.analyze(once).groups if "first.bias" in g.weights())
    other = next(g for g in gp.analyze(once).groups if "third.weight" in g.weights())
    step = Step(once.fingerprint(), (later.cut({(): (3,)}), other.cut({(): (2, 4)})))
    plan = Plan((*without(program, group, (0, 7)).steps, step))
    verify(program, plan, apply_plan(program, plan))


@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm of all"])
def test_the_length_of_a_weight_takes_over_what_its_norm_loses(kind: str) -> None:
    program, group = captured(KEPT[kind])
    pruned = apply_plan(program, without(program, group, (0, 7)))
    assert set(pruned.weights) == set(program.weights)
    smaller = Net(KEPT[kind])
    smaller.first = nn.Linear(5, HIDDEN - 2)
    vector = smaller.second.parametrizations.weight
    vector.original1 = nn.Parameter(vector.original1[:, 2:])
    smaller.load_state_dict(pruned.to_module().state_dict())
    x = torch.randn(4, 5)
    torch.testing.assert_close(smaller(x), pruned(x)["output"])


def test_what_the_norm_does_not_run_over_leaves_it_in_place() -> None:
    program, _ = captured(KEPT["weight_norm"])
    group = next(g for g in gp.analyze(program).groups if "third.weight" in g.weights())
    plan = without(program, group, (1, 2))
    pruned = apply_plan(program, plan)
    assert set(pruned.weights) == set(program.weights)
    verify(program, plan, pruned)


@pytest.mark.parametrize("layer", [Twice, Similarity])
def test_a_norm_that_cannot_be_kept_makes_the_group_approximate(layer: type[nn.Linear]) -> None:
    program, group = captured(lambda: layer(HIDDEN, 6))
    assert group.exactness == "approximate"
    assert group.why.startswith("a norm of second.weight runs over it")
    plan = without(program, group, (0, 7))
    verify(program, plan, apply_plan(program, plan))


def test_a_product_of_two_weights_is_no_norm() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.randn(6, 4))
            self.right = nn.Parameter(torch.randn(4, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.left @ self.right)

    program, group = captured(LowRank)
    types = gp.analyze(program).types
    assert group.exactness == "exact"
    assert types.normalized_weights == ()
    rank = next(
        g for g in gp.analyze(program).groups if "second.left" in g.weights() and g.size == 4
    )
    plan = without(program, rank, (0,))
    verify(program, plan, apply_plan(program, plan))
