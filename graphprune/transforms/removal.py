"""Taking nodes out of a copy of a graph."""

from __future__ import annotations

from torch import fx

from graphprune.analysis.experts.ownership import Removal


def take_out(graph: fx.Graph, new: dict[fx.Node, fx.Node], removal: Removal) -> None:
    """Take what `removal` says out of a copy of a graph; `new` says what is whose copy."""
    for node in removal.absorbed:
        new[node].replace_all_uses_with(new[removal.instead(node)])
    gone = removal.absorbed.keys() | removal.dead
    for node in [node for node in reversed(new) if node in gone]:
        graph.erase_node(new.pop(node))
