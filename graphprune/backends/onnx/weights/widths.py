"""Widths of a program's matrices that blocks have to divide: known before anything is exported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from graphprune.backends.onnx.weights.quantize import Bits, Quantization
from graphprune.backends.onnx.weights.quantizers import check_matrix
from graphprune.ir.aten import PRODUCTS, name_of
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program

_LAST = {
    "linear": ("weight", False),
    "addmm": ("mat2", True),
    "mm": ("mat2", True),
    "matmul": ("other", True),
}
"""Operators -> the argument that may be a matrix of weights, and whether it is transposed."""


def check_widths(program: Program, chosen: Quantization) -> None:
    """Refuse blocks that do not divide the rows of a matrix that is to be quantized.

    A matrix that something else reads than products and embeddings is left to `quantize`.

    Raises
    ------
    UsageError
        Naming the matrix, and a block that does; or when it would have to become two things.
    """
    for name, kind, columns, _ in _matrices(program, chosen):
        if kind != "float":
            check_matrix(name, columns, chosen.block)


def kinds_of(program: Program, chosen: Quantization) -> dict[str, Bits]:
    """Return what each weight of `program` becomes in every model that is made of a part of it.

    What an embedding of one part becomes may follow from the head of another that it is tied to.
    """
    kinds: dict[str, Bits] = dict.fromkeys(program.weights, "float")
    return kinds | {name: kind for name, kind, *_ in _matrices(program, chosen)}


def picked_from(program: Program, chosen: Quantization) -> list[str]:
    """Return the weights whose rows are picked once they are quantized."""
    found = _matrices(program, chosen)
    return [name for name, kind, _, picked in found if picked and kind != "float"]


def _matrices(program: Program, chosen: Quantization) -> Iterator[tuple[str, Bits, int, bool]]:
    """Yield what is only multiplied with and picked from: name, kind, columns, whether picked."""
    head = _head(next(iter(program.output_nodes()))[1])
    for name, node in program.weight_nodes():
        value = node.meta["val"]
        if program.kinds[name] != "parameter" or value.dim() != 2 or not value.is_floating_point():
            continue
        uses = {user: _use(node, user) for user in node.users}
        turned = {use for use in uses.values() if isinstance(use, bool)}
        if not uses or None in uses.values() or len(turned) > 1:
            continue
        heads = [user is head for user, use in uses.items() if isinstance(use, bool)]
        picked = len(heads) < len(uses)
        kind = chosen.becomes(name, heads=heads, picked=picked)
        yield name, kind, int(value.shape[0 if True in turned else 1]), picked


def _use(weight: fx.Node, user: fx.Node) -> Any:
    """Say whether `user` multiplies with a transposed weight; "rows" where it picks rows of it.

    None for whatever else it does.
    """
    name, given = name_of(user), arguments_of(user)
    if name == "embedding" and given["weight"] is weight:
        return "rows"
    if name not in _LAST:
        return None
    argument, turned = _LAST[name]
    return (
        turned if [key for key, value in given.items() if value is weight] == [argument] else None
    )


def _head(node: fx.Node) -> fx.Node | None:
    """Return the product that the first output comes from, but for what is done to each number."""
    while name_of(node) not in PRODUCTS | {"linear", "addmm"}:
        made = [n for n in node.all_input_nodes if n.op == "call_function" and _is_tensor(n)]
        if len(made) != 1:
            return None
        (node,) = made
    return node


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
