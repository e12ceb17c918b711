from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import random_plan
from operator_cases import FAMILIES, SHIFTED, VANISHING, Case
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.analysis import operators
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.operators import RULES, table
from graphprune.ir.program import Program

CASES = [(family, name) for family, cases in FAMILIES.items() for name in cases]


class Bench(nn.Module):
    """One operator between two linear layers."""

    def __init__(self, case: Case, summed: bool) -> None:
        super().__init__()
        self.apply_case = case.apply
        self.summed = summed
        self.before = nn.Linear(6, 8)
        self.weights = nn.ParameterList(torch.randn(shape) * 0.5 for shape in case.weights)
        with torch.no_grad():
            width = self.inner(torch.randn(3, 4, 6)).shape[-1]
        self.after = nn.Linear(width, 5)

    def inner(self, x: Tensor) -> Tensor:
        return self.apply_case(self.before(x), *self.weights).to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        result = self.inner(x)
        if self.summed:
            return self.after(result * 0) + result.sum(-1, keepdim=True)
        return self.after(result)


class Benches(nn.Module):
    """All operators of a family beside each other: one capture serves them all."""

    def __init__(self, cases: dict[str, Case], summed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.benches = nn.ModuleList(Bench(case, summed) for case in cases.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(bench(x) for bench in self.benches)


@cache
def analysed(family: str, summed: bool = False) -> Coupling:
    module = Benches(FAMILIES[family], summed)
    return gp.analyze(gp.capture(module.eval(), example_inputs=(torch.randn(3, 4, 6),)))


def first_layer(family: str, name: str) -> str:
    return f"benches.{list(FAMILIES[family]).index(name)}.before.weight"


def sizes_of(coupling: Coupling, weight: str) -> tuple[int, ...]:
    groups = [
        g for g in coupling.groups if any(m.weight == weight and m.dim == 0 for m in g.members)
    ]
    offsets = {
        g.name: min(m.offset for m in g.members if m.weight == weight and m.dim == 0)
        for g in groups
    }
    outermost = sorted(groups, key=lambda g: (offsets[g.name], -g.members[0].width))
    return tuple(group.size for group in outermost)


@pytest.mark.parametrize(("family", "name"), CASES, ids=[name for _, name in CASES])
def test_axes_pass_an_operator_or_are_frozen_by_it(family: str, name: str) -> None:
    coupling, weight = analysed(family), first_layer(family, name)
    case = FAMILIES[family][name]
    assert sizes_of(coupling, weight) == case.keeps
    if case.frozen:
        assert case.frozen in coupling.explain(weight, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_through_operators_equals_zeroing(family: str) -> None:
    coupling = analysed(family)
    for seed in range(2):
        plan = random_plan(coupling, ratio=None, seed=seed)
        gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))


def operators_in(program: Program) -> set[str]:
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return {str(target).removeprefix("aten.").removeprefix("graphprune.") for target in targets}


UNREACHABLE = {
    "split.Tensor": "capture writes its pieces down, unless their number is dynamic",
    "chunk.default": "capture writes its pieces down, unless their number is dynamic",
    "pin_memory.default": "needs an accelerator",
    **dict.fromkeys(
        (
            "eye.default",
            "eye.m",
            "linspace.default",
            "tril_indices.default",
            "triu_indices.default",
        ),
        "capture computes it, unless its size is dynamic",
    ),
    "lift_fresh.default": "capture makes a copy of it",
    "view_as_real.default": "capture writes in reals what complex numbers compute: those are held",
    "unbind.int": "capture takes single positions one by one",
    "squeeze.dim": "capture writes down which dimensions are of size one",
    "squeeze.default": "capture writes down which dimensions are of size one",
}
"""Rules of operators that graphs of this module do not end up with."""


def test_every_rule_has_a_case() -> None:
    tried = set().union(*(operators_in(analysed(family).program) for family in FAMILIES))
    assert set(RULES) - tried == set(UNREACHABLE)


# -- where a result vanishes --------------------------------------------------------------------


@pytest.mark.parametrize("name", VANISHING)
def test_what_vanishes_may_be_summed_over(name: str) -> None:
    coupling = analysed("vanishing", summed=True)
    assert sizes_of(coupling, first_layer("vanishing", name)) == VANISHING[name].keeps


@pytest.mark.parametrize("name", SHIFTED)
def test_what_does_not_vanish_must_not_be_summed_over(name: str) -> None:
    coupling = analysed("shifted", summed=True)
    weight = first_layer("shifted", name)
    assert sizes_of(coupling, weight) == ()
    assert "do not vanish" in coupling.explain(weight, 0)


def test_sums_over_what_vanishes_equal_sums_over_zeros() -> None:
    coupling = analysed("vanishing", summed=True)
    plan = random_plan(coupling, ratio=None)
    gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))


class Between(nn.Module):
    """Any function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(width, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def analyse(function: Callable[[Tensor], Tensor], width: int = 8) -> Coupling:
    module = Between(function, width)
    return gp.analyze(gp.capture(module, example_inputs=(torch.randn(3, 4, 6),)))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: h * F.softplus(h).sum(-1, keepdim=True), id="softplus features"),
        pytest.param(
            lambda h: (F.elu(h) + 1) @ ((F.elu(h) + 1).mT @ h[:, :, :1]).expand(-1, -1, 8) + 0 * h,
            id="linear attention",
        ),
        pytest.param(
            lambda h: (h[..., None] * h.sigmoid()[..., None, :]).sum(-1), id="outer product"
        ),
        pytest.param(lambda h: (h[..., None] + h[..., None, :]).sum(-1), id="outer sum"),
        pytest.param(
            lambda h: (h.mT @ h.sigmoid()).sum(-1)[:, None].expand(-1, 4, -1), id="covariance"
        ),
        pytest.param(
            lambda h: F.pad(h, (0, 0, 1, 1), value=1.0).sum(-1, keepdim=True).expand(-1, -1, 8),
            id="ones beside it",
        ),
        pytest.param(
            lambda h: torch.einsum("bsi,bsj->bij", h, h.cos()).sum(-1)[:, None], id="einsum"
        ),
    ],
)
def test_sums_between_activations_that_do_not_vanish_are_frozen(
    function: Callable[[Tensor], Tensor],
) -> None:
    coupling = analyse(function)
    assert sizes_of(coupling, "a.weight") == ()
    assert "do not vanish" in coupling.explain("a.weight", 0)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: h * h.relu().sum(-1, keepdim=True), id="relu features"),
        pytest.param(lambda h: (h @ h.cos().mT) @ h, id="one side vanishes"),
        pytest.param(lambda h: (h[..., None] * h[..., None, :]).sum(-1) * 0 + h, id="both sides"),
    ],
)
def test_sums_between_activations_that_vanish_are_exact(
    function: Callable[[Tensor], Tensor],
) -> None:
    coupling = analyse(function)
    plan = random_plan(coupling, ratio=None)
    gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))


def test_in_place_operators_are_typed_and_rewritten() -> None:
    def function(h: Tensor) -> Tensor:
        h = h.relu_()
        h[..., :3].add_(0.5)
        return h.mul_(2)

    coupling = analyse(function)
    assert sizes_of(coupling, "a.weight") == (3, 5)
    plan = random_plan(coupling, ratio=None)
    gp.verify(coupling.program, plan, gp.apply(coupling.program, plan))


def test_an_operator_without_a_rule_freezes_with_itself_as_the_reason() -> None:
    coupling = analyse(lambda h: torch.linalg.matrix_exp(h[:, :, :4]), 4)
    explained = coupling.explain("a.weight", 0)
    assert "operator aten.linalg_matrix_exp.default has no rule" in explained
    assert "test_operators.py:" in explained
    assert [str(node.target) for node in coupling.types.facts.unruled] == [
        "aten.linalg_matrix_exp.default"
    ]


def test_axes_that_follow_another_tensor_are_coupled_with_it() -> None:
    coupling = analyse(lambda h: h.mean(-1, keepdim=True).expand_as(h) + 1)
    assert {m.weight for m in coupling.groups[0].members} == {"a.weight", "a.bias", "b.weight"}


def test_the_published_table_is_that_of_the_code() -> None:
    published = Path(operators.__file__).with_name("README.md")
    assert published.read_text(encoding="utf-8") == operators.markdown()


def test_the_table_of_rules_has_a_line_for_each() -> None:
    rows = table()
    names = [row["operator"].partition(".") for row in rows]
    assert [name for *_, name in names] == sorted(RULES)
    assert {namespace for namespace, *_ in names} == {"aten", "graphprune"}
    assert all(row["typing"].strip() and row["zero"].strip() for row in rows)
