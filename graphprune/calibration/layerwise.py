"""Layer-wise execution: all batches move through a graph together, one numbered layer at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.calibration.data import Calibration
from graphprune.calibration.kept import Kept
from graphprune.calibration.logits import Logits, WholeLogits, ending, run_to_logits
from graphprune.calibration.segments import segments
from graphprune.errors import CalibrationError
from graphprune.ir.aten import is_mutating
from graphprune.ir.interpreter import (
    Before,
    Compute,
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
from graphprune.weights.ahead import ReadAhead, can_read_ahead
from graphprune.weights.deferred import Deferred, made
from graphprune.weights.overlay import overlaid
from graphprune.weights.placement import Placement
from graphprune.weights.scratch import ScratchFile


class SegmentWeights:
    """The weights of a program as its graph computes with them, one segment's at a time.

    While one segment's are computed with, a thread makes those of the next, where both are small
    beside the program's limit of memory.

    Parameters
    ----------
    program
        The program; its weights may lie in files, in another type, or on another device.
    weights
        What to compute with instead of its own.
    parts
        The nodes that are going to be asked for, in this order.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor] | None = None,
        parts: Sequence[Iterable[fx.Node]] = (),
    ) -> None:
        self._program = program
        self._weights = program.weights if weights is None else weights
        self.names = {node: name for name, node in program.weight_nodes()}
        self._replaced: dict[str, Tensor] = {}
        self._held: dict[fx.Node, Tensor] = {}
        self._order = [read for part in parts if (read := self._read_by(part))]
        self._at = -1
        self._ahead: ReadAhead | None = None
        self._room, self._looks_ahead = self._planned()

    @property
    def room(self) -> int | None:
        """Bytes that the program's limit of memory leaves beside weights."""
        return self._room

    def of(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, Tensor]:
        """Return the weights that `nodes` read or are; others are let go."""
        wanted = self._read_by(nodes)
        held = {node: self._held[node] for node in wanted if node in self._held}
        self._held = {}  # what is not wanted any more goes before more is read
        if missing := [self.names[node] for node in wanted if node not in held]:
            taken = self._made(missing)
            for node in wanted:
                if node not in held:
                    held[node] = taken[self.names[node]].detach()
        self._held = held
        self._look_ahead(wanted)
        return held

    def _read_by(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        read = {each for node in nodes for each in (node, *node.all_input_nodes)}
        return [node for node in self.names if node in read]

    def _made(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Make the weights called `names`, but those that a thread has made."""
        found: dict[str, Tensor] = {}
        if self._ahead is not None and not self._ahead.names.isdisjoint(names):
            ahead, self._ahead = self._ahead.taken(), None
            found = {name: ahead[name] for name in names if name in ahead}
        missing = [name for name in names if name not in found]
        return found | {name: made(weight) for name, weight in self._operands(missing).items()}

    def _operands(self, names: Iterable[str]) -> dict[str, Tensor]:
        given = {name: self._replaced.get(name, self._weights[name]) for name in names}
        return self._program.as_operands(given)

    def _look_ahead(self, wanted: list[fx.Node]) -> None:
        """Let a thread make the weights that are wanted after those of `wanted`."""
        further = self._order[self._at + 1 :] if self._looks_ahead else []
        if wanted in self._order[self._at : self._at + 1] or wanted not in further[:-1]:
            return
        self._at += 1 + further.index(wanted)
        names = [self.names[n] for n in self._order[self._at + 1] if n not in self._held]
        waiting = {n: w for n, w in self._operands(names).items() if isinstance(w, Deferred)}
        if waiting:
            self._ahead = ReadAhead(waiting, self._program.device)

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with other weights, which are held as they are given."""
        self._replaced |= weights
        if self._ahead is not None and not self._ahead.names.isdisjoint(weights):
            self._ahead = None
        self._held = {n: w for n, w in self._held.items() if self.names[n] not in weights}

    def _planned(self) -> tuple[int | None, bool]:
        """Return the bytes that are left beside weights, and whether those of two parts are held.

        Raises
        ------
        CalibrationError
            When none are left: the weights of one part take more than the limit.
        """
        limit, ahead = self._program.placement.memory, can_read_ahead(self._program.device)
        if limit is None:
            return None, ahead
        weights, types = self._program.weights, self._program.compute_types
        sizes = [
            sum(weights[n].numel() * types[n].itemsize for n in map(self.names.__getitem__, part))
            for part in self._order
        ]
        needed = max(sizes, default=0)
        if needed >= limit:
            raise CalibrationError(
                f"memory: the weights of one layer take {needed / 2**20:.4g} MiB, and "
                f"{limit / 2**20:.4g} MiB are allowed"
            )
        both = max(map(sum, itertools.pairwise(sizes)), default=needed)
        return (limit - both, True) if ahead and 2 * both <= limit else (limit - needed, False)


class ChangedWeights:
    """The weights that a walk through a program has changed, as they are stored.

    They lie on disk where they, the weights of one part and what else is counted would together go
    past the program's limit of memory.

    Parameters
    ----------
    program
        The program.
    parts
        The nodes that the walk advances by.
    memory
        Counts what else is to stay within the limit.
    """

    def __init__(
        self,
        program: Program,
        parts: Sequence[Iterable[fx.Node]] = (),
        memory: Memory | None = None,
    ) -> None:
        self._program, self._memory = program, memory or Memory()
        self._room = SegmentWeights(program, parts=parts).room
        self.weights: dict[str, Tensor] = {}

    def store(self, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take more of them, and return them as they are stored.

        Raises
        ------
        UsageError
            When a value is too large for the type in which it is stored.
        OutputError
            When there is no room on the disk.
        """
        room = None if self._room is None else self._room - self._memory.bytes
        every = {**self._program.weights, **self.weights}
        every = overlaid(every, new, Placement(memory=room))
        stored = {name: every[name] for name in new}
        self.weights |= stored
        return stored

    def store_all(self, made: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Take more of them as they are made, and return them as they are stored.

        Raises
        ------
        UsageError, OutputError
            As `store`.
        """
        return {name: weight for new in made for name, weight in self.store(new).items()}


class BatchExecution:
    """One batch on its way through a program's graph, a segment at a time.

    Parameters
    ----------
    program
        The program.
    batch
        Inputs by name.
    values
        Holds what crosses from one segment into a later one; at first the inputs.
    weights
        The program's weights.
    last
        The last use of every node: `graphprune.ir.interpreter.last_uses`.
    compute
        Makes the value of a node.
    """

    def __init__(
        self,
        program: Program,
        batch: Mapping[str, Tensor],
        values: Kept[fx.Node],
        weights: SegmentWeights,
        last: Mapping[fx.Node, fx.Node],
        compute: Compute = call,
    ) -> None:
        filled = program.fill(batch)
        self.values = values
        for value, node in program.input_nodes():
            if node in last:
                values[node] = filled[value.name]
        self.weights, self._last, self._compute = weights, last, compute
        self._device = program.device

    @classmethod
    def of_all(
        cls,
        program: Program,
        batches: Iterable[Mapping[str, Tensor]],
        parts: Sequence[Sequence[fx.Node]],
        *,
        memory: Memory | None = None,
        goals: Collection[fx.Node] = (),
        weights: Mapping[str, Tensor] | None = None,
        computes: Iterable[Compute] | None = None,
    ) -> list[BatchExecution]:
        """Return one for each of `batches`, at the start of the graph.

        Past the program's limit of memory, less what the weights of a part take, the values that
        cross from one part into another lie in a scratch file.

        Parameters
        ----------
        program, batches
            What is run, on what.
        parts
            The nodes that it is going to be advanced by; others are not run.
        memory
            Counts what activations take, and what else is to stay within the limit.
        goals
            Nodes whose values are kept to the end.
        weights
            What to compute with instead of the program's own.
        computes
            Makes the values of nodes, for each batch.

        Raises
        ------
        CalibrationError
            When the weights of one part take more memory than is allowed.
        """
        memory, file = memory or Memory(), ScratchFile()
        held = SegmentWeights(program, weights, parts)
        last = last_uses(program.graph, {node for part in parts for node in part})
        last = {node: by for node, by in last.items() if node not in goals}
        last |= {node: node for node in goals if node.op == "placeholder"}
        return [
            cls(program, batch, Kept(held.room, memory, file), held, last, compute)
            for batch, compute in zip(batches, computes or itertools.repeat(call), strict=False)
        ]

    @torch.no_grad()
    def advance(self, nodes: Sequence[fx.Node], before: Before | None = None) -> None:
        """Compute `nodes`, and drop every value after its last use.

        With `before`, a hook that may look at all values, they are dropped when all are computed.
        """
        values = self._started(nodes)
        inside = set(nodes)
        for node in dict.fromkeys(other for each in nodes for other in each.all_input_nodes):
            if node in self.values and self._last.get(node) in inside:
                values[node] = self.values.pop(node)
        hooks = Hooks(before, self._compute)
        Interpreter(values, hooks, {} if before else self._last, self._device).run(nodes)
        written = any(map(is_mutating, nodes))
        left = {
            node: value
            for node, value in values.data.items()
            if node not in values.weights
            and self._last.get(node) not in inside
            and (written or node not in self.values)
        }
        values.clear()
        self.values.update(left)

    @torch.no_grad()
    def trial(self, segment: Segment, before: Before | None = None) -> Values:
        """Compute a segment without moving on; the values take memory until they are cleared."""
        values = self._started(segment.nodes)
        if any(map(is_mutating, segment.nodes)):
            for node in segment.inputs:
                if node in self.values and isinstance(values[node], Tensor):
                    values[node] = values[node].clone()
        Interpreter(values, Hooks(before, self._compute), None, self._device).run(segment.nodes)
        return values

    def _started(self, nodes: Sequence[fx.Node]) -> _Inside:
        """Return values that begin with the weights that `nodes` read."""
        return _Inside(self.values, self.weights.of(nodes))

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with other weights, as do all batches of the same program."""
        self.weights.replace(weights)


class _Inside(Values):
    """The values inside a segment; those before it are read when they are asked for.

    Its `weights` are not counted, and are held until it is cleared.
    """

    def __init__(self, before: Kept[fx.Node], weights: Mapping[fx.Node, Tensor]) -> None:
        self._before, self.weights = before, weights
        before.memory.set_aside(weights.values())
        super().__init__({}, before.memory)
        self.update(weights)

    def clear(self) -> None:
        """Let all go."""
        super().clear()
        self._before.memory.let_go(self.weights.values())
        self.weights = {}

    def __missing__(self, node: fx.Node) -> Any:
        self[node] = self._before[node]
        return self[node]

    def __contains__(self, node: object) -> bool:
        return node in self.data or node in self._before


def not_run(idle: Collection[fx.Node], compute: Compute = call) -> Compute:
    """Return what computes nodes but those of `idle`, which are only looked at before they are."""

    def others(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if node in idle else compute(node, args, kwargs)

    return others


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
"""Batches that go through a graph together where weights are made anew for each segment."""


@torch.no_grad()
def logits_of_all(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    output: str | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    compute: Callable[[], Compute] = lambda: call,
) -> Iterator[Logits]:
    """Yield what `run_to_logits` gives for each of `batches`, without gradients.

    Where weights have to be read, converted or moved to be computed with, batches go through the
    graph together, so that each segment's weights are so once for all of them.

    Parameters
    ----------
    program, batches, output
        As `run_to_logits` takes them.
    weights
        What to compute with instead of the program's own.
    compute
        Gives, for each batch, what makes the values of its nodes.
    """
    operands = program.as_operands(program.weights if weights is None else weights)
    if not any(isinstance(weight, Deferred) for weight in operands.values()):
        for batch in batches:
            hooks = Hooks(compute=compute())
            yield run_to_logits(program, batch, output, weights=operands, hooks=hooks)
        return
    readout, goals = ending(program, output)
    parts = [part.nodes for part in segments(program, among=ancestors(goals))]
    for first in range(0, len(batches), AT_ONCE):
        together = batches[first : first + AT_ONCE]
        computes = [compute() for _ in together]
        executions = BatchExecution.of_all(
            program, together, parts, goals=goals, weights=weights, computes=computes
        )
        for part in parts:
            for execution in executions:
                execution.advance(part)
        last = SegmentWeights(program, weights).of(goals)
        for execution, own in zip(executions, computes, strict=True):
            values = {n: last[n] if n in last else execution.values.pop(n) for n in goals}
            hooks = Hooks(compute=own)
            yield (
                WholeLogits(values[goals[0]]) if readout is None else readout.logits(values, hooks)
            )
