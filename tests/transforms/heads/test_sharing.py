"""Closed forms for sharing a head, against what they must give where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphprune.transforms.heads.sharing import (
    Rotation,
    attended_values,
    rotated_cost,
    shared_keys,
    shared_subspace,
)

WIDTH = 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def definite(size: int, seed: int = 0) -> Tensor:
    root = drawn(size, 2 * size, seed=seed)
    return root @ root.mT / (2 * size)


def uses_of(heads: int) -> Tensor:
    return torch.stack([definite(WIDTH, seed=10 + head) for head in range(heads)])


def rotation(planes: int, distances: int = 16) -> Rotation:
    """Planes of coordinates half a head apart, at frequencies of RoPE; the rest stays."""
    at = torch.arange(planes)
    pairs = torch.stack([at, at + WIDTH // 2], 1)
    fixed = torch.tensor([c for c in range(WIDTH) if c not in pairs.flatten()], dtype=torch.long)
    angles = torch.arange(distances, dtype=torch.float64)[:, None] * 0.3 ** (at + 1)
    turns = torch.polar(torch.ones_like(angles), -angles)
    return Rotation.of(pairs, fixed, torch.cat([turns, torch.ones(distances, len(fixed))], 1))


def lost(moments: Tensor, uses: Tensor, pool: Tensor, factors: Tensor) -> float:
    """The sum over heads of E |L (x_u - F P x)|², written out."""
    total = 0.0
    for head, factor in enumerate(factors):
        left = -factor @ pool
        left[:, head * WIDTH : (head + 1) * WIDTH] += torch.eye(WIDTH)
        total += float((uses[head] * (left @ moments @ left.mT)).sum())
    return total


# -- values ---------------------------------------------------------------------------------------


def test_a_shared_subspace_loses_what_the_smallest_singular_values_hold() -> None:
    moments, uses = definite(3 * WIDTH), uses_of(3)
    shared = shared_subspace(moments, uses)
    root = torch.linalg.cholesky(moments)
    stacked = torch.block_diag(*(torch.linalg.cholesky(each).mT for each in uses)) @ root
    squares = torch.linalg.svdvals(stacked).square()
    assert shared.error == pytest.approx(float(squares[WIDTH:].sum()))
    assert shared.total == pytest.approx(float(squares.sum()))
    assert lost(moments, uses, shared.pool, shared.factors) == pytest.approx(shared.error)


def test_heads_that_differ_by_an_invertible_map_share_one_without_loss() -> None:
    maps = torch.cat([torch.eye(WIDTH), drawn(WIDTH, WIDTH), drawn(WIDTH, WIDTH, seed=1)])
    moments = maps.double() @ definite(WIDTH) @ maps.double().mT
    shared = shared_subspace(moments, uses_of(3))
    assert shared.error <= 1e-9 * shared.total
    assert lost(moments, uses_of(3), shared.pool, shared.factors) <= 1e-9 * shared.total


def test_values_are_fitted_as_each_query_attends_to_them() -> None:
    users, out, width = 4, 6, 2 * WIDTH  # two groups of two value heads each
    rows, wanted = drawn(300, users, width, seed=1), drawn(300, out, seed=2)
    wanted = wanted + (rows.flatten(1) @ drawn(users * width, out, seed=3))
    group_of = torch.tensor([0, 0, 1, 1])
    start = torch.eye(width, dtype=torch.float64)[:WIDTH].expand(2, WIDTH, width).contiguous()
    moments = torch.einsum("nua,nvb->uavb", rows, rows)
    crossed = torch.einsum("nua,no->uao", rows, wanted)
    none = torch.zeros(users, out, WIDTH, dtype=torch.float64)
    pools, outputs = attended_values(moments, crossed, start, none, group_of, 1e-9)

    def left(pools: Tensor) -> tuple[float, Tensor]:
        """What the best outputs leave, by least squares on rows."""
        made = torch.einsum("uda,nua->nud", pools[group_of], rows).flatten(1)
        best = torch.linalg.lstsq(made, wanted).solution
        return float((wanted - made @ best).square().sum()), best

    error, best = left(pools)
    torch.testing.assert_close(outputs.mT.flatten(0, 1), best, rtol=1e-4, atol=1e-4)
    # By another way: the same sum of squares, descended by its gradient.
    free = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        made = torch.einsum("uda,nua->nud", free[group_of], rows).flatten(1)
        solved = torch.linalg.solve(made.mT @ made, made.mT @ wanted)
        loss = (wanted - made @ solved).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[arg-type]
    best_error = left(free.detach())[0]
    first = left(start)[0]
    assert error < first - 0.8 * (first - best_error)


def test_heads_of_no_power_share_a_head_of_none() -> None:
    shared = shared_subspace(torch.zeros(2 * WIDTH, 2 * WIDTH).double(), uses_of(2))
    assert not shared.pool.any()
    assert shared.error == shared.total == 0


# -- keys -----------------------------------------------------------------------------------------


def products_lost(
    moments: Tensor, queries: Tensor, turning: Rotation, pool: Tensor, factors: Tensor
) -> float:
    """E (qᵀ R k_u - (Fᵀ q)ᵀ R P k)² over heads and distances, written out."""
    total = 0.0
    for share, turn in zip(turning.shares, turning.matrices, strict=True):
        for head, factor in enumerate(factors):
            left = -factor @ turn @ pool
            left[:, head * WIDTH : (head + 1) * WIDTH] += turn
            total += float(share * (queries[head] * (left @ moments @ left.mT)).sum())
    return total


def test_keys_that_differ_by_a_complex_number_in_every_plane_share_one_without_loss() -> None:
    turning = rotation(2)
    complexes = [(0.8, 0.6), (-1.5, 0.3)]
    other = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for (a, b), (real, imag) in zip(turning.planes.tolist(), complexes, strict=True):
        other[a, a] = other[b, b] = real
        other[a, b], other[b, a] = -imag, imag
    maps = torch.cat([torch.eye(WIDTH).double(), other])
    moments = maps @ definite(WIDTH) @ maps.mT
    cost, total = rotated_cost(moments, uses_of(2), turning)
    shared = shared_keys(moments, uses_of(2), turning)
    assert cost <= 1e-9 * total
    assert shared.error <= 1e-5 * shared.total
    lost = products_lost(moments, uses_of(2), turning, shared.pool, shared.factors)
    assert lost <= 1e-5 * shared.total


@pytest.mark.parametrize("planes", [0, 1, 2])
def test_what_shared_keys_lose_is_what_products_lose_and_less_than_the_mean(planes: int) -> None:
    moments, queries, turning = definite(3 * WIDTH), uses_of(3), rotation(planes)
    shared = shared_keys(moments, queries, turning)
    found = products_lost(moments, queries, turning, shared.pool, shared.factors)
    assert shared.error == pytest.approx(found, rel=1e-3)
    mean = torch.eye(WIDTH).double().repeat(1, 3) / 3
    ones = torch.eye(WIDTH).double().expand(3, WIDTH, WIDTH)
    assert found < 0.8 * products_lost(moments, queries, turning, mean, ones)


def test_keys_without_rotation_share_the_best_subspace() -> None:
    moments, queries = definite(3 * WIDTH), uses_of(3)
    best = shared_subspace(moments, queries)
    shared = shared_keys(moments, queries, rotation(0))
    assert shared.error == pytest.approx(best.error, rel=1e-4)
    assert shared.total == pytest.approx(best.total)


def test_slow_planes_stand_in_for_each_other() -> None:
    """Two planes that hardly turn are nearly four plain coordinates, not two complex ones."""
    moments, queries = definite(2 * WIDTH), uses_of(2)
    slow = rotation(2)
    slow = Rotation.of(slow.planes, slow.fixed, torch.ones_like(slow.turns))
    apart, _ = rotated_cost(moments, queries, slow)
    assert shared_keys(moments, queries, slow).error < 0.8 * apart
