"""Batches on their way through a graph, a numbered layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.matrices import Matrix
from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError
from graphprune.ir.aten import is_mutating
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of, module_path


class Run:
    """One batch on its way through the graph; `last` is the last user of every node."""

    def __init__(
        self, program: Program, batch: Mapping[str, Tensor], last: Mapping[fx.Node, fx.Node]
    ) -> None:
        self.interpreter = fx.Interpreter(program.graph_module, garbage_collect_values=False)
        self.nodes = dict(program.weight_nodes())
        self.values: dict[fx.Node, Any] = {
            node: program.weights[name].detach() for name, node in program.weight_nodes()
        }
        filled = program.fill(batch)
        self.values |= {node: filled[value.name] for value, node in program.input_nodes()}
        self.last = last

    @classmethod
    def all(cls, program: Program, batches: Iterable[Mapping[str, Tensor]]) -> list[Run]:
        """One for each of `batches`."""
        last = {used: node for node in program.graph.nodes for used in node.all_input_nodes}
        return [cls(program, batch, last) for batch in batches]

    @torch.no_grad()
    def step(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Compute `node` from `values`, and add it to them."""
        if node.op not in ("placeholder", "output"):
            self.interpreter.env = values
            values[node] = self.interpreter.run_node(node)

    def advance(self, nodes: Sequence[fx.Node]) -> None:
        """Compute `nodes` for good, and drop what none after them needs."""
        for node in nodes:
            self.step(node, self.values)
        self.forget(nodes)

    def copied(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        """Values for a trial run; copies, where an operator of `nodes` writes into its input."""
        if not any(is_mutating(node) for node in nodes):
            return dict(self.values)
        held = set(self.nodes.values())
        return {
            node: value if node in held or not isinstance(value, Tensor) else value.clone()
            for node, value in self.values.items()
        }

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with other weights."""
        for name, weight in weights.items():
            self.values[self.nodes[name]] = weight

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Drop what no node after `nodes` needs."""
        for node in nodes:
            for used in (*node.all_input_nodes, node):
                if self.last.get(used, node) is node:
                    self.values.pop(used, None)

    def bytes(self, values: Mapping[fx.Node, Any] | None = None) -> int:
        """Memory of its activations, or of those in `values`."""
        weights = set(self.nodes.values())
        return sum(
            value.nbytes
            for node, value in (self.values if values is None else values).items()
            if node not in weights and isinstance(value, Tensor)
        )


def _layer(node: fx.Node) -> str:
    """The path of the numbered layer that `node` belongs to, or ""."""
    return layer_of(module_path(node)) if node.op != "placeholder" else ""


def segments(program: Program, matrices: Sequence[Matrix] = ()) -> list[list[fx.Node]]:
    """The graph's nodes in order, one list for each numbered layer and for what lies between them.

    Nodes of no layer amid those of one go with it. A weight in `matrices` that is used in several
    segments makes them one, with all between.
    """
    layers = [_layer(node) for node in program.graph.nodes]
    last = {layer: at for at, layer in enumerate(layers)}
    first = {layer: layers.index(layer) for layer in last}
    nodes: list[list[fx.Node]] = []
    names: list[str] = []
    for at, (node, layer) in enumerate(zip(program.graph.nodes, layers, strict=True)):
        amid = bool(names and names[-1]) and first[names[-1]] <= at <= last[names[-1]]
        name = names[-1] if not layer and amid else layer
        if not names or name != names[-1]:
            names.append(name)
            nodes.append([])
        nodes[-1].append(node)
    where = {node: at for at, part in enumerate(nodes) for node in part}
    reach = list(range(len(nodes)))
    for weight in {matrix.weight for matrix in matrices}:
        places = [where[u.node] for m in matrices if m.weight == weight for u in m.uses]
        reach[min(places)] = max(reach[min(places)], *places)
    merged: list[list[fx.Node]] = []
    end = -1
    for at, part in enumerate(nodes):
        if at > end:
            merged.append([])
        merged[-1].extend(part)
        end = max(end, reach[at])
    return merged


def unpadded(calibration: Calibration) -> Iterator[dict[str, Tensor]]:
    """The batches without padding: rows of one length together, cut to their tokens.

    Raises
    ------
    CalibrationError
        When a mask is zero between two tokens, or everywhere.
    """
    for index, batch in enumerate(calibration):
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        if mask is None or ids is None or mask.shape != ids.shape or bool(mask.all()):
            yield batch
            continue
        kept = mask.bool()
        counts = kept.sum(1)
        first = kept.int().argmax(1)
        whole = [
            bool(row[start : start + count].all())
            for row, start, count in zip(kept, first.tolist(), counts.tolist(), strict=True)
        ]
        if not bool((counts > 0).all()) or not all(whole):
            raise CalibrationError(
                f"calibration batch {index}: padding must be at the ends of a row that has tokens"
            )
        for start, count in sorted(set(zip(first.tolist(), counts.tolist(), strict=True))):
            rows = (first == start) & (counts == count)
            yield {
                name: tensor[rows][:, start : start + count]
                if tensor.shape[:2] == mask.shape
                else tensor[rows]
                for name, tensor in batch.items()
            }
