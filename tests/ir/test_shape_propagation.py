"""Sizes that are worked out once for all calls that are alike are those that each call gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, library

from graphprune.ir.interpreter import call
from graphprune.ir.shape_propagation import without_values

ATEN = torch.ops.aten
META = torch.device("meta")


def node_of(target: Any) -> fx.Node:
    return fx.Graph().call_function(target)


def looks(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [looks(each) for each in value]
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value), value


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


CALLS = [
    (ATEN.mul.Tensor, (on_meta(2, dtype=torch.int64), 1), {}),
    (ATEN.mul.Tensor, (on_meta(2, dtype=torch.int64), 1.0), {}),
    (ATEN.mul.Tensor, (on_meta(2, dtype=torch.int64), True), {}),
    (ATEN.linear.default, (on_meta(2, 3, 4), on_meta(5, 4)), {}),
    (ATEN.linear.default, (on_meta(2, 3, 4), on_meta(6, 4), on_meta(6)), {}),
    (ATEN.transpose.int, (on_meta(2, 3, 4), 1, 2), {}),
    (ATEN.split.Tensor, (on_meta(5, 2), 2), {}),
    (ATEN.cat.default, ([on_meta(2, 3), on_meta(2, 4)], 1), {}),
    (ATEN.cat.default, ([on_meta(2, 3).mT, on_meta(3, 2)],), {}),
    (ATEN.sum.dim_IntList, (on_meta(2, 3), [1]), {"dtype": torch.float64}),
    (ATEN.sym_size.int, (on_meta(2, 3), 1), {}),
    (ATEN.arange.default, (4,), {"device": META}),
    (ATEN.arange.default, (4,), {"device": torch.device("cpu")}),
    (ATEN.full.default, ([2, 2], 1.5), {"device": META}),
]


@pytest.mark.parametrize(("target", "args", "kwargs"), CALLS)
def test_it_is_what_the_operator_gives(target: Any, args: Any, kwargs: Any) -> None:
    node = node_of(target)
    expected = looks(call(node, args, kwargs))
    for _ in range(2):
        assert looks(without_values(node, args, kwargs)) == expected


def test_values_are_kept() -> None:
    found = without_values(node_of(ATEN.add.Tensor), (torch.ones(2), torch.ones(2)), {})
    assert found.tolist() == [2, 2]


def test_an_operator_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    meta = library.Library("graphprune_asked", "DEF")  # gone with this function
    meta.define("twice(Tensor x) -> Tensor")
    meta.impl("twice", lambda x: asked.append(x) or torch.empty_like(x), "Meta")
    target = torch.ops.graphprune_asked.twice.default
    for size in (2, 3, 2, 3):
        assert without_values(node_of(target), (on_meta(size),), {}).shape == (size,)
    assert [len(x) for x in asked] == [2, 3]


@pytest.mark.parametrize("args", [(on_meta(2), "a"), (on_meta(2), on_meta(3))])
def test_what_an_operator_refuses_is_said_in_its_words(args: Any) -> None:
    node = node_of(ATEN.add.Tensor)
    with pytest.raises(Exception) as expected:
        call(node, args, {})
    with pytest.raises(type(expected.value)) as found:
        without_values(node, args, {})
    assert str(found.value) == str(expected.value)
