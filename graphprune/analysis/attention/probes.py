"""Inputs to run a part of a graph on, in order to find out what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.ir.nodes import size_of
from graphprune.ir.program import PAST, Program


@dataclass(frozen=True)
class Sizes:
    """Sizes to try a graph on."""

    batch: int
    new: int
    past: int


SAMPLE = Sizes(2, 3, 4)


class Prober:
    """Runs parts of a program on sizes of its inputs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._symbols: dict[Sizes, dict[str, int]] = {}
        self.device = program.device
        self.paddings = {
            node for value, node in program.input_nodes() if value.name.endswith("attention_mask")
        }

    def symbols(self, sizes: Sizes) -> dict[str, int]:
        """Every dynamic size of the inputs."""
        if sizes not in self._symbols:
            self._symbols[sizes] = self._symbols_of(sizes)
        return self._symbols[sizes]

    def _symbols_of(self, sizes: Sizes) -> dict[str, int]:
        found: dict[str, int] = {}
        for value in self.program.inputs:
            for dim, symbol in enumerate(value.shape):
                if not isinstance(symbol, str) or symbol in found:
                    continue
                if dim == 0:
                    found[symbol] = sizes.batch
                elif value.name.startswith(PAST):
                    found[symbol] = sizes.past
                elif value.name.endswith("attention_mask") and self.program.is_decoder:
                    found[symbol] = sizes.new + sizes.past
                else:
                    found[symbol] = sizes.new + 2 * value.name.startswith("decoder")
        return found

    def shape(self, node: fx.Node, sizes: Sizes) -> list[int]:
        """Return the sizes of `node`."""
        symbols = self.symbols(sizes)
        return [size_of(size, symbols) for size in node.meta["val"].shape]

    def inputs(self, sizes: Sizes, pad: str = "") -> dict[fx.Node, Tensor]:
        """Return inputs: zeros, and masks that pad the first row on the side of `pad`."""
        found = {}
        for value, node in self.program.input_nodes():
            shape = self.shape(node, sizes)
            if node not in self.paddings:
                zero = torch.zeros((), dtype=value.dtype, device=self.device)
                found[node] = zero.expand(shape)
                continue
            found[node] = torch.ones(shape, dtype=value.dtype, device=self.device)
            if pad == "left":
                found[node][0, :2] = 0
            elif pad == "right":  # of the prompt: what was decoded since stands after its padding
                end = sizes.past or shape[1]
                found[node][0, end - 2 : end] = 0
        return found
