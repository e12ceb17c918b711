"""Experts that code loops over: what one of them owns goes with it, in whatever form of loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_plan, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.errors import PlanError, RewriteError
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.cost import Costs

EXPERTS, CHOSEN = 4, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.up(x)))
        return out


class Mixture(nn.Module):
    """A router, experts beside a shared one, and a form of combining what they say."""

    def __init__(self, combine: Callable[[Mixture, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(6, 8), nn.Linear(8, 3)
        self.router = nn.Linear(8, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.shared = Expert()
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        weights, chosen = self.router(x).softmax(-1).topk(CHOSEN, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.outside(x + self.shared(x) + self.combine(self, x, weights, chosen))


def equal(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i, expert in enumerate(model.experts):
        out = out + expert(x) * (weights * (chosen == i)).sum(-1, keepdim=True)
    return out


def sparse(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for i in range(EXPERTS):
        slot, token = torch.where(mask[i])
        out.index_add_(0, token, model.experts[i](x[token]) * weights[token, slot, None])
    return out


def put(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i, expert in enumerate(model.experts):
        token, slot = torch.where(chosen == i)
        out[token] += expert(x[token]) * weights[token, slot, None]
    return out


def masked(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i, expert in enumerate(model.experts):
        here = (chosen == i).any(-1)
        out[here] += expert(x[here]) * (weights * (chosen == i)).sum(-1)[here].unsqueeze(-1)
    return out


def conditional(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i, expert in enumerate(model.experts):
        here = (chosen == i) & (weights > 0)
        share = (weights * here).sum(-1, keepdim=True)
        out = torch.where(here.any(-1, keepdim=True), out + expert(x) * share, out)
    return out


def overwritten(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = x
    for i, expert in enumerate(model.experts):
        out = out + expert(x) * (weights * (chosen == i)).sum(-1, keepdim=True)
    out.sub_(x)
    return out


def spread(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], EXPERTS).scatter(-1, chosen, weights)


def sliced(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    gates = spread(x, weights, chosen)
    parts: list[Tensor] = [gates[:, i : i + 1] * e(x) for i, e in enumerate(model.experts)]
    return sum(parts[1:], parts[0])


def apart(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    gates = spread(x, weights, chosen).chunk(EXPERTS, -1)
    parts = [gate * e(x) for gate, e in zip(gates, model.experts, strict=True)]
    return sum(parts[1:], parts[0])


def unbound(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for gate, expert in zip(spread(x, weights, chosen).unbind(-1), model.experts, strict=True):
        out = out + gate.unsqueeze(-1) * expert(x)
    return out


def found(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out, gates = torch.zeros_like(x), spread(x, weights, chosen)
    for i, expert in enumerate(model.experts):
        token = (gates[:, i] > 0).nonzero().squeeze(-1)
        out = out.index_add(0, token, expert(x[token]) * gates[token, i].unsqueeze(-1))
    return out


def stacked(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    parts = torch.stack([expert(x) for expert in model.experts], 1)
    return (parts * spread(x, weights, chosen).unsqueeze(-1)).sum(1)


def joined(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    parts = torch.cat([expert(x).unsqueeze(1) for expert in model.experts], 1)
    return torch.einsum("te,teh->th", spread(x, weights, chosen), parts)


FORMS = [
    equal,
    overwritten,
    sparse,
    put,
    masked,
    conditional,
    sliced,
    apart,
    unbound,
    found,
    stacked,
    joined,
]


@cache
def captured(combine: Any) -> tuple[Mixture, Coupling]:
    model = Mixture(combine)
    return model, gp.analyze(gp.capture(model, (torch.randn(5, 6),)))


def expert_group(coupling: Coupling) -> Group:
    (group,) = [group for group in coupling.groups if group.role == "expert"]
    return group


def plan_of(coupling: Coupling, *cuts: Any) -> Plan:
    return Plan((Step(coupling.program.fingerprint(), tuple(cuts)),))


def never_chosen(model: Mixture, x: Tensor, gone: tuple[int, ...]) -> Tensor:
    """The mixture token by token, with a router that gives `gone` minus infinity."""
    rows = []
    for row in model.inside(x):
        logits = model.router(row)
        logits[list(gone)] = -torch.inf
        weights, chosen = logits.softmax(-1).topk(CHOSEN)
        parts = [model.experts[int(i)](row) * w for w, i in zip(weights, chosen, strict=True)]
        out = torch.stack(parts).sum(0) / weights.sum()
        rows.append(model.outside(row + model.shared(row) + out))
    return torch.stack(rows)


@pytest.mark.parametrize("combine", FORMS)
def test_removal_equals_a_router_that_never_chooses_them(combine: Any) -> None:
    model, coupling = captured(combine)
    group, x = expert_group(coupling), torch.randn(7, 6)
    assert (group.size, group.min_units) == (EXPERTS, CHOSEN)
    for gone in ((3,), (0, 1)):
        plan = plan_of(coupling, group.cut({(): gone}))
        pruned = gp.apply(coupling.program, plan)
        left = {name.split(".")[1] for name in pruned.weights if name.startswith("experts.")}
        assert left == {str(i) for i in range(EXPERTS) if i not in gone}
        with torch.no_grad():
            expected = never_chosen(model, x, gone)
        assert relative_error(expected, pruned(x)["output"]) <= 1e-5
        assert gp.verify(coupling.program, plan, pruned).max_relative_error <= 1e-5


@pytest.mark.parametrize("combine", FORMS)
def test_inside_and_around_experts_everything_stays_prunable(combine: Any) -> None:
    _, coupling = captured(combine)
    names = [f"experts.{i}:ffn" for i in range(EXPERTS)]
    assert {*names, "shared:ffn", "residual"} <= {group.name for group in coupling.groups}
    units = {name: {(): tuple(range(i + 1))} for i, name in enumerate(names)}
    cuts = [coupling.group(name).cut(found) for name, found in units.items()]
    first = plan_of(coupling, *cuts, expert_group(coupling).cut({(): (1,)}))
    once = gp.apply(coupling.program, first)
    again = gp.analyze(once)
    second = random_plan(again)  # experts among them, which are of different sizes now
    assert "expert" in {cut.role for cut in second.steps[0].cuts}
    twice = gp.apply(once, second)
    assert gp.verify(coupling.program, first + second, twice).max_relative_error <= 1e-5


def test_what_an_expert_owns_is_told_and_kept_as_data() -> None:
    _, coupling = captured(sparse)
    group = expert_group(coupling)
    assert group.name == "router:expert"
    lines = str(group).splitlines()
    assert lines[1] == "  router.weight dim 0: 0 + 1*unit"
    assert "  experts.2.up.weight: whole, of unit 2" in lines
    assert len(lines) == 2 + 4 * EXPERTS
    told = coupling.explain("experts.2.down.bias", 0)
    assert "all of it goes with unit 2 of group router:expert" in told
    plan = plan_of(coupling, group.cut({(): (0, 2)}))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.removed["experts.2.up.weight"] == {0: list(range(12))}
    assert all(
        bool(mask.all())
        for n, mask in plan.masks(coupling.program.weights).items()
        if n.startswith("experts.")
    )
    foreign = plan.to_json(indent=None).replace('"owner": 3', '"owner": 4')
    with pytest.raises(PlanError, match="is not all of one unit"):
        Plan.from_json(foreign)


def test_a_weight_that_should_have_gone_is_found() -> None:
    _, coupling = captured(equal)
    group = expert_group(coupling)
    plan = plan_of(coupling, group.cut({(): (0,)}))
    other = gp.apply(coupling.program, plan_of(coupling, group.cut({(): (1,)})))
    with pytest.raises(gp.VerificationError, match="experts"):
        gp.verify(coupling.program, plan, other)


def test_what_is_left_is_equal_in_onnx_runtime(tmp_path: Path) -> None:
    _, coupling = captured(sparse)
    pruned = gp.apply(coupling.program, plan_of(coupling, expert_group(coupling).cut({(): (1,)})))
    report = pruned.export_onnx(tmp_path / "model.onnx")
    assert report.max_relative_error <= 1e-5
    assert report.operators["NonZero"] == EXPERTS - 1


# -- what cannot go -----------------------------------------------------------------------------


def elsewhere(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return equal(model, x, weights, chosen) + model.experts[2](x)


def multiplied(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = x
    for i, expert in enumerate(model.experts):
        out = out * (0.5 + expert(x) * (weights * (chosen == i)).sum(-1, keepdim=True))
    return out


def fed(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = x
    for i, expert in enumerate(model.experts):  # an expert of zeros is not zero: it has a bias
        out = out + expert(x * (weights * (chosen == i)).sum(-1, keepdim=True))
    return out


def doubled(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i, expert in enumerate(model.experts):
        part = x + expert(x) * (weights * (chosen == i)).sum(-1, keepdim=True)
        out = out + part.mul_(2)  # without the expert that would double x itself
    return out


def counted(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return equal(model, x, weights, chosen) * chosen.sum(-1, keepdim=True)


def paired(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    parts = [
        expert(x) * (weights * (chosen == i)).sum(-1, keepdim=True)
        for i, expert in enumerate(model.experts)
    ]
    return model.shared(parts[0] + parts[1]) + parts[2] + parts[3]


def raised(model: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    gates = model.router(x).softmax(-1) + 0.1
    parts: list[Tensor] = [gates[:, i, None] * e(x) for i, e in enumerate(model.experts)]
    return sum(parts[1:], parts[0])


@pytest.mark.parametrize(
    ("combine", "why"),
    [
        (elsewhere, "experts.2.up.weight of its unit 2 is used elsewhere, too, at aten.linear"),
        (multiplied, "its unit 0 does not go by never being chosen, at aten.add.Tensor"),
        (fed, "does not go by never being chosen, at aten.linear.default in experts.0.up"),
        (doubled, "its unit 0 does not go by never being chosen, at aten.add.Tensor"),
        (counted, "its positions are used as numbers, at aten.sum"),
        (paired, "units do not go by never being chosen, at aten.linear.default in shared.up"),
        (raised, "that is not zero when it is never chosen, at aten.select.int"),
    ],
)
def test_what_does_not_go_is_frozen_with_its_operator_and_line(combine: Any, why: str) -> None:
    _, coupling = captured(combine)
    assert [group for group in coupling.groups if group.role == "expert"] == []
    explained = coupling.explain("router.weight", 0)
    assert why in explained
    assert ".py:" in explained.partition(why)[2].splitlines()[0]
    plan = random_plan(coupling)  # and the rest is as it was
    gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))


def test_experts_of_different_kinds_are_frozen() -> None:
    model = Mixture(equal)
    model.experts[1] = nn.Linear(8, 8)
    coupling = gp.analyze(gp.capture(model, (torch.randn(5, 6),)))
    explained = coupling.explain("router.weight", 0)
    assert "its units 0 and 1 have different weights of their own, at aten.eq.Scalar" in explained


def test_no_more_go_than_leave_as_many_as_are_chosen() -> None:
    _, coupling = captured(sparse)
    group = expert_group(coupling)
    with pytest.raises(PlanError, match="2 of its units are chosen at once and must stay"):
        group.cut({(): (0, 1, 2)})
    text = plan_of(coupling, group.cut({(): (0, 1)})).to_json(indent=None)
    spoilt = Plan.from_json(text.replace('"units": [[[], [0, 1]]]', '"units": [[[], [0, 1, 2]]]'))
    with pytest.raises(RewriteError, match="chooses 2 units, and 1 are left"):
        gp.apply(coupling.program, spoilt)


def test_places_of_a_stack_that_nothing_chooses_from_are_frozen() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))
            self.mix = nn.Parameter(torch.randn(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.stack([e(x) for e in self.experts], 1) * self.mix).sum(1)

    coupling = gp.analyze(gp.capture(Stacked(), (torch.randn(5, 6),)))
    assert "positions of a stack" in coupling.explain("mix", 0)


def test_tokens_that_chose_one_go_to_the_others() -> None:
    dense, alone = captured(equal)[1], captured(sparse)[1]
    expert, row = 2 * 8 * 12, 8
    assert Costs(dense).unit("macs", expert_group(dense).name) == expert + row
    assert Costs(alone).unit("macs", expert_group(alone).name) == row
    # Of one token in two places each of four experts has a half, rounded up.
    assert Costs(alone).unit("macs", "experts.1:ffn") == 2 * 8
