"""Coupled groups as text for other programs: JSON, Graphviz and GraphML."""

from __future__ import annotations

import json
from typing import Any

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.ir.provenance import whereabouts


def to_json(coupling: Coupling, indent: int | None = 1) -> str:
    """Return groups, types of weights and reasons to freeze as JSON text."""
    document = {
        "fingerprint": coupling.program.fingerprint(),
        "groups": [group_data(group) for group in coupling.groups],
        "weights": {
            name: {"shape": list(weight.shape), "type": str(coupling.type_of(name))}
            for name, weight in coupling.program.weights.items()
        },
        "frozen": [
            {"weight": weight, "dim": dim, "why": reason.why, "where": whereabouts(reason.node)}
            for weight, dim, reason in coupling.frozen()
        ],
    }
    return json.dumps(document, indent=indent)


def group_data(group: Group) -> dict[str, Any]:
    """Return a group with its members as plain data."""
    return {
        "name": group.name,
        "size": group.size,
        "role": group.role,
        "exactness": group.exactness,
        "why": group.why,
        "parents": list(group.parents),
        "members": [
            {
                "weight": member.weight,
                "dim": member.dim,
                "offset": member.offset,
                "width": member.width,
                "outer": [list(loop) for loop in member.outer],
                "owner": member.owner,
            }
            for member in group.members
        ],
    }


def to_dot(coupling: Coupling) -> str:
    """Return the bipartite graph of weights and groups in Graphviz' language."""
    lines = ["graph coupling {", "  rankdir=LR;", "  node [fontname=monospace];"]
    for node, data in coupling.graph.nodes(data=True):
        if data["kind"] == "weight":
            lines.append(f'  "{node}" [shape=box, label="{node}\\n{data["type"]}"];')
        else:
            label = f"{node}\\n{data['size']} units, {data['role']}, {data['exactness']}"
            lines.append(f'  "{node}" [shape=ellipse, label="{label}"];')
    for weight, group, data in coupling.graph.edges(data=True):
        dims = ",".join(map(str, data["dims"]))
        lines.append(f'  "{weight}" -- "{group}" [label="{dims}"];')
    return "\n".join([*lines, "}"])


def to_graphml(coupling: Coupling) -> str:
    """Return the bipartite graph as GraphML, with shapes and dimensions as text."""
    import networkx

    plain = coupling.graph.copy()
    for _, data in plain.nodes(data=True):
        if "shape" in data:
            data["shape"] = "x".join(map(str, data["shape"]))
    for _, _, data in plain.edges(data=True):
        data["dims"] = ",".join(map(str, data["dims"]))
    return "\n".join(networkx.generate_graphml(plain))
