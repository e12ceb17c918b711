"""Permuting the rows of a projection in which queries, keys and values are interleaved.

One projection may hold ``(head [query + key + value])``: its heads are then those of queries and of
keys at once. Where all that is done with its result is to take those parts out of it, its rows can
be permuted to ``[(head query) + (head key) + (head value)]``, and every part cut off in one piece.
That changes no value. What is taken out where is found by running the views of the graph on row
numbers instead of values, so that the proof lies in the numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphprune.ir.aten import CASTS, MOVES, REPEATS, SPLITS, name_of
from graphprune.ir.nodes import copy_of, made_from
from graphprune.ir.program import Program
from graphprune.ir.shape_propagation import with_graph
from graphprune.plan.steps import Permutation
from graphprune.weights.deferred import cut

_ATEN = torch.ops.aten

_MOVING = (MOVES - CASTS - REPEATS) | SPLITS
"""Operators that move values, or take some of them, and compute none."""

_SIZES = (2, 3, 5, 7, 11, 13)
"""Sizes that stand for dynamic ones."""


@dataclass(frozen=True)
class _Rows:
    """The rows of a projection that a node takes.

    Parameters
    ----------
    node
        The node that takes it.
    rows
        Rows of the projection, in the order of `shape`.
    shape
        The dimensions that the rows fill, the slowest row first.
    order
        Which dimension of ``(batch ..., *shape)`` each dimension of `node` is.
    """

    node: fx.Node
    rows: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]


def deinterleave(
    program: Program, weights: Collection[str]
) -> tuple[Program, dict[str, tuple[Permutation, ...]]]:
    """Return `program` with interleaved projections permuted so that every part is one piece.

    Parameters
    ----------
    program
        The program.
    weights
        Names of the weights to look at.

    Returns
    -------
    tuple
        The program, and for each of `weights` that changed how it and its bias are permuted.
        A weight of which no part is taken, or of which something else is read, stays as it is.
    """
    names = {node: name for name, node in program.weight_nodes()}
    found: dict[fx.Node, list[_Rows]] = {}
    permutations: dict[str, tuple[Permutation, ...]] = {}
    for node, name in names.items():
        if name in weights:
            parts = _parts_of(node, names)
            if parts:
                found |= parts
                bias = next(iter(parts)).args[2:]
                rows = tuple(row for run in _runs(next(iter(parts.values()))) for row in run)
                held = (name, *(names[each] for each in bias if each is not None))  # type: ignore[index]
                permutations[name] = tuple(Permutation(each, 0, rows) for each in held)
    if not found:
        return program, {}
    graph, new = copy_of(program.graph)
    for projection, taken in found.items():
        _cut_off(graph, new, projection, taken)
    every = [each for several in permutations.values() for each in several]
    return with_graph(program, graph, permute_weights(program.weights, every), {}), permutations


def permute_weights(
    weights: Mapping[str, Tensor], permutations: Collection[Permutation]
) -> dict[str, Tensor]:
    """Return `weights` with the indices of some permuted, one permutation after the other."""
    found = dict(weights)
    for each in dict.fromkeys(permutations):
        if each.sources != tuple(range(len(each.sources))):
            found[each.weight] = cut(found[each.weight], each.dim, torch.tensor(each.sources))
    return found


# -- finding ------------------------------------------------------------------------------------


def _parts_of(weight: fx.Node, names: Mapping[fx.Node, str]) -> dict[fx.Node, list[_Rows]]:
    """Return every projection with `weight` -> its parts; nothing where they differ."""
    found: dict[fx.Node, list[_Rows]] = {}
    for user in weight.users:
        if user.target is not _ATEN.linear.default or user.args[1] is not weight:
            return {}
        if user.args[0] is weight or not _is_alone(user, names):
            return {}
        found[user] = _parts(user)
    runs = {tuple(_runs(parts)) for parts in found.values()}
    if len(runs) != 1 or len(rows := runs.pop()) < 2:
        return {}
    every = sorted(row for run in rows for row in run)
    whole = list(range(weight.meta["val"].shape[0]))
    return found if every == whole else {}


def _is_alone(projection: fx.Node, names: Mapping[fx.Node, str]) -> bool:
    """Return whether its bias, if any, is added by projections with the same weight alone."""
    weight, *bias = projection.args[1:]
    return all(
        each is None
        or each in names
        and all(other.args[1:] == (weight, each) for other in each.users)  # type: ignore[union-attr]
        for each in bias
    )


def _runs(parts: list[_Rows]) -> Iterator[tuple[int, ...]]:
    """Return the rows of every part, each once."""
    return iter(dict.fromkeys(part.rows for part in parts))


def _parts(projection: fx.Node) -> list[_Rows]:
    """Return what is taken out of the result of `projection`; nothing if more is done with it."""
    symbols: dict[Any, int] = {}
    shape = [_number(size, symbols) for size in projection.meta["val"].shape]
    if len(shape) < 2 or any(size is None or size < 2 for size in shape):
        return []
    whole = torch.arange(torch.Size(shape).numel()).view(shape)  # type: ignore[arg-type]
    pending: list[tuple[fx.Node, Any]] = [(projection, whole)]
    parts: list[_Rows] = []
    while pending:
        node, numbers = pending.pop()
        for user in node.users:
            moved = _moved(user, node, numbers, symbols)
            if moved is None:
                return []
            if not isinstance(moved, Tensor) or moved.numel() == whole.numel():
                pending.append((user, moved))
                continue
            part = _as_part(user, moved, whole) if moved.numel() else None
            if part is None:
                return []
            parts.append(_onward(part, moved, whole, symbols))
    return sorted(parts, key=lambda part: part.rows)


def _onward(part: _Rows, numbers: Tensor, whole: Tensor, symbols: dict[Any, int]) -> _Rows:
    """Return `part` after all that moves the whole of it: heads cut in two are one axis again."""
    node = part.node
    while len(node.users) == 1:
        (user,) = node.users
        moved = _moved(user, node, numbers, symbols)
        if not isinstance(moved, Tensor) or moved.numel() != numbers.numel():
            break
        node, numbers = user, moved
        part = _as_part(node, numbers, whole) or part
    return part


def _number(size: Any, symbols: dict[Any, int]) -> int | None:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        if symbol not in symbols:
            if len(symbols) == len(_SIZES):
                return None
            symbols[symbol] = _SIZES[len(symbols)]
    number = sympy.sympify(expression.xreplace(symbols))
    return int(number) if number.is_Integer else None


def _moved(node: fx.Node, source: fx.Node, numbers: Any, symbols: dict[Any, int]) -> Any:
    """Return what `node` makes of row numbers; None where it does more than move them."""
    moves = node.target is operator.getitem or name_of(node) in _MOVING
    if not moves or node.args[0] is not source:
        return None

    def value(other: fx.Node) -> Any:
        if other is source:
            return numbers
        size = other.meta.get("val")
        number = _number(size, symbols) if isinstance(size, int | torch.SymInt) else None
        if number is None:
            raise ValueError(f"{other} is no size")
        return number

    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError, IndexError):
        return None


def _as_part(node: fx.Node, numbers: Tensor, whole: Tensor) -> _Rows | None:
    """Return the part that `numbers` are: all batch axes, and the same rows everywhere."""
    width, lead = whole.shape[-1], whole.ndim - 1
    first = numbers.flatten()[0]
    batch: dict[int, int] = {}
    rows: list[tuple[int, int]] = []
    for dim, size in enumerate(numbers.shape):
        step = int(numbers.select(dim, 1).flatten()[0] - first) if size > 1 else 0
        axes = [at for at in range(lead) if size > 1 and step == whole.stride(at)]
        if axes and whole.shape[axes[0]] == size:
            batch[axes[0]] = dim
        else:
            rows.append((-step, dim))
    if len(batch) != lead:
        return None
    inside = [dim for _, dim in sorted(rows)]
    front = numbers.permute(*(batch[at] for at in range(lead)), *inside)
    shape = tuple(front.shape[lead:])
    taken = front[(0,) * lead].flatten()
    if int(taken.max()) >= width or not torch.equal(front.flatten(lead), whole[..., taken]):
        return None
    position = {dim: at for at, dim in enumerate([*(batch[at] for at in range(lead)), *inside])}
    order = tuple(position[dim] for dim in range(numbers.ndim))
    return _Rows(node, tuple(taken.tolist()), shape, order)


# -- writing ------------------------------------------------------------------------------------


def _cut_off(
    graph: fx.Graph,
    new: Mapping[fx.Node, fx.Node],
    projection: fx.Node,
    parts: list[_Rows],
) -> None:
    """Let every part be read from one piece of the result."""
    runs = list(_runs(parts))
    lead = projection.meta["val"].ndim - 1
    after = new[projection]
    before = set(after.users)
    with graph.inserting_before(after.next):
        pieces = made_from(after, _ATEN.split_with_sizes.default, after, [len(r) for r in runs], -1)
        for part in parts:
            node = made_from(after, operator.getitem, pieces, runs.index(part.rows))
            if not part.shape:
                node = made_from(after, _ATEN.squeeze.dim, node, lead)
            elif len(part.shape) > 1:
                node = made_from(after, _ATEN.unflatten.int, node, lead, list(part.shape))
            if part.order != tuple(range(len(part.order))):
                node = made_from(after, _ATEN.permute.default, node, list(part.order))
            new[part.node].replace_all_uses_with(node)
    _erase(graph, before)


def _erase(graph: fx.Graph, nodes: Collection[fx.Node]) -> None:
    """Erase `nodes` and what only they lead to."""
    found = dict.fromkeys(nodes)
    pending = list(nodes)
    while pending:
        node = pending.pop()
        for user in node.users:
            if user not in found:
                found[user] = None
                pending.append(user)
    for node in reversed(list(graph.nodes)):
        if node in found and not node.users:
            graph.erase_node(node)
