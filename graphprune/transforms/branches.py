"""Removing residual branches from a graph: sums become the stream that they were added to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import fx

from graphprune.analysis.experts.ownership import Removal
from graphprune.analysis.residual.branches import Branches
from graphprune.errors import PlanError
from graphprune.ir.nodes import copy_of
from graphprune.ir.program import PAST, PRESENT, Program, Value
from graphprune.ir.provenance import STANDS_FOR, stands_for
from graphprune.ir.shape_propagation import with_graph
from graphprune.plan.steps import Branch
from graphprune.transforms.removal import take_out


def remove_branches(program: Program, removed: Sequence[Branch], branches: Branches) -> Program:
    """Return `program` without some of its residual branches.

    Parameters
    ----------
    program
        The program, which is left as it is.
    removed
        What goes, in order.
    branches
        The branches of `program`.

    Raises
    ------
    PlanError
        When its branches are others, or they cannot all go.
    RewriteError
        When an operator cannot do without them.
    """
    names = [branch.name for branch in removed]
    if branches.records(names) != tuple(removed):
        raise PlanError(f"{names[0]}: the plan's branches and the program's differ")
    absence = branches.without(names)
    graph, new = copy_of(program.graph)
    past = [node for value, node in program.input_nodes() if _key(value) in absence.caches]
    (output,) = graph.find_nodes(op="output")
    kept = [value for value in program.outputs if _key(value) not in absence.caches]
    results = dict(zip(program.outputs, output.args[0], strict=True))
    output.args = (tuple(results[value] for value in kept),)
    for read, (source, dim) in absence.lengths.items():
        new[read].args = (new[source], dim)
    for node, name in _stand_ins(absence.removal).items():
        new[node].meta[STANDS_FOR] = name
    take_out(graph, new, absence.removal)
    for node in past:
        graph.erase_node(new[node])
    inputs = [value for value in program.inputs if _key(value) not in absence.caches]
    narrow = dataclasses.replace(program, inputs=_counted_anew(inputs), outputs=_counted_anew(kept))
    weights = {name: program.weights[name] for name, node in program.weight_nodes() if node in new}
    return with_graph(narrow, graph, weights, {})


def _stand_ins(removal: Removal) -> dict[fx.Node, str]:
    """Return nodes whose value is read as one later sum's alone -> the name of that sum."""
    gone = removal.dead | removal.absorbed.keys()
    chains: dict[fx.Node, list[fx.Node]] = {}
    for node in removal.absorbed:
        chains.setdefault(removal.instead(node), []).append(node)
    return {
        first: stands_for(last)
        for first, (*between, last) in chains.items()
        if gone.issuperset(user for node in (first, *between) for user in node.users)
    }


def _key(value: Value) -> str:
    """Return which part of the cache an input or output is, such as ``3.key``; "" for none."""
    for prefix in (PAST, PRESENT):
        if value.name.startswith(prefix):
            return value.name.removeprefix(prefix)
    return ""


def _counted_anew(values: Iterable[Value]) -> tuple[Value, ...]:
    """Return `values` with the layers of caches numbered from 0 without a gap."""
    values = tuple(values)
    layers = [_key(value).partition(".")[0] for value in values]
    numbers = {layer: str(at) for at, layer in enumerate(dict.fromkeys(filter(None, layers)))}
    found = []
    for value, layer in zip(values, layers, strict=True):
        name = value.name
        if layer:
            prefix = PAST if name.startswith(PAST) else PRESENT
            name = f"{prefix}{numbers[layer]}.{_key(value).partition('.')[2]}"
        found.append(dataclasses.replace(value, name=name))
    return tuple(found)
