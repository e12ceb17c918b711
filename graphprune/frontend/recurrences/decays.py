"""Recurrences of a state that only decays from token to token, place by place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphprune.frontend.recurrences.chunks import padded
from graphprune.frontend.recurrences.operators import linear_recurrence, max_recurrence


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> Tensor:
    """Compute the selective state space of Mamba (Gu and Dao, 2023, algorithm 2)."""
    dtype = hidden_states.dtype
    step = _step(dt, delta_bias if delta_bias is None else delta_bias[:, None], delta_softplus)
    step = step.transpose(1, 2)[..., None]
    written = step * B.transpose(1, 2)[:, :, None].float()
    written = written * hidden_states.transpose(1, 2)[..., None].float()
    states = linear_recurrence(written, torch.exp(A * step), 1)
    output = (states.to(dtype) @ C.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
    if D is not None:
        output = output + hidden_states * D[None, :, None]
    return output if z is None else output * F.silu(z)


def chunked(chunk_scan: Callable[..., Any]) -> Callable[..., Any]:
    """Return `chunk_scan`, the state space duality of Mamba 2, for whole chunks, and several.

    It has one form for any number of them, but pads to whole ones by conditions on the length.
    Steps of no time change nothing.
    """

    def scanned(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **_: Any,
    ) -> Tensor:
        length = hidden_states.shape[1]
        dt = torch.clamp(_step(dt, dt_bias, dt_softplus), *dt_limit)
        hidden_states, dt, B, C = (
            padded(each, 1, chunk_size) for each in (hidden_states, dt, B, C)
        )
        output: Tensor = chunk_scan(hidden_states, dt, A, B, C, chunk_size, D=D)
        return output[:, :length]

    return scanned


def _step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def gated_recurrence(
    _: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: None = None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute the real-gated linear recurrent unit (De et al., "Griffin", 2024, equation 4)."""
    decay = (recurrent_gate * ~reset).to(acc_dtype)
    states = linear_recurrence(hidden_states.to(acc_dtype), decay, 1)
    return states.to(hidden_states.dtype), states[:, -1]


def weighted_average(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Compute the WKV of RWKV-4 (Peng et al., "RWKV", 2023, equation 14).

    Numerator and denominator are divided by the exponential of the largest logarithm of a weight
    so far; what that is changes no quotient.
    """
    keys = key.float()
    decay = (-torch.exp(time_decay)).expand_as(keys)
    largest = max_recurrence(keys.detach(), decay.detach(), 1)
    before = torch.cat([torch.full_like(largest[:, :1], -1e38), largest[:, :-1]], 1)
    fade, weight = torch.exp(before + decay - largest), torch.exp(keys - largest)
    numerator = linear_recurrence(weight * value, fade, 1)
    denominator = linear_recurrence(weight, fade, 1)
    now = torch.maximum(before, keys + time_first)
    old, new = torch.exp(before - now), torch.exp(keys + time_first - now)
    over = old * _one_later(numerator) + new * value
    return (over / (old * _one_later(denominator) + new)).to(key.dtype), None


def _one_later(value: Tensor) -> Tensor:
    return F.pad(value, (0, 0, 1, 0))[:, :-1]
