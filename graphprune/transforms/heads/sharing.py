"""Key and value heads that agree: closed forms for sharing one head among several.

Heads whose keys or values differ by an invertible map that their queries or outputs can undo are
one head already. For any others, the forms here give the shared head and the maps of its users that
come nearest, from second moments of what the heads computed on calibration data. Keys that are
rotated by their position admit only maps that rotation lets through: within a plane exactly those
that multiply by a complex number, and between planes what is left of a map averaged over distances.

All moments are float64. A head has ``d`` coordinates, a group ``m`` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.calibration.damping import damped

_ROUNDS, _STEPS = 3, 12
"""Rounds of alternating least squares, and steps of conjugate gradients in each where a half-step
has no closed form; more change the loss by less than draws of text do."""


@dataclass(frozen=True)
class Shared:
    """One head for several.

    Parameters
    ----------
    pool
        ``[d, m d]``: makes the shared head of the heads of the group, one after the other.
    factors
        ``[m, d, d]``: head ``u`` is nearly ``factors[u]`` times the shared one.
    error
        What is lost, a sum of squares.
    total
        The sum of squares that there was.
    """

    pool: Tensor
    factors: Tensor
    error: float
    total: float


def shared_subspace(moments: Tensor, weights: Tensor) -> Shared:
    """Return the best shared head: a low-rank approximation of the stacked maps that use the heads.

    Minimises the sum over heads ``u`` of ``E |L_u (x_u - F_u P x)|²`` over P and F_u, where x is
    what all heads computed and ``weights[u] = L_uᵀ L_u``: the Eckart-Young theorem in the metric of
    `moments`.

    Parameters
    ----------
    moments
        ``[m d, m d]``: second moments of what the heads computed, symmetric or Hermitian.
    weights
        ``[m, d, d]``: what the users of each head make of it, as above.
    """
    heads, width = weights.shape[:2]
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=0)
    roots = values.sqrt()
    inverse = torch.where(values > values.max() * 1e-10, 1 / roots.clamp(min=1e-150), 0)
    root = (vectors * roots) @ vectors.mH
    gains, directions = torch.linalg.eigh(root @ torch.block_diag(*weights) @ root)
    kept = directions[:, -width:]
    pool = kept.mH @ ((vectors * inverse) @ vectors.mH)
    factors = (root @ kept).reshape(heads, width, width)
    gains = gains.clamp(min=0)
    return Shared(pool, factors, float(gains[:-width].sum()), float(gains.sum()))


def attended_values(
    moments: Tensor,
    wanted: Tensor,
    pools: Tensor,
    outputs: Tensor,
    group_of: Tensor,
    damp: float,
) -> tuple[Tensor, Tensor]:
    """Return value heads and outputs that come nearest to what all heads together gave.

    What query head ``u`` attends to differs from what others do, so that values are fitted as they
    are attended to: with z_u what ``u`` makes of all value heads of its group g, P_g and O_u
    minimize ``E |y - sum_u O_u P_g z_u|²``. Alternating least squares: outputs in closed form,
    pools by some steps of conjugate gradients.

    Parameters
    ----------
    moments
        ``[u, m d, u, m d]``: second moments of the z_u.
    wanted
        ``[u, m d, out]``: second moments of the z_u with y.
    pools, outputs
        What to begin with, ``[groups, d, m d]`` and ``[u, out, d]``; outputs are drawn to these.
    group_of
        ``[u]``: the group of each query head.
    damp
        What is added to the diagonal when outputs are fitted, as a part of its mean.

    Returns
    -------
    tuple
        Pools and outputs as given.
    """
    users, width = len(wanted), pools.shape[1]
    start = outputs.mT.flatten(0, 1)

    def outputs_of(pools: Tensor) -> Tensor:
        own = pools[group_of]
        half = torch.einsum("uda,uavb->udvb", own, moments)
        gram = torch.einsum("udvb,veb->udve", half, own).reshape(users * width, -1)
        crossed = torch.einsum("uda,uao->udo", own, wanted).flatten(0, 1)
        regular = damped(gram, damp)
        found = start + torch.linalg.solve(regular, crossed - gram @ start)
        return found.unflatten(0, (users, width)).mT

    empty = torch.zeros_like(pools)
    for _ in range(_ROUNDS):
        outputs = outputs_of(pools)
        uses = torch.einsum("uod,voe->udve", outputs, outputs)
        pull = torch.einsum("uod,uao->uda", outputs, wanted)

        def image(pools: Tensor, uses: Tensor = uses) -> Tensor:
            made = torch.einsum("udve,vea->udva", uses, pools[group_of])
            return empty.index_add(0, group_of, torch.einsum("udva,vaub->udb", made, moments))

        pools = _descended(image, empty.index_add(0, group_of, pull), pools)
    return pools, outputs_of(pools)


def _descended(image: Callable[[Tensor], Tensor], wanted: Tensor, start: Tensor) -> Tensor:
    """Return `start` after some steps of conjugate gradients towards ``image(x) = wanted``."""
    found, left = start, wanted - image(start)
    direction, size = left, float(left.square().sum())
    enough = 1e-20 * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        moved = image(direction)
        step = size / float((direction * moved).sum())
        found, left = found + step * direction, left - step * moved
        last, size = size, float(left.square().sum())
        direction = left + size / last * direction
    return found


@dataclass(frozen=True)
class Rotation:
    """The rotation of the coordinates of keys and queries by their positions.

    Parameters
    ----------
    planes
        ``[n, 2]``: pairs of coordinates that are rotated together.
    fixed
        ``[d - 2 n]``: the coordinates that are not rotated.
    turns
        ``[distances, n + d - 2 n]``, complex: what each plane and each fixed coordinate of a key is
        multiplied by, seen from a query so many positions later.
    shares
        ``[distances]``: how often each distance occurs; the sum is 1.
    """

    planes: Tensor
    fixed: Tensor
    turns: Tensor
    shares: Tensor

    @classmethod
    def of(cls, planes: Tensor, fixed: Tensor, turns: Tensor) -> Rotation:
        """With every distance as often as it occurs in a window of so many positions."""
        shares = torch.arange(len(turns), 0, -1, dtype=torch.float64)
        return cls(planes, fixed, turns, shares / shares.sum())

    @property
    def matrices(self) -> Tensor:
        """``[distances, d, d]``: the rotations."""
        count, width = len(self.planes), 2 * len(self.planes) + len(self.fixed)
        found = torch.zeros(len(self.turns), width, width, dtype=torch.float64)
        first, second = self.planes.unbind(1)
        turns = self.turns[:, :count]
        found[:, first, first] = found[:, second, second] = turns.real
        found[:, second, first] = turns.imag
        found[:, first, second] = -turns.imag
        found[:, self.fixed, self.fixed] = self.turns[:, count:].real
        return found


def shared_keys(moments: Tensor, queries: Tensor, rotation: Rotation) -> Shared:
    """Return the best shared key head, each query absorbing its own factor before rotation.

    The start is the best complex rank-one fit of every plane, weighted by the queries' magnitudes
    in it, and the joint low-rank fit of what is not rotated. Then alternating least squares of the
    products of queries and keys, averaged over distances; each half-step is in closed form. Slow
    planes may so stand in for each other.

    Parameters
    ----------
    moments
        ``[m d, m d]``: second moments of the keys before rotation.
    queries
        ``[m, d, d]``: second moments of the queries of each head before rotation.
    rotation
        How positions rotate both.
    """
    heads, width = queries.shape[:2]
    pool = _start(moments, queries, rotation)
    turns, shares = rotation.matrices, rotation.shares[:, None, None]

    def seen(inner: Tensor) -> Tensor:
        return (shares * (turns @ inner @ turns.mT)).sum(0)

    def back(inner: Tensor) -> Tensor:
        return (shares * (turns.mT @ inner @ turns)).sum(0)

    def factors_of(pool: Tensor) -> tuple[Tensor, Tensor]:
        crossed = moments @ pool.mT
        gram = _regular(seen(pool @ crossed))
        each = torch.stack([seen(part) for part in crossed.split(width)])
        return torch.linalg.solve(gram, each.mT).mT, each

    for _ in range(_ROUNDS if len(rotation.planes) else 0):
        factors, _ = factors_of(pool)
        weighed = factors.mT @ queries
        gram = _regular(back((weighed @ factors).sum(0)))
        pool = torch.linalg.solve(gram, torch.cat([back(part) for part in weighed], 1))
        pool = pool / pool.norm().clamp(min=1e-150)
    factors, each = factors_of(pool)
    blocks = [moments[i : i + width, i : i + width] for i in range(0, heads * width, width)]
    total = sum(float((queries[u] * seen(block)).sum()) for u, block in enumerate(blocks))
    kept = float((queries * (factors @ each.mT)).sum())
    return Shared(pool, factors, max(total - kept, 0.0), total)


def rotated_cost(moments: Tensor, queries: Tensor, rotation: Rotation) -> tuple[float, float]:
    """Return the cost of sharing keys before planes help each other, and the sum of squares."""
    parts = [part for _, part in _by_plane(moments, queries, rotation)]
    return sum(part.error for part in parts), sum(part.total for part in parts)


def _by_plane(
    moments: Tensor, queries: Tensor, rotation: Rotation
) -> Iterator[tuple[Tensor, Shared]]:
    """Yield (coordinates, fit) of every plane, complex, and of what is not rotated."""
    heads, width = queries.shape[:2]
    whole = moments.reshape(heads, width, heads, width)
    for plane in rotation.planes:
        a, b = plane.tolist()
        real = whole[:, a, :, a] + whole[:, b, :, b]
        crossed = torch.complex(real, whole[:, b, :, a] - whole[:, a, :, b])
        power = queries[:, a, a] + queries[:, b, b]
        # A query and a key of one plane multiply to half the product of their magnitudes, squared.
        yield plane, shared_subspace(crossed, power[:, None, None].to(crossed.dtype) / 2)
    if len(fixed := rotation.fixed):
        inside = whole[:, fixed][:, :, :, fixed].reshape(heads * len(fixed), -1)
        yield fixed, shared_subspace(inside, queries[:, fixed][:, :, fixed])


def _start(moments: Tensor, queries: Tensor, rotation: Rotation) -> Tensor:
    heads, width = queries.shape[:2]
    pool = torch.zeros(width, heads, width, dtype=torch.float64)
    for at, fit in _by_plane(moments, queries, rotation):
        if fit.pool.is_complex():
            a, b = at.tolist()
            pool[a, :, a] = pool[b, :, b] = fit.pool[0].real
            pool[b, :, a] = fit.pool[0].imag
            pool[a, :, b] = -fit.pool[0].imag
        else:
            pool[at[:, None], :, at] = fit.pool.reshape(len(at), heads, len(at)).permute(0, 2, 1)
    return pool.reshape(width, heads * width)


def _regular(gram: Tensor) -> Tensor:
    """Return `gram` with so much more on its diagonal that it can be inverted."""
    more = gram.diagonal().mean().clamp(min=1e-150) * 1e-6
    return gram + more * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
