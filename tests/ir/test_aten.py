"""What is known of ATen operators."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import graphprune as gp
from graphprune.ir.aten import (
    CASTS,
    COPIES,
    LOOKUPS,
    MOVES,
    PRODUCTS,
    SPLITS,
    is_copy,
    is_mutating,
    is_random,
    is_view,
    name_of,
    plain_name,
    printed_name,
    rule_name,
    uncopied,
)

_ATEN = torch.ops.aten


def _call(target: object, *args: object, **kwargs: object) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), *args), kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(MOVES | SPLITS | PRODUCTS | LOOKUPS))
def test_every_name_is_of_an_operator(name: str) -> None:
    assert hasattr(_ATEN, name)


@pytest.mark.parametrize("name", sorted(COPIES - CASTS - {"pin_memory"}))
def test_copies_keep_every_value_where_it_is(name: str) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(getattr(_ATEN, name).default(x), x)


@pytest.mark.parametrize(
    ("args", "drops"), [((0.5, True), True), ((0.5, False), False), ((0.0, True), False)]
)
@pytest.mark.parametrize("name", ["dropout", "feature_dropout", "alpha_dropout"])
def test_a_dropout_is_looked_through_only_where_it_drops_nothing(
    name: str, args: tuple[float, bool], drops: bool
) -> None:
    node = _call(getattr(_ATEN, name).default, *args)
    by_name = _call(getattr(_ATEN, name).default, p=args[0], train=args[1])
    for each in (node, by_name):
        assert is_copy(each) is not drops
        assert is_random(each) is drops
        assert (uncopied(each) is each) is drops


class _Kept(nn.Module):
    """Weights that go through a dropout that is always at work before their product."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ functional.dropout(self.weight, self.p, training=True).T


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_weight_that_is_dropped_from_is_no_matrix_of_its_product(p: float) -> None:
    from graphprune.analysis.matrices import contractions

    program = gp.capture(_Kept(p).eval(), example_inputs=(torch.randn(2, 4),))
    assert bool(contractions(program).matrices) == (p == 0.0)


def test_what_writes_is_not_its_plain_form() -> None:
    node = _call(_ATEN.squeeze_.dim, 0)
    assert name_of(node) == "squeeze_"
    assert plain_name(node) == "squeeze"
    assert rule_name(node.target) == "squeeze.dim"
    assert rule_name(_ATEN.__and__.Tensor) == "__and__.Tensor"
    assert is_mutating(node)
    assert not is_mutating(_call(_ATEN.detach_.default))
    assert not is_mutating(_call(_ATEN.squeeze.dim, 0))


def test_views_share_memory() -> None:
    assert is_view(_call(_ATEN.transpose.int, 0, 1))
    assert not is_view(_call(_ATEN.clone.default))


def test_names_for_people() -> None:
    assert printed_name(_ATEN.add.Tensor) == "aten.add.Tensor"
    assert printed_name(_call(min).target) == "min"
    assert name_of(_call(min)) == ""
