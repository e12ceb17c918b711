"""Parameters that can be trained: the weights of a program, as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from graphprune.ir.program import Program

Batch = Mapping[str, Tensor]
"""Inputs of a program by name; the first dimension of each counts samples."""


class Trainable(Protocol):
    """A model to the loop: parameters, outputs on a batch, new weights."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The tensors that are trained, by name."""
        ...  # pragma: no cover

    def run(self, batch: Batch, training: bool) -> dict[str, Tensor]:
        """Return the outputs on a batch, in the caller's grad mode; dropout where `training`."""
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
                self.parameters[name].register_hook(_without(zero))

    def run(self, batch: Batch, training: bool) -> dict[str, Tensor]:
        """Return the outputs; a captured program has no dropout of its own."""
        return self._program.run({**self._held, **self._rounded()}, batch)

    def weights(self) -> dict[str, Tensor]:
        """Return what the masters are now."""
        return {name: weight.detach().clone() for name, weight in self._rounded().items()}

    def _rounded(self) -> dict[str, Tensor]:
        return {name: each.to(self._held[name].dtype) for name, each in self.parameters.items()}


def master(weight: Tensor) -> Tensor:
    """Copy `weight` to train it, in 32 bits at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype, copy=True).contiguous().requires_grad_()


def _without(zero: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(zero, 0)


def kept_zeros(program: Program, names: Sequence[str]) -> dict[str, Tensor]:
    """Return masks of the exact zeros in those weights of `names` with two dimensions or more.

    Weights without a zero are left out.
    """
    weights = {name: program.weights[name].detach() for name in names}
    zeros = {name: weight == 0 for name, weight in weights.items() if weight.ndim >= 2}
    return {name: zero for name, zero in zeros.items() if bool(zero.any())}
