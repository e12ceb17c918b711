"""A graph cut into segments, one for each numbered layer, that are run one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import fx

from graphprune.analysis.matrices import Matrix
from graphprune.ir.aten import is_mutating, is_view
from graphprune.ir.interpreter import Segment
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of, module_path


def segments(
    program: Program, matrices: Sequence[Matrix] = (), among: Collection[fx.Node] | None = None
) -> list[Segment]:
    """Return what the graph computes, in order, cut at the ends of numbered layers.

    Nodes of no layer amid those of one go with it. What one segment must see as a whole is not
    cut: a weight of `matrices` that is used in several, results that come together (a split's),
    and what is written into.

    Parameters
    ----------
    program
        The program.
    matrices
        Whose weights are used in one segment each.
    among
        The nodes to run, where not all are.
    """
    graph = [
        node
        for node in program.graph.nodes
        if node.op not in ("placeholder", "output") and (among is None or node in among)
    ]
    parts = _by_layer(graph)
    where = {node: at for at, part in enumerate(parts) for node in part}
    reach = list(range(len(parts)))
    for together in (*_uses(matrices), *_results(graph), *_written(graph)):
        positions = [where[node] for node in together if node in where]
        if positions:
            reach[min(positions)] = max(reach[min(positions)], *positions)
    merged: list[list[fx.Node]] = []
    end = -1
    for at, part in enumerate(parts):
        if at > end:
            merged.append([])
        merged[-1].extend(part)
        end = max(end, reach[at])
    return [Segment.of(part) for part in merged]


def _by_layer(graph: Sequence[fx.Node]) -> list[list[fx.Node]]:
    layers = [layer_of(module_path(node)) for node in graph]
    last = {layer: at for at, layer in enumerate(layers)}
    first: dict[str, int] = {}
    for at, layer in enumerate(layers):
        first.setdefault(layer, at)
    nodes: list[list[fx.Node]] = []
    names: list[str] = []
    for at, (node, layer) in enumerate(zip(graph, layers, strict=True)):
        amid = bool(names and names[-1]) and first[names[-1]] <= at <= last[names[-1]]
        name = names[-1] if not layer and amid else layer
        if not names or name != names[-1]:
            names.append(name)
            nodes.append([])
        nodes[-1].append(node)
    return nodes


def _uses(matrices: Sequence[Matrix]) -> Iterator[list[fx.Node]]:
    by_weight: dict[str, list[fx.Node]] = {}
    for matrix in matrices:
        by_weight.setdefault(matrix.weight, []).extend(use.node for use in matrix.uses)
    yield from by_weight.values()


def _results(graph: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Yield what gives several results at once, with what picks them."""
    for node in graph:
        if isinstance(node.meta.get("val"), list | tuple):
            yield [node, *node.users]


def _written(graph: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Yield what is written into, with what writes; views are of what they show."""
    shown: dict[fx.Node, fx.Node] = {}
    for node in graph:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        first = node.all_input_nodes[0]
        if is_mutating(node):
            origin = shown.get(first, first)
            yield [origin, first, node]
        if is_mutating(node) or is_view(node):
            shown[node] = shown.get(first, first)
