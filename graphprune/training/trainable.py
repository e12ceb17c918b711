"""Parameters that can be trained: the weights of a program, as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from graphprune.calibration.logits import Logits, run_to_logits, saves_memory
from graphprune.ir.program import Program

Batch = Mapping[str, Tensor]
"""Inputs of a program by name; the first dimension of each counts samples."""


class Trainable(Protocol):
    """A model to the loop: parameters, logits of a batch, new weights."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The tensors that are trained, by name."""
        ...  # pragma: no cover

    def logits(self, batch: Batch, output: str, training: bool) -> Logits:
        """Return an output on a batch, in the caller's grad mode; dropout where `training`."""
        ...  # pragma: no cover

    def weights(self) -> dict[str, Tensor]:
        """Return the new weights of the program, at their shapes and element types."""
        ...  # pragma: no cover


class AllWeights:
    """Parameters of a program, trained as they are.

    Weights of less than 32 bits have masters of 32, which are rounded wherever they are used.

    Parameters
    ----------
    program
        The program.
    names
        The parameters to train.
    zeros
        Name -> which elements stay as they are, of the weight's shape.
    """

    def __init__(
        self, program: Program, names: Sequence[str], zeros: Mapping[str, Tensor] | None = None
    ) -> None:
        self._program = program
        self._held = {n: weight.detach() for n, weight in program.take(program.weights).items()}
        self.parameters = {name: master(self._held[name]) for name in names}
        for name, zero in (zeros or {}).items():
            if name in self.parameters:
                self.parameters[name].register_hook(without(zero))

    def logits(self, batch: Batch, output: str, training: bool) -> Logits:
        """Return an output; a captured program has no dropout of its own."""
        weights = {**self._held, **self._rounded()}
        with mixed_precision(self._program):
            return run_to_logits(
                self._program, batch, output, weights=weights, again=saves_memory(self._program)
            )

    def weights(self) -> dict[str, Tensor]:
        """Return what the masters are now."""
        return {name: weight.detach().clone() for name, weight in self._rounded().items()}

    def _rounded(self) -> dict[str, Tensor]:
        return {name: each.to(self._held[name].dtype) for name, each in self.parameters.items()}


def master(weight: Tensor) -> Tensor:
    """Copy `weight` to train it, in 32 bits at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype, copy=True).contiguous().requires_grad_()


def without(zero: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a hook of a parameter that leaves the elements `zero` of its gradient out."""
    return lambda gradient: gradient.masked_fill(zero, 0)


def mixed_precision(program: Program) -> AbstractContextManager[Any]:
    """Return the context in which a program is trained: bfloat16 products where it is on a GPU."""
    kind = program.device.type
    return contextlib.nullcontext() if kind == "cpu" else torch.autocast(kind, torch.bfloat16)


def kept_zeros(program: Program, names: Sequence[str]) -> dict[str, Tensor]:
    """Return masks of the exact zeros in those weights of `names` with two dimensions or more.

    Weights without a zero are left out.
    """
    weights = program.take(names)
    zeros = {name: weight == 0 for name, weight in weights.items() if weight.ndim >= 2}
    return {name: zero for name, zero in zeros.items() if bool(zero.any())}
