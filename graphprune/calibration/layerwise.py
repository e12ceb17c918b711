"""Layer-wise execution: all batches move through a graph together, one numbered layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.calibration.data import Calibration
from graphprune.calibration.logits import Logits, WholeLogits, ending, run_to_logits
from graphprune.calibration.segments import segments
from graphprune.errors import CalibrationError
from graphprune.ir.aten import is_mutating
from graphprune.ir.interpreter import (
    Before,
    Hooks,
    Interpreter,
    Memory,
    Segment,
    Values,
    ancestors,
    call,
    last_uses,
)
from graphprune.ir.program import Program
from graphprune.weights.deferred import Deferred


class SegmentWeights:
    """The weights of a program as its graph computes with them, one segment's at a time.

    Parameters
    ----------
    program
        The program; its weights may lie in files, in another type, or on another device.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.names = {node: name for name, node in program.weight_nodes()}
        self._replaced: dict[str, Tensor] = {}
        self._held: dict[fx.Node, Tensor] = {}

    def of(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, Tensor]:
        """Return the weights that `nodes` read or are; others are let go."""
        read = dict.fromkeys(each for node in nodes for each in (node, *node.all_input_nodes))
        wanted = [node for node in read if node in self.names]
        missing = [self.names[node] for node in wanted if node not in self._held]
        held = {node: self._held[node] for node in wanted if node in self._held}
        self._held = {}  # what is not wanted any more goes before more is read
        taken = {name: self._replaced[name] for name in missing if name in self._replaced}
        taken |= self._program.take(name for name in missing if name not in taken)
        for node in wanted:
            if node not in held:
                held[node] = taken[self.names[node]].detach()
        self._held = held
        return held

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with other weights."""
        device = self._program.device
        for name, weight in weights.items():
            self._replaced[name] = weight.detach().to(device, self._program.compute_types[name])
        self._held = {n: w for n, w in self._held.items() if self.names[n] not in weights}

    def room(self, parts: Sequence[Iterable[fx.Node]]) -> int | None:
        """Return the bytes that the program's limit of memory leaves beside weights.

        Raises
        ------
        CalibrationError
            When it leaves none: the weights of the largest of the segments `parts` take more.
        """
        limit = self._program.placement.memory
        if limit is None:
            return None
        weights, types = self._program.weights, self._program.compute_types
        needed = 0
        for nodes in parts:
            read = {self.names.get(n) for node in nodes for n in (node, *node.all_input_nodes)}
            sizes = (weights[n].numel() * types[n].itemsize for n in read if n is not None)
            needed = max(needed, sum(sizes))
        if needed >= limit:
            raise CalibrationError(
                f"memory: the weights of one layer take {needed / 2**20:.4g} MiB, and "
                f"{limit / 2**20:.4g} MiB are allowed"
            )
        return limit - needed


class BatchExecution:
    """One batch on its way through a program's graph, a segment at a time.

    Parameters
    ----------
    program
        The program.
    batch
        Inputs by name.
    memory
        Counts what activations take.
    weights
        The program's weights.
    last
        The last use of every node: `graphprune.ir.interpreter.last_uses`.
    idle
        Nodes that are only looked at before they are computed, and then are not.
    """

    def __init__(
        self,
        program: Program,
        batch: Mapping[str, Tensor],
        memory: Memory,
        weights: SegmentWeights,
        last: Mapping[fx.Node, fx.Node],
        idle: Collection[fx.Node] = (),
    ) -> None:
        filled = program.fill(batch)
        given = {node: filled[value.name] for value, node in program.input_nodes()}
        self.values = Values(given, memory)
        self._weights, self._memory, self._last, self._idle = weights, memory, last, idle

    @classmethod
    def of_all(
        cls,
        program: Program,
        batches: Iterable[Mapping[str, Tensor]],
        memory: Memory | None = None,
        among: Collection[fx.Node] | None = None,
        idle: Collection[fx.Node] = (),
        goals: Collection[fx.Node] = (),
    ) -> list[BatchExecution]:
        """Return one for each of `batches`, at the start of the graph.

        With `among` only those nodes are run; by default all but the output, and what only that
        reads is dropped at once. The values of `goals` are kept to the end.
        """
        (output,) = program.graph.find_nodes(op="output")
        among = set(program.graph.nodes) - {output} if among is None else among
        memory, last = memory or Memory(), last_uses(program.graph, among)
        last = {node: by for node, by in last.items() if node not in goals}
        weights = SegmentWeights(program)
        return [cls(program, batch, memory, weights, last, idle) for batch in batches]

    @torch.no_grad()
    def advance(self, nodes: Sequence[fx.Node], before: Before | None = None) -> None:
        """Compute `nodes`, and drop every value after its last use.

        With `before`, a hook that may look at all values, they are dropped when all are computed.
        """
        held = self._with_weights(self.values, nodes)
        if before is None:
            Interpreter(self.values, self._hooks(None), self._last).run(nodes)
        else:
            Interpreter(self.values, self._hooks(before)).run(nodes)
            for node in nodes:
                for other in (*node.all_input_nodes, node):
                    if self._last.get(other) is node:
                        self.values.pop(other, None)
        for node in held:
            self.values.pop(node, None)
        self._memory.let_go(held.values())

    @torch.no_grad()
    def trial(self, segment: Segment, before: Before | None = None) -> Values:
        """Compute a segment without moving on; the values take memory until they are cleared."""
        values = Values(self.values, self._memory)
        if any(map(is_mutating, segment.nodes)):
            for node in segment.inputs:
                if node in values and isinstance(values[node], Tensor):
                    values[node] = values[node].clone()
        self._with_weights(values, segment.nodes)
        Interpreter(values, self._hooks(before)).run(segment.nodes)
        return values

    def _hooks(self, before: Before | None) -> Hooks:
        if not self._idle:
            return Hooks(before)

        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if node in self._idle else call(node, args, kwargs)

        return Hooks(before, compute)

    def _with_weights(self, values: Values, nodes: Sequence[fx.Node]) -> Mapping[fx.Node, Tensor]:
        """Put the weights that `nodes` read among `values`."""
        held = self._weights.of(nodes)
        self._memory.set_aside(held.values())
        values.update(held)
        return held

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with other weights, as do all batches of the same program."""
        self._weights.replace(weights)


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


AT_ONCE = 64
"""Batches that go through a graph together where weights are read anew for each segment."""


@torch.no_grad()
def logits_of_all(
    program: Program, batches: Sequence[Mapping[str, Tensor]], output: str | None = None
) -> Iterator[Logits]:
    """Yield what `run_to_logits` gives for each of `batches`, without gradients.

    Where weights have to be read, converted or moved to be computed with, batches go through the
    graph together, so that each segment's weights are so once for all of them.
    """
    if not any(isinstance(weight, Deferred) for weight in program.operands.values()):
        for batch in batches:
            yield run_to_logits(program, batch, output)
        return
    readout, goals = ending(program, output)
    needed = ancestors(goals)
    parts = segments(program, among={node for node in needed if node.op != "placeholder"})
    for first in range(0, len(batches), AT_ONCE):
        together = batches[first : first + AT_ONCE]
        executions = BatchExecution.of_all(program, together, among=needed, goals=goals)
        for part in parts:
            for execution in executions:
                execution.advance(part.nodes)
        weights = SegmentWeights(program).of(goals)
        for execution in executions:
            values = {**execution.values, **weights}
            yield WholeLogits(values[goals[0]]) if readout is None else readout.logits(values)
