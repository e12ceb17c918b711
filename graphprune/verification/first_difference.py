"""Where two programs that should compute the same begin to differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ir.compare import relative_error
from graphprune.ir.interpreter import Hooks, run_program
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of, module_path
from graphprune.verification.draws import Draws
from graphprune.verification.masked_reference import MaskedReference


@torch.no_grad()
def first_difference(
    reference: MaskedReference, program: Program, inputs: Mapping[str, Tensor], allowed: float
) -> str:
    """Return the path of the first numbered layer whose result differs; "" where none can be told.

    What a layer gives can be compared where nothing of its size went: along the residual stream,
    most often. Of the values at the ends of layers that is all that is held.

    Parameters
    ----------
    reference
        The masked original.
    program
        What should compute the same.
    inputs
        What both are run on, without a cache.
    allowed
        The relative error up to which values are the same.
    """
    ends = _ends(program)
    wanted: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any, _: Mapping[fx.Node, Any]) -> Any:
        if node.name in ends and isinstance(value, Tensor):
            wanted[node.name] = value
        return value

    reference.run(inputs, keep)
    differing: list[str] = []

    def compare(node: fx.Node, value: Any, _: Mapping[fx.Node, Any]) -> Any:
        expected = wanted.pop(node.name, None)
        if expected is None or getattr(value, "shape", None) != expected.shape:
            return value
        if not relative_error(expected, value) <= allowed:
            differing.append(ends[node.name])
        return value

    draws = Draws(reference.narrow_draws()) if reference.draws.made else Draws()
    run_program(program, inputs, Hooks(compute=draws.compute, after=compare))
    return next(iter(differing), "")


def _ends(program: Program) -> dict[str, str]:
    """Return the names of the nodes of numbered layers that are read after them -> the layer."""
    layers = {
        node: layer_of(module_path(node))
        for node in program.graph.nodes
        if node.op != "placeholder"
    }
    return {
        node.name: layer
        for node, layer in layers.items()
        if layer and any(layers[user] != layer for user in node.users)
    }
