from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import random_plan
from torch import Tensor, nn

import graphprune as gp
from graphprune.ir.program import Program

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.function = function
        self.register_buffer("places", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def captured(function: Callable[[Tensor], Tensor]) -> Program:
    model = Model(function)
    program = gp.capture(model, (X,))
    torch.testing.assert_close(program(X)["output"], model(X))
    return program


def targets(program: Program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def slopes(h: Tensor) -> Tensor:
    return h * torch.pow(torch.tensor(0.5), torch.arange(1, 9, device=h.device))


def test_what_follows_from_counting_is_a_constant_that_loses_units_with_the_rest() -> None:
    program = captured(slopes)
    (name,) = [name for name, kind in program.kinds.items() if kind == "constant"]
    assert torch.equal(program.weights[name], 0.5 ** torch.arange(1.0, 9))
    assert not {"aten.arange.start", "aten.pow.Tensor_Tensor"} & targets(program)
    coupling = gp.analyze(program)
    (group,) = [g for g in coupling.groups if name in g.weights()]
    assert {"a.weight", "b.weight", name} <= set(group.weights())
    plan = random_plan(coupling)
    pruned = gp.apply(program, plan)
    gp.verify(program, plan, pruned)
    kept = [i for i in range(8) if i not in plan.removed[name][0]]
    assert torch.equal(pruned.weights[name], program.weights[name][kept])


def test_a_program_without_weights_has_the_same_constants() -> None:
    with torch.device("meta"):
        model = Model(slopes)
    program = gp.capture(model, (X.to("meta"),))
    assert program.kinds == captured(slopes).kinds
    (name,) = [name for name, kind in program.kinds.items() if kind == "constant"]
    assert torch.equal(program.weights[name], 0.5 ** torch.arange(1.0, 9))


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        pytest.param(lambda h: h + torch.rand(8) * 0, "aten.rand.default", id="chance"),
        pytest.param(lambda h: h + torch.ones(8), "aten.ones.default", id="one value"),
        pytest.param(
            lambda h: h + torch.arange(h.shape[0])[:, None, None],
            "aten.arange.default",
            id="a dynamic size",
        ),
        pytest.param(
            lambda h: h + torch.arange(8.0).add_(h[0, 0].detach()),
            "aten.add_.Tensor",
            id="written in place",
        ),
    ],
)
def test_what_does_not_follow_from_counting_is_computed(
    function: Callable[[Tensor], Tensor], stays: str
) -> None:
    model = Model(function)
    assert stays in targets(gp.capture(model, (X,)))


def test_a_buffer_stays_a_buffer() -> None:
    model = Model(lambda h: h)
    model.function = lambda h: h + model.places.cumsum(0)  # type: ignore[operator, union-attr]
    program = gp.capture(model, (X,))
    assert program.kinds["places"] == "buffer"
    assert "aten.cumsum.default" in targets(program)


@pytest.mark.parametrize(
    ("places", "sizes"),
    [([1, 2, 3], (1, 3, 4)), ([-3, -2, -1], (5, 3)), ([-2], (6, 1, 1)), ([7], (7, 1))],
)
def test_neighbors_picked_by_a_constant_are_a_slice(
    places: list[int], sizes: tuple[int, ...]
) -> None:
    program = captured(lambda h: h + h[..., torch.tensor(places)].sum(-1, keepdim=True))
    assert "aten.slice.Tensor" in targets(program)
    assert "aten.index.Tensor" not in targets(program)
    assert not [name for name, kind in program.kinds.items() if kind == "constant"]
    coupling = gp.analyze(program)
    found = [g.size for g in coupling.groups if "a.weight" in g.weights()]
    assert found == [size for size in sizes if size > 1]
    plan = random_plan(coupling)
    gp.verify(program, plan, gp.apply(program, plan))


def complex_of(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.unflatten(-1, (4, 2)).contiguous())


def turned(h: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(4.0), 0.5 ** torch.arange(4.0))
    rotation = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(complex_of(h) * rotation[None]).flatten(-2)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(turned, id="a rotary embedding"),
        pytest.param(lambda h: complex_of(h).abs().repeat(1, 1, 2), id="absolute values"),
        pytest.param(
            lambda h: torch.view_as_real(torch.conj(complex_of(h)) * 2.5).flatten(-2),
            id="conjugates",
        ),
        pytest.param(
            lambda h: torch.cat([(complex_of(h) + complex_of(h.sin())).real, h[..., :4]], -1),
            id="a sum",
        ),
    ],
)
def test_complex_arithmetic_is_written_in_reals(function: Callable[[Tensor], Tensor]) -> None:
    program = captured(function)
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert not [v for v in values if isinstance(v, Tensor) and v.is_complex()]
    coupling = gp.analyze(program)
    assert [group.size for group in coupling.groups if "a.weight" in group.weights()]
    plan = random_plan(coupling)
    gp.verify(program, plan, gp.apply(program, plan))


def test_complex_arithmetic_that_is_not_known_stays_and_freezes() -> None:
    program = captured(lambda h: torch.view_as_real(complex_of(h).tanh()).flatten(-2))
    assert {"aten.view_as_complex.default", "aten.tanh.default"} <= targets(program)
    assert "has no rule" in gp.analyze(program).explain("a.weight", 0)


def test_operators_of_several_names_go_by_one() -> None:
    program = captured(
        lambda h: torch.concat([h[..., :3].multiply(2), h[..., 3:].subtract_(1)], -1).negative()
    )
    assert {"aten.cat.default", "aten.mul.Tensor", "aten.sub_.Tensor", "aten.neg.default"} <= (
        targets(program)
    )
    assert gp.analyze(program).types.facts.unruled == []


def test_places_out_of_order_stay_picked() -> None:
    program = captured(lambda h: h + h[..., torch.tensor([2, 1])].sum(-1, keepdim=True))
    assert "aten.index.Tensor" in targets(program)
    assert "picked by index" in gp.analyze(program).explain("a.weight", 0)


def test_no_two_uses_are_one_through_a_value_that_is_the_same_everywhere() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (
                nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            offset = torch.zeros(1, 1, 8)
            spread = x[:1, :1, :1].expand(1, 1, 8)
            for layer in (self.first, self.second):
                x = x + layer[2](layer[1](layer[0](x) + offset) * spread)
            return x

    program = gp.capture(Layers(), (X,))
    coupling = gp.analyze(program)
    assert [group.size for group in coupling.groups] == [8, 8]
    plan = random_plan(coupling)
    gp.verify(program, plan, gp.apply(program, plan))


def test_what_is_written_in_place_stays_one() -> None:
    def function(h: Tensor) -> Tensor:
        zeros = torch.zeros(8)
        zeros[:4] += h.mean((0, 1))[:4]
        return h + zeros + zeros.sin()

    program = captured(function)
    assert [str(n.target) for n in program.graph.nodes].count("aten.zeros.default") == 1


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_weight_norm_is_a_direction_and_a_length(dim: int) -> None:
    torch.manual_seed(0)
    inner = nn.utils.parametrizations.weight_norm(
        nn.Linear(8, 8), dim=dim % 2 if dim >= 0 else None
    )
    model = nn.Sequential(nn.Linear(6, 8), inner, nn.Linear(8, 5))
    program = gp.capture(model, (X,))
    torch.testing.assert_close(program(X)["output"], model(X))
    coupling = gp.analyze(program)
    assert not coupling.types.facts.unruled
    assert {(group.size, group.exactness) for group in coupling.groups} == {(8, "exact")}
    assert len(coupling.groups) == 2
    plan = random_plan(coupling)
    gp.verify(program, plan, gp.apply(program, plan))
