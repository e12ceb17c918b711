"""Layer-wise execution: all batches move through a graph together, one numbered layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from graphprune.analysis.matrices import Matrix
from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError
from graphprune.ir.aten import is_mutating
from graphprune.ir.interpreter import (
    Before,
    Hooks,
    Interpreter,
    Memory,
    Segment,
    Values,
    given_of,
    last_uses,
)
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of, module_path


class BatchExecution:
    """One batch on its way through a program's graph, a segment at a time.

    Parameters
    ----------
    program
        The program; its weights are held for as long as a node still reads them.
    batch
        Inputs by name.
    memory
        Counts what activations take.
    last
        The last use of every node: `graphprune.ir.interpreter.last_uses`.
    """

    def __init__(
        self,
        program: Program,
        batch: Mapping[str, Tensor],
        memory: Memory,
        last: Mapping[fx.Node, fx.Node],
    ) -> None:
        weights = {name: weight.detach() for name, weight in program.weights.items()}
        memory.set_aside(weights.values())
        self.values = Values(given_of(program, batch, weights), memory)
        self._nodes = dict(program.weight_nodes())
        self._memory, self._last = memory, last

    @classmethod
    def of_all(
        cls, program: Program, batches: Iterable[Mapping[str, Tensor]], memory: Memory | None = None
    ) -> list[BatchExecution]:
        """Return one for each of `batches`, at the start of the graph."""
        memory, last = memory or Memory(), last_uses(program.graph)
        return [cls(program, batch, memory, last) for batch in batches]

    @torch.no_grad()
    def advance(self, nodes: Sequence[fx.Node], before: Before | None = None) -> None:
        """Compute `nodes`, and drop every value after its last use.

        With `before`, a hook that may look at all values, they are dropped when all are computed.
        """
        if before is None:
            Interpreter(self.values, last_uses=self._last).run(nodes)
            return
        Interpreter(self.values, Hooks(before)).run(nodes)
        for node in nodes:
            for other in (*node.all_input_nodes, node):
                if self._last.get(other) is node:
                    self.values.pop(other, None)

    @torch.no_grad()
    def trial(self, segment: Segment, before: Before | None = None) -> Values:
        """Compute a segment without moving on; the values take memory until they are cleared."""
        values = Values(self.values, self._memory)
        if any(map(is_mutating, segment.nodes)):
            weights = set(self._nodes.values())
            for node in segment.inputs:
                if node not in weights and isinstance(values[node], Tensor):
                    values[node] = values[node].clone()
        Interpreter(values, Hooks(before)).run(segment.nodes)
        return values

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with other weights."""
        self._memory.set_aside(weights.values())
        for name, weight in weights.items():
            self.values[self._nodes[name]] = weight


def _layer(node: fx.Node) -> str:
    """Return the path of the numbered layer that `node` belongs to, or ""."""
    return layer_of(module_path(node)) if node.op != "placeholder" else ""


def segments(program: Program, matrices: Sequence[Matrix] = ()) -> list[Segment]:
    """Return the graph's nodes in order, cut at the ends of numbered layers.

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
        positions = [where[u.node] for m in matrices if m.weight == weight for u in m.uses]
        reach[min(positions)] = max(reach[min(positions)], *positions)
    merged: list[list[fx.Node]] = []
    end = -1
    for at, part in enumerate(nodes):
        if at > end:
            merged.append([])
        merged[-1].extend(part)
        end = max(end, reach[at])
    return [Segment.of(part) for part in merged]


def unpadded(calibration: Calibration) -> Iterator[dict[str, Tensor]]:
    """Yield the batches without padding: rows of one length together, cut to their tokens.

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
