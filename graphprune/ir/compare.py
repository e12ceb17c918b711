"""The relative error of two results, and the tolerances: for all that compares two programs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ir.program import Program
from graphprune.ir.provenance import operator_of

_TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# Two ways to compute the same differ by roundings, which add up as a random walk does: after n of
# them, one for each operator that a value goes through, by about sqrt(n) times the unit roundoff,
# which is 2^-11 in float16 and 2^-8 in bfloat16. The bounds allow for some 170 roundings in
# bfloat16 and 400 in float16, the depth of a model of 20 to 40 layers. Wider formats have room to
# spare: what they allow for is sums of thousands of terms in another order, and a wrong unit moves
# an output by a hundred times as much.


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest `relative_error` at which results of this type count as the same."""
    return _TOLERANCES.get(dtype, _TOLERANCES[torch.float32])


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference over the largest finite magnitude of `expected`.

    Entries that are the same infinity, or both NaN, are equal. It is infinite where something
    differs from zeros, from a value that is no number, or from an integer or a boolean.

    Examples
    --------
    >>> relative_error(torch.tensor([100.0, 1.0]), torch.tensor([100.0, 2.0]))
    0.01
    """
    found = found.to(expected.device)
    if not expected.numel() or (expected.dtype is found.dtype and torch.equal(expected, found)):
        return 0.0
    exact = not (expected.is_floating_point() or expected.is_complex())
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(wide), found.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    difference = torch.where(same, 0.0, (a - b).abs()).max().item()
    scale = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
    if exact or not scale or difference != difference:
        return float("inf")
    return difference / scale


def graph_difference(program: Program, other: Program) -> str:
    """Say where two programs compute otherwise, whatever their weights are; "" where they do not.

    Their operators, literals, sizes and constants are compared, and which weights go where. Two
    graphs may differ that give the same.
    """
    ours, theirs = list(program.graph.nodes), list(other.graph.nodes)
    if len(ours) != len(theirs):
        return f"the graphs have {len(ours)} and {len(theirs)} nodes"
    names = [{node: name for name, node in each.weight_nodes()} for each in (program, other)]
    same: dict[fx.Node, fx.Node] = {}
    for node, twin in zip(ours, theirs, strict=True):
        known = names[0].get(node), names[1].get(twin)
        if node.op != twin.op or (node.op != "placeholder" and node.target != twin.target):
            return f"{operator_of(node)} is {operator_of(twin)}"
        if known[0] != known[1]:
            return f"weight {known[0]} is weight {known[1]}"
        arguments = (node.args, node.kwargs), (twin.args, twin.kwargs)
        if not _same_arguments(*arguments, same):
            return f"{operator_of(node)} has other arguments"
        same[node] = twin
    for name, weight in program.weights.items():
        twin_weight = other.weights[name]
        if weight.shape != twin_weight.shape:
            return f"{name} is {tuple(weight.shape)} and {tuple(twin_weight.shape)}"
        if program.kinds[name] == "constant" and not torch.equal(weight, twin_weight):
            return f"the constant {name} has other values"
    return ""


def _same_arguments(ours: Any, theirs: Any, same: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(ours, fx.Node):
        return same.get(ours) is theirs
    if isinstance(ours, tuple | list):
        return (
            isinstance(theirs, tuple | list)
            and len(ours) == len(theirs)
            and all(_same_arguments(a, b, same) for a, b in zip(ours, theirs, strict=True))
        )
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(
            _same_arguments(value, theirs[key], same) for key, value in ours.items()
        )
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)
