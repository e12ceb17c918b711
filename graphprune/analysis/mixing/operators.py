"""What each operator says of the bases in which values are held along an axis.

An operator that is linear along the axis keeps the basis; one that sums products over it needs the
inverse one on the other side; a norm over it needs a basis that keeps lengths. Whatever else meets
the axis, or is not known, is the reason why its units cannot be mixed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphprune.analysis.mixing.places import Bases, Unmixable
from graphprune.analysis.operators.contraction import letters_of
from graphprune.ir.aten import (
    PERMUTES,
    PRODUCTS,
    REPEATS,
    RESHAPES,
    SPLITS,
    is_copy,
    plain_name,
    printed_name,
)
from graphprune.ir.nodes import arguments_of, get_argument

_MASKS = (torch.bool, torch.uint8)

Squares = dict[fx.Node, fx.Node]
"""Values that hold squares -> what they are the squares of."""


def read_node(bases: Bases, node: fx.Node, squares: Squares) -> None:
    """Say what `node` needs of the bases of its operands and of its results.

    Raises
    ------
    Unmixable
        When it is not linear along the axis.
    """
    name, holders = plain_name(node), [n for n in node.all_input_nodes if bases.holds(n)]
    if node.target is operator.getitem:
        _result_of_several(bases, node)
    elif squares.keys() & set(holders):
        _of_squares(bases, node, squares)
    elif holders and bases.types.axes_of.get(node) is None:
        if not name.startswith(("sym_", "_assert")):
            raise Unmixable(_not_linear(node), node)
    elif is_copy(node) or name in RESHAPES | PERMUTES | REPEATS | {"neg"}:
        _moved(bases, node)
    elif name in _SAID:
        _SAID[name](bases, node, squares)
    elif name in SPLITS:
        _split(bases, node)
    elif name in PRODUCTS:
        _product(bases, node, *node.args[:2])  # type: ignore[arg-type]
    elif name not in ("zeros", "zeros_like", "new_zeros"):
        raise Unmixable(_not_linear(node), node)


def _not_linear(node: fx.Node) -> str:
    return f"{printed_name(node.target)} is not known to be linear along it"


def _only(bases: Bases, node: fx.Node, *nodes: Any) -> None:
    """Check that all of `nodes` hold the axis, and that the result does."""
    if not all(map(bases.holds, (node, *nodes))):
        raise Unmixable(f"{printed_name(node.target)} joins it with what lacks it", node)


# -- what moves values -----------------------------------------------------------------------------


def _moved(bases: Bases, node: fx.Node) -> None:
    source: Any = node.args[0]
    _only(bases, node, source)
    if not node.meta["val"].is_floating_point():
        raise Unmixable(f"{printed_name(node.target)} turns it into other numbers", node)
    bases.same(source, node)


def _result_of_several(bases: Bases, node: fx.Node) -> None:
    if bases.holds(node):
        source, which = node.args
        bases.link(bases.holder(source, which).places, bases.holder(node).places)  # type: ignore[arg-type]


def _split(bases: Bases, node: fx.Node) -> None:
    source: Any = node.args[0]
    whole = bases.holder(source)
    if plain_name(node) == "unbind" and whole.dim == _dim(node, source):
        raise Unmixable("single units of it are taken", node)
    pieces = [
        bases.holder(node, at).places if _has(bases, type_) else ()
        for at, type_ in enumerate(bases.types.axes_of[node])
    ]
    if whole.dim != _dim(node, source):
        for places in pieces:
            bases.link(whole.places, places)
    else:
        bases.link(whole.places, [place for places in pieces for place in places])


def _has(bases: Bases, type_: Any) -> bool:
    return any(bases.atom in bases.types.atoms_in(axis) for axis in type_)


def _dim(node: fx.Node, source: fx.Node, name: str = "dim") -> int:
    dim: int = get_argument(node, name) or 0
    return dim % len(source.meta["val"].shape)


def _part(bases: Bases, node: fx.Node, squares: Squares) -> None:
    source: Any = node.args[0]
    whole = bases.holder(source)
    if whole.dim != _dim(node, source):
        bases.link(whole.places, bases.holder(node).places)
        return
    given = arguments_of(node)
    start, step = given.get("start") or 0, given.get("step")
    size, length = (_number(n.meta["val"].shape[whole.dim]) for n in (source, node))
    if plain_name(node) != "slice" or step != 1 or not isinstance(start, int) or size < 0:
        raise Unmixable("a part of it is taken", node)
    if bases.holds(node):
        first = start + (size if start < 0 else 0)
        inside = [
            place
            for place, each in zip(whole.places, whole.occurrences, strict=True)
            if first <= each.offset < first + length
        ]
        bases.link(inside or whole.places, bases.holder(node).places)


def _number(size: Any) -> int:
    """Return a size that is known; -1 for another."""
    return size if isinstance(size, int) else -1


def _joined(bases: Bases, node: fx.Node, squares: Squares) -> None:
    """Concatenated along the axis in turn, or along another one all at once."""
    given: Any = node.args[0]
    parts = [part for part in given if 0 not in map(_number, part.meta["val"].shape)]
    held = [part for part in parts if bases.holds(part)]
    whole, dim = bases.holder(node), get_argument(node, "dim") or 0
    dim %= len(node.meta["val"].shape)
    if plain_name(node) == "cat" and whole.dim == dim:
        places = [place for part in held for place in bases.holder(part).places]
        bases.link(places, whole.places)
    else:
        _only(bases, node, *parts)
        bases.same(node, *held)


def _looked_up(bases: Bases, node: fx.Node, squares: Squares) -> None:
    """Rows of the first operand, picked along other axes."""
    table, *indices = node.all_input_nodes
    _only(bases, node, table)
    where = get_argument(node, "indices")
    dim = bases.holder(table).dim
    several = isinstance(where, list | tuple)
    picked = several and _is_indexed(where, dim)
    along = plain_name(node) == "index_select" and dim == _dim(node, table)
    if picked or along or any(map(bases.holds, indices)):
        raise Unmixable("single units of it are picked", node)
    bases.same(table, node)


def _is_indexed(indices: Any, dim: int) -> bool:
    """Return whether a list of indices, or None, reaches into a dimension; masks take several."""
    at = 0
    for index in indices:
        value = None if index is None else index.meta["val"]
        width = value.ndim if value is not None and value.dtype in _MASKS else 1
        if value is not None and at <= dim < at + width:
            return True
        at += width
    return False


def _added_at(bases: Bases, node: fx.Node, squares: Squares) -> None:
    """Rows that are written or added along another axis."""
    given = arguments_of(node)
    base, added = given["self"], given["source" if "source" in given else "values"]
    _only(bases, node, base, added)
    dim = bases.holder(base).dim
    where = given.get("indices")
    if dim == _dim(node, base) if where is None else _is_indexed(where, dim):
        raise Unmixable("single units of it are written", node)
    bases.same(base, node, added)


def _chosen(bases: Bases, node: fx.Node, squares: Squares) -> None:
    """Values or zeros by a mask that is the same for all units."""
    given = arguments_of(node)
    mask = given.get("condition", given.get("mask"))
    branches = [given[name] for name in ("self", "other", "value") if name in given]
    held = [branch for branch in branches if bases.holds(branch)]
    if bases.holds(mask) or any(branch != 0 for branch in branches if branch not in held):
        raise Unmixable(_not_linear(node), node)
    bases.same(node, *held)


# -- sums and products -----------------------------------------------------------------------------


def _added(bases: Bases, node: fx.Node, squares: Squares) -> None:
    left, right = node.args[:2]
    _only(bases, node, left, right)
    bases.same(node, left, right)  # type: ignore[arg-type]


def _multiplied(bases: Bases, node: fx.Node, squares: Squares) -> None:
    left, right = node.args[:2]
    if left is right and plain_name(node) == "mul":
        _power(bases, node, squares)
        return
    held = [each for each in (left, right) if bases.holds(each)]
    if len(held) == 2:
        raise Unmixable("its units are multiplied one by one", node)
    if plain_name(node) == "div" and (held != [left] or node.kwargs.get("rounding_mode")):
        raise Unmixable(_not_linear(node), node)
    bases.same(node, *held)  # type: ignore[arg-type]


def _power(bases: Bases, node: fx.Node, squares: Squares) -> None:
    squared = plain_name(node) != "pow" or node.args[1] == 2
    if not squared or node in bases.types.written:
        raise Unmixable(_not_linear(node), node)
    squares[node] = node.args[0]  # type: ignore[assignment]


def _of_squares(bases: Bases, node: fx.Node, squares: Squares) -> None:
    """Squares count only where they are summed over the whole axis."""
    square: Any = node.args[0]
    if is_copy(node):
        squares[node] = squares[square]
    elif plain_name(node) in ("mean", "sum") and not bases.holds(node):
        bases.keep_lengths(squares[square])
    else:
        raise Unmixable("squares of its units are used one by one", node)


def _reduced(bases: Bases, node: fx.Node, squares: Squares) -> None:
    if not bases.holds(node):
        raise Unmixable("its units are summed", node)
    bases.same(node.args[0], node)  # type: ignore[arg-type]


def _norm(bases: Bases, node: fx.Node, squares: Squares) -> None:
    order = node.args[1] if len(node.args) > 1 else 2
    if bases.holds(node) or order != 2:
        raise Unmixable(_not_linear(node), node)
    bases.keep_lengths(node.args[0])  # type: ignore[arg-type]


def _rms_norm(bases: Bases, node: fx.Node, squares: Squares) -> None:
    source, gain = get_argument(node, "input"), get_argument(node, "weight")
    _only(bases, node, source)
    if bases.holds(gain):
        raise Unmixable("its units are multiplied one by one", node)
    read_norm(bases, node)
    bases.same(source, node)


def read_norm(bases: Bases, node: fx.Node) -> None:
    """Say that `node` takes a norm, where it is a root mean square over the axis."""
    if plain_name(node) == "rms_norm":
        source = get_argument(node, "input")
        first = len(source.meta["val"].shape) - len(get_argument(node, "normalized_shape"))
        if bases.holder(source).dim < first:
            raise Unmixable("a norm is taken of each of its units", node)
        bases.keep_lengths(source)


# -- contractions ----------------------------------------------------------------------------------


def _product(
    bases: Bases, node: fx.Node, left: fx.Node, right: fx.Node, bias: fx.Node | None = None
) -> None:
    """Read a product that sums over one axis, with what is added to it."""
    held = [each for each in (left, right) if bases.holds(each)]
    if len(held) == 2:
        if not _sums_over(bases, node) or bases.holds(node):
            raise Unmixable("its units are multiplied one by one", node)
        bases.opposite(left, right)
        return
    added = [] if bias is None else [bias]
    _only(bases, node, *held, *added)
    bases.same(node, *held, *added)


def _sums_over(bases: Bases, node: fx.Node) -> bool:
    entries = (entry for entry in bases.types.facts.contractions if entry.node is node)
    return any(bases.atom in bases.types.atoms_in(entry.axis) for entry in entries)


def _affine(bases: Bases, node: fx.Node, squares: Squares) -> None:
    given = arguments_of(node)
    _product(bases, node, given["input"], given["weight"], given["bias"])


def _added_product(bases: Bases, node: fx.Node, squares: Squares) -> None:
    base, left, right = node.args[:3]
    _product(bases, node, left, right, base)  # type: ignore[arg-type]


def _einsum(bases: Bases, node: fx.Node, squares: Squares) -> None:
    operands: Any = get_argument(node, "tensors")
    terms, output = letters_of(
        get_argument(node, "equation"), [len(o.meta["val"].shape) for o in operands]
    )
    held = [
        (t[bases.holder(o).dim], o) for t, o in zip(terms, operands, strict=True) if bases.holds(o)
    ]
    letters = {letter for letter, _ in held}
    if len(held) == 1 and letters <= set(output):
        bases.same(node, held[0][1])
    elif len(held) == 2 and len(letters) == 1 and not letters & set(output):
        bases.opposite(held[0][1], held[1][1])
    else:
        raise Unmixable("its units are multiplied one by one", node)


def _attention(bases: Bases, node: fx.Node, squares: Squares) -> None:
    given: Mapping[str, Any] = arguments_of(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    held = [each for each in (query, key, value) if bases.holds(each)]
    last = all(bases.holder(each).dim == len(each.meta["val"].shape) - 1 for each in held)
    if not last or bases.holds(given.get("attn_mask")):
        raise Unmixable("attention computes with each of its units", node)
    if bases.holds(query) or bases.holds(key):
        bases.opposite(query, key)
    if bases.holds(value):
        bases.same(value, node)


_SAID: Mapping[str, Callable[[Bases, fx.Node, Squares], None]] = {
    **dict.fromkeys(("slice", "select", "narrow"), _part),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("embedding", "index", "index_select"), _looked_up),
    **dict.fromkeys(("index_add", "index_put"), _added_at),
    **dict.fromkeys(("where", "masked_fill"), _chosen),
    **dict.fromkeys(("add", "sub", "rsub"), _added),
    **dict.fromkeys(("mul", "div"), _multiplied),
    **dict.fromkeys(("pow", "square"), _power),
    **dict.fromkeys(("sum", "mean"), _reduced),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm),
    **dict.fromkeys(("addmm", "baddbmm"), _added_product),
    "rms_norm": _rms_norm,
    "linear": _affine,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
