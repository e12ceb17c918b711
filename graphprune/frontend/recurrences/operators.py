"""Operators of graphs that go on from place to place along an axis, as often as it is long.

ATen has none but whole recurrent layers. What is written as a loop over tokens is traced once for
each token of the example; one of these stands for the whole loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library


def _linear(update: Tensor, decay: Tensor, dim: int) -> Tensor:
    state = torch.zeros_like(update.select(dim, 0))
    states = []
    for gain, added in zip(decay.unbind(dim), update.unbind(dim), strict=True):
        state = gain * state + added
        states.append(state)
    return torch.stack(states, dim)


def _largest(update: Tensor, decay: Tensor, dim: int) -> Tensor:
    first, *others = update.unbind(dim)
    states = [first]
    for loss, other in zip(decay.unbind(dim)[1:], others, strict=True):
        states.append(torch.maximum(states[-1] + loss, other))
    return torch.stack(states, dim)


def _delta(decay: Tensor, written: Tensor, values: Tensor, reads: Tensor) -> Tensor:
    state = torch.zeros_like(written[..., 0, :, :1] @ values[..., 0, :1, :])
    states = []
    for gain, write, value, read in zip(
        *(each.unbind(-3) for each in (decay, written, values, reads)), strict=True
    ):
        states.append(state)
        state = gain * state + write @ (value - read @ state)
    return torch.stack(states, -3)


@library.custom_op("graphprune::linear_recurrence", mutates_args=())
def linear_recurrence(update: Tensor, decay: Tensor, dim: int) -> Tensor:
    """Return ``h[t] = decay[t] * h[t - 1] + update[t]`` for all `t` along `dim`, from zero on."""
    return _linear(update, decay, dim)


@library.custom_op("graphprune::max_recurrence", mutates_args=())
def max_recurrence(update: Tensor, decay: Tensor, dim: int) -> Tensor:
    """Return ``m[t] = max(m[t - 1] + decay[t], update[t])`` for all `t` along `dim`."""
    return _largest(update, decay, dim)


@library.custom_op("graphprune::delta_recurrence", mutates_args=())
def delta_recurrence(decay: Tensor, written: Tensor, values: Tensor, reads: Tensor) -> Tensor:
    """Return every state before a chunk: ``s = decay * s + written @ (values - reads @ s)``.

    Parameters
    ----------
    decay
        Of shape (..., chunks, keys or 1, 1).
    written, values, reads
        Of shapes (..., chunks, keys, tokens), (..., chunks, tokens, width) and (..., chunks,
        tokens, keys); the result is of (..., chunks, keys, width).
    """
    return _delta(decay, written, values, reads)


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return first.new_empty(first.shape)


linear_recurrence.register_fake(_like_first)
max_recurrence.register_fake(_like_first)


@delta_recurrence.register_fake
def _(decay: Tensor, written: Tensor, values: Tensor, reads: Tensor) -> Tensor:
    return values.new_empty((*written.shape[:-1], values.shape[-1]))


def _trained(operator: Any, loop: Callable[..., Tensor]) -> None:
    """Let gradients of `operator` be those of `loop`, which is run once more to record them."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))
        ctx.others = [each for each in inputs if not isinstance(each, Tensor)]

    def back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            given = [each.detach().requires_grad_() for each in ctx.saved_tensors]
            found = torch.autograd.grad(loop(*given, *ctx.others), given, gradient)
        return (*found, *(None for _ in ctx.others))

    operator.register_autograd(back, setup_context=keep)


_trained(linear_recurrence, _linear)
_trained(max_recurrence, _largest)
_trained(delta_recurrence, _delta)
