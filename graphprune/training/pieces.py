"""A program cut where a single value carries on, such as a residual stream: its branches.

Between two cuts lies what computes the next such value: an attention or an MLP with its norms and
nonlinearity, or a plain layer. A cut is made only where the values that cross it are there in
another program too, of the same sizes, so that a piece can be compared with what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graphprune.calibration.segments import segments
from graphprune.ir.aten import is_mutating
from graphprune.ir.interpreter import ancestors
from graphprune.ir.program import PAST, PRESENT, Program
from graphprune.ir.provenance import stands_for

Pairs = Mapping[fx.Node, fx.Node]
"""Nodes of a program -> those of the original that compute the same value, of the same sizes."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Neighboring nodes of a program, and of the original that it is compared with.

    Parameters
    ----------
    nodes, model
        The nodes of each, in the order of their graphs.
    goals
        Which values the piece is to give, and the original's for them.
    """

    nodes: tuple[fx.Node, ...]
    model: tuple[fx.Node, ...]
    goals: Pairs


def pieces(program: Program, original: Program) -> list[Piece]:
    """Return the pieces of `program`, in order; together they give its outputs but for caches.

    Parameters
    ----------
    program
        What was made of `original`: nodes have kept their names.
    original
        What it is compared with.
    """
    ends = _results(program, original)
    pairs = {**counterparts(program, original), **ends}
    ours, theirs = _Order(program, ends), _Order(original, ends.values())
    found: list[Piece] = []
    start = model_start = 0
    for end in _cuts(program, ours, pairs):
        new = sorted((n for n in ours.live[end] if ours.at(n) >= start), key=ours.at)
        goals = {node: pairs[node] for node in new if _is_smooth(node)}
        model_end = max((theirs.at(node) + 1 for node in goals.values()), default=0)
        if model_end <= model_start or not _is_left(theirs, goals.values(), model_end):
            continue
        nodes, model = ours.nodes[start : end + 1], theirs.nodes[model_start:model_end]
        found.append(Piece(tuple(nodes), tuple(model), goals))
        start, model_start = end + 1, model_end
    rest = {node: other for node, other in ends.items() if _is_smooth(node)}
    found.append(Piece(tuple(ours.nodes[start:]), tuple(theirs.nodes[model_start:]), rest))
    return found


class _Order:
    """The nodes that results need, where each stands, and what is still to be read behind it.

    Only values that parameters or floating inputs have a part in count: masks and positions cross
    everywhere.
    """

    def __init__(self, program: Program, results: Collection[fx.Node]) -> None:
        among = ancestors(list(results))
        self.nodes = [
            node
            for node in program.graph.nodes
            if node in among and node.op not in ("placeholder", "output")
        ]
        self.position = {node: at for at, node in enumerate(self.nodes)}
        parameters = {n for name, n in program.weight_nodes() if program.kinds[name] == "parameter"}
        self.wide = {n for n in parameters if n.meta["val"].ndim > 1}
        inputs = {
            node
            for value, node in program.input_nodes()
            if value.dtype.is_floating_point and not value.name.startswith(PAST)
        }
        self.until = {
            node: max((self.position.get(user, -1) for user in node.users), default=-1)
            for node in (*inputs, *self.nodes)
        }
        self.until |= {node: len(self.nodes) for node in results if node in self.until}
        self.live: list[set[fx.Node]] = []
        counted, held = parameters | inputs, inputs
        for at, node in enumerate(self.nodes):
            if not counted.isdisjoint(node.all_input_nodes):
                counted.add(node)
                held = held | {node}
            held = {each for each in held if self.until[each] > at}
            self.live.append(held)

    def at(self, node: fx.Node) -> int:
        """Return where a node stands; inputs stand before all."""
        return self.position.get(node, -1)


def _cuts(program: Program, order: _Order, pairs: Pairs) -> Iterator[int]:
    """Yield the positions to cut behind, with a matrix between any two.

    Of several between the same matrices it is the last, so that norms go with what they follow.
    """
    last: int | None = None
    matrices = False
    for at, may in enumerate(_may_be_cut(program, order, pairs)):
        if not order.wide.isdisjoint(order.nodes[at].all_input_nodes):
            if matrices and last is not None:
                yield last
            matrices, last = True, None
        if may:
            last = at


def _may_be_cut(program: Program, order: _Order, pairs: Pairs) -> Iterator[bool]:
    """Yield, for each position, whether at most one value crosses that its layer uses up itself."""
    for segment in segments(program, among=order.position.keys()):
        end = order.position[segment.nodes[-1]]
        whole = any(map(is_mutating, segment.nodes))
        for node in segment.nodes:
            at = order.position[node]
            live = order.live[at]
            alone = len(live - order.live[end]) <= 1 and (at == end or not whole)
            yield bool(live) and alone and live <= pairs.keys()


def _is_left(order: _Order, nodes: Collection[fx.Node], end: int) -> bool:
    """Whether something behind `end` reads each of `nodes`, so that they are there at the end."""
    return all(order.until[node] >= end for node in nodes)


def _results(program: Program, original: Program) -> dict[fx.Node, fx.Node]:
    """Return the outputs of `program` that are no caches, and those of `original`."""
    given = {value.name: node for value, node in original.output_nodes()}
    return {
        node: given[value.name]
        for value, node in program.output_nodes()
        if not value.name.startswith(PRESENT) and value.name in given
    }


def counterparts(program: Program, original: Program) -> dict[fx.Node, fx.Node]:
    """Return nodes of `program` -> those of `original`, where both have a value of the same sizes.

    Nodes of what was made of the original have kept their names.
    """
    named = {node.name: node for node in original.graph.nodes}
    return {
        node: named[name]
        for node in program.graph.nodes
        if (name := stands_for(node)) in named
        and _sizes(node)
        and _sizes(node) == _sizes(named[name])
    }


def _sizes(node: fx.Node) -> Sequence[Any]:
    """Return type and sizes of a value, None for dynamic ones; empty where it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return (value.dtype, *(size if isinstance(size, int) else None for size in value.shape))


def _is_smooth(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
