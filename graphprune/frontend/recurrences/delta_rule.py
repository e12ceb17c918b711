"""The delta rule with decay, by chunks whose number is free."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphprune.frontend.recurrences.chunks import in_chunks
from graphprune.frontend.recurrences.operators import delta_recurrence


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute ``S = exp(g) S; S += key (beta (value - key S)); output = query S`` token by token.

    The tokens of a chunk are one step of the state (Yang et al., "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length", 2024, section 3.2).

    Parameters
    ----------
    query, key, value
        Of shape (batch, length, heads, size); there may be more heads of values.
    g
        The logarithm of the decay, for a head or for every place of a key (Kimi Delta Attention).
    beta
        For a head.
    """
    dtype, length, copies = query.dtype, query.shape[1], value.shape[2] // key.shape[2]
    if copies > 1:
        query, key = (each.repeat_interleave(copies, dim=2) for each in (query, key))
    g = g if g.ndim == key.ndim else g[..., None]
    query, key, value, g, beta = (
        in_chunks(each.transpose(1, 2).float(), 2, chunk_size)
        for each in (query, key, value, g, beta[..., None])
    )
    if use_qk_l2norm_in_kernel:
        query, key = _normalized(query), _normalized(key)
    query = query * query.shape[-1] ** -0.5
    decay = g.cumsum(3)
    last = decay[..., -1:, :]
    attention = _scores(query, key, decay)
    solved = _inverse(_scores(key * beta, key, decay))
    values, reads = solved @ (value * beta), solved @ (key * beta * decay.exp())
    written = (key * (last - decay).exp()).transpose(-1, -2)
    before = delta_recurrence(last.exp().transpose(-1, -2), written, values, reads)
    output = (query * decay.exp()) @ before + attention @ (values - reads @ before)
    return output.flatten(2, 3)[:, :, :length].transpose(1, 2).contiguous().to(dtype), None


def _normalized(each: Tensor) -> Tensor:
    return each * torch.rsqrt((each * each).sum(-1, keepdim=True) + 1e-6)


def _scores(query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
    """Return the products of queries and earlier keys of a chunk, decayed in between."""
    size = key.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=key.device).triu(1)
    between = decay.unsqueeze(4) - decay.unsqueeze(3)
    between = between.masked_fill(later[..., None], float("-inf")).exp()
    if decay.shape[-1] == 1:
        return (query @ key.transpose(-1, -2)) * between.squeeze(-1)
    return (query.unsqueeze(4) * key.unsqueeze(3) * between).sum(-1)


def _inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix that has ones for its diagonal.

    Blocks on the diagonal are inverted, then pairs of them: the inverse of ``[[a, 0], [c, b]]`` is
    ``[[1/a, 0], [-(1/b) c (1/a), 1/b]]``. The product over powers of ``1 - matrix`` is as short,
    but where keys are alike the powers grow past what a float holds.
    """
    size = matrix.shape[-1]
    places = torch.arange(size, device=matrix.device)
    inverse, block = torch.eye(size, dtype=matrix.dtype, device=matrix.device), 1
    while block < size:
        own = places // block
        below = (own[:, None] == own + 1) & (own % 2 == 0)
        inverse = inverse - inverse @ (matrix * below) @ inverse
        block *= 2
    return inverse
