"""Random inputs that fit a program: what verification and back ends run it on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from graphprune.ir.aten import name_of
from graphprune.ir.program import PAST, Program, Value

_BATCH, _LENGTH = 2, 7


def random_inputs(
    program: Program, *, seed: int = 0, batch: int = _BATCH, length: int = _LENGTH
) -> dict[str, Tensor]:
    """Random inputs for every input but caches and attention masks, which fill themselves in.

    Parameters
    ----------
    program
        The program.
    seed
        Same seed, same inputs.
    batch, length
        Sizes of dynamic dimensions: the first, and all others.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for value, node in program.input_nodes():
        if value.name.startswith(PAST) or value.name.endswith("attention_mask"):
            continue
        sizes = [
            program.within(size, batch if dim == 0 else length)
            for dim, size in enumerate(value.shape)
        ]
        inputs[value.name] = _random(value, node, sizes, generator)
    return inputs


def _random(value: Value, node: fx.Node, sizes: list[int], generator: torch.Generator) -> Tensor:
    if value.dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(value.dtype)
    if value.dtype is torch.bool:
        return torch.ones(sizes, dtype=torch.bool)
    rows = _table_rows(node)
    return torch.randint(0, rows, sizes, generator=generator, dtype=value.dtype)


def _table_rows(node: fx.Node) -> int:
    """Rows of the smallest table that an input of indices picks from (2 when it is none)."""
    rows = [
        user.args[0].meta["val"].shape[0]
        for user in node.users
        if name_of(user) == "embedding" and isinstance(user.args[0], fx.Node)
    ]
    return min(rows, default=2)


def continuation(
    program: Program, inputs: Mapping[str, Tensor], seed: int = 1
) -> dict[str, Tensor]:
    """One more token for every row of a decoder's `inputs`."""
    rows = len(inputs["input_ids"])
    return random_inputs(program, seed=seed, batch=rows, length=1)
