"""Which heads are grouped: those that cost the least to share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from graphprune.transforms.heads.grouping import _exchanged, cheapest, neighbors


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).abs()


def planted(groups: list[tuple[int, ...]]) -> Tensor:
    heads = sum(map(len, groups))
    costs = 1 + drawn(heads, heads) / 10
    for group in groups:
        for a, b in itertools.product(group, group):
            costs[a, b] = 0.1
    return (costs + costs.mT) / 2


@pytest.mark.parametrize(
    "groups",
    [
        [(0, 5), (1, 4), (2, 7), (3, 6)],
        [(0, 2, 5, 7), (1, 3, 4, 6)],
        [tuple(range(8))],
        [(at, at + 16) for at in range(16)],
    ],
)
def test_heads_that_cost_little_together_are_found(groups: list[tuple[int, ...]]) -> None:
    assert cheapest(planted(groups), len(groups)) == tuple(groups)


def test_exchanges_never_end_worse_than_neighbors() -> None:
    costs = drawn(12, 12)
    costs = costs + costs.mT

    def cost(way: tuple[tuple[int, ...], ...]) -> float:
        return sum(float(costs[a, b]) for g in way for a, b in itertools.combinations(g, 2))

    start = neighbors(12, 4)
    assert start == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
    found = _exchanged(start, costs.tolist())
    assert sorted(head for group in found for head in group) == list(range(12))
    assert cost(found) < cost(start)
