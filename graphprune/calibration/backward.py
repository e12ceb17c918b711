"""Gradients of a loss, taken backwards through a graph one segment at a time.

A first run keeps what crosses from one segment into a later one. Then, from the last segment to
the first, each is run again from what was kept, and differentiated: what it gave away takes the
gradients that later segments had for it. So no more is in memory than the activations of one
segment for one batch, its weights and their gradients, and what crosses, which may lie on disk.
Where several processes divide the batches, gradients are added up a segment at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.calibration.data import own_batches
from graphprune.calibration.kept import Kept
from graphprune.calibration.layerwise import SegmentWeights
from graphprune.calibration.logits import Logits, WholeLogits, ending
from graphprune.calibration.segments import segments
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import Hooks, Interpreter, Values, ancestors
from graphprune.ir.program import Program

BatchLoss = Callable[[Logits, int], Tensor]
"""Given the logits of a batch and its number: what is differentiated, a scalar."""

Visit = Callable[[int, Mapping[fx.Node, Any], Mapping[fx.Node, Tensor]], None]
"""Given the number of a batch, values of nodes, and the gradients at some of them, which are whole.
Every node that is looked at comes once for each batch of this process; so do contractions with
their inputs."""

Fold = Callable[[Any, Tensor], Any]
"""Given what was made of the gradients of earlier batches (None at first), and that of one more: a
tensor or several, which add up over batches."""


def summed(total: Tensor | None, gradient: Tensor) -> Tensor:
    """Add up the gradients of batches."""
    return gradient.clone() if total is None else total.add_(gradient)


@dataclass(frozen=True, eq=False)
class _Part:
    """A segment as it is differentiated; the last one makes the loss too."""

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]


@dataclass(eq=False)
class BackwardWalk:
    """The gradients of a loss over batches, by weights and at nodes.

    Parameters
    ----------
    program
        The program; it is run on its device.
    batches
        Its inputs by name.
    loss
        Of a batch; what is differentiated is the sum over all batches.
    weights
        Names of the weights whose gradients are wanted.
    nodes
        Nodes whose values and gradients are looked at.
    beside
        Nodes whose values are shown with them, from wherever in the graph.
    output
        The output that the loss is of; None for the first.
    """

    program: Program
    batches: Sequence[Mapping[str, Tensor]]
    loss: BatchLoss
    weights: Collection[str] = ()
    nodes: Collection[fx.Node] = ()
    beside: Collection[fx.Node] = ()
    output: str | None = None
    _made: dict[fx.Node, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        program = self.program
        self._watched, self._beside = set(self.nodes), set(self.beside)
        self._readout, goals = ending(program, self.output, self._watched)
        self._goal = goals[0]
        needed = ancestors((*goals, *self._beside))
        nodes = {node for node in needed if node.op != "placeholder"}
        self._names = {node: name for name, node in program.weight_nodes()}
        self._wanted = {
            node: name for node, name in self._names.items() if name in set(self.weights)
        }
        found = segments(program, among=nodes)
        self._parts = [self._part(each.nodes, each.inputs) for each in found[:-1]]
        last = found[-1] if found else None
        reads = dict.fromkeys((*(last.inputs if last else ()), *goals))
        inside = last.nodes if last else ()
        self._parts.append(self._part(inside, [node for node in reads if node not in set(inside)]))
        self._crossing = {*(node for part in self._parts for node in part.reads), *self._beside}
        self._moving = {*self._wanted, *self._watched}
        for node in (node for part in self._parts for node in part.nodes):
            if not self._moving.isdisjoint(node.all_input_nodes):
                self._moving.add(node)
        self._uses: dict[fx.Node, list[int]] = {}
        for at, part in enumerate(self._parts):
            for node in part.weights:
                self._uses.setdefault(node, []).append(at)
        self._own = own_batches(self.batches)
        ways = [*self._parts[:-1], *reversed(self._parts)]
        self._held = SegmentWeights(program, parts=[part.weights for part in ways])
        self._kept: Kept[Hashable] = Kept(self._held.room)

    def _part(self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> _Part:
        weights = [node for node in inputs if node in self._names]
        return _Part(
            tuple(nodes),
            tuple(node for node in inputs if node not in self._names),
            tuple(weights),
        )

    def run(
        self, fold: Fold = summed, visit: Visit | None = None, track: Progress = no_progress
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name, what `fold` made of its gradients) for every weight that is wanted.

        Another `fold` than `summed` is given the whole gradient of each batch.
        """
        self._start()
        parts = list(enumerate(self._parts))
        steps = [*((False, *each) for each in parts[:-1]), *((True, *e) for e in reversed(parts))]
        for backwards, at, part in track(steps, "taking gradients"):
            given = self._held.of(part.weights)
            for number in self._own:
                if backwards:
                    self._differentiate(at, part, number, given, fold, visit)
                else:
                    self._advance(part, number, given)
            if not backwards:
                continue
            yield from self._whole(
                fold, [n for n in self._wanted if n in self._uses and self._first(n, at)]
            )
        if visit is not None:
            self._show_given(visit)
        yield from self._whole(fold, [node for node in self._wanted if node not in self._uses])

    def _whole(self, fold: Fold, nodes: Sequence[fx.Node]) -> Iterator[tuple[str, Any]]:
        """Yield (name, what was made of its gradients) of weights, over all processes."""
        found = {node: self._fold_zero(node, fold) for node in nodes}
        several = (made if isinstance(made, tuple) else (made,) for made in found.values())
        ranks.sum_of(tensor for tensors in several for tensor in tensors)
        for node in nodes:
            yield self._wanted[node], found.pop(node)

    def _fold_zero(self, node: fx.Node, fold: Fold) -> Any:
        """Return what was made of a weight's gradients, or of none where no batch had any."""
        if node in self._made:
            return self._made.pop(node)
        return fold(None, torch.zeros_like(self._held.of([node])[node]))

    @torch.no_grad()
    def _start(self) -> None:
        inputs = {value.name: node for value, node in self.program.input_nodes()}
        for number in self._own:
            for name, value in self.program.fill(self.batches[number]).items():
                if inputs[name] in self._crossing or inputs[name] in self._moving:
                    self._kept[number, inputs[name]] = value

    @torch.no_grad()
    def _advance(self, part: _Part, number: int, given: Mapping[fx.Node, Tensor]) -> None:
        """Run a segment for one batch, and keep what crosses into later ones."""
        values = Values({**given, **{node: self._kept[number, node] for node in part.reads}})
        Interpreter(values).run(part.nodes)
        for node in part.nodes:
            if node in self._crossing:
                self._kept[number, node] = values[node]

    def _differentiate(
        self,
        at: int,
        part: _Part,
        number: int,
        given: Mapping[fx.Node, Tensor],
        fold: Fold,
        visit: Visit | None,
    ) -> None:
        """Run a segment for one batch, and take the gradients of what it gave away."""
        is_last = at == len(self._parts) - 1
        later = [node for node in part.nodes if ("gradient", number, node) in self._kept]
        watched = [node for node in part.nodes if node in self._watched]
        if is_last or later or watched:
            leaves: dict[fx.Node, Tensor] = {}
            values = Values({})
            for node in (*part.weights, *part.reads):
                value = given[node] if node in given else self._kept[number, node]
                if node in self._moving and _is_smooth(value):
                    value = leaves[node] = value.detach().requires_grad_()
                values[node] = value

            def look(node: fx.Node, value: Any, _: Mapping[fx.Node, Any]) -> Any:
                if node in watched and _is_smooth(value):
                    value = value if value.requires_grad else value.detach().requires_grad_()
                    leaves[node] = value
                return value

            with torch.enable_grad():
                Interpreter(values, Hooks(after=look)).run(part.nodes)
                outputs = [values[node] for node in later]
                if is_last:
                    outputs.append(self.loss(self._logits(values), number))
            gradients = [self._kept.pop(("gradient", number, node)) for node in later]
            found = _gradients(outputs, gradients, leaves)
            for node in (*part.weights, *part.reads):
                gradient = found.get(node)
                if gradient is not None:
                    self._give(at, number, node, gradient, fold)
            if visit is not None and watched:
                self._show(visit, number, values, {node: found.get(node) for node in watched})
        for node in part.nodes:
            if node not in self._beside:
                self._kept.pop((number, node), None)
        for node in part.weights:
            whole = (
                self._kept.pop(("weight", number, node), None) if self._first(node, at) else None
            )
            if whole is not None:
                self._made[node] = fold(self._made.get(node), whole)

    def _give(self, at: int, number: int, node: fx.Node, gradient: Tensor, fold: Fold) -> None:
        """Take a gradient of a weight down, or pass one on to where a value was computed."""
        key = "gradient", number, node
        if node in self._wanted:
            if fold is summed or self._uses[node] == [at]:
                self._made[node] = fold(self._made.get(node), gradient)
            else:  # of a batch, it is whole only when all segments have added theirs
                part = "weight", number, node
                self._kept[part] = _plus(self._kept.get(part), gradient)
        if node in self._watched or node not in self._names:
            self._kept[key] = _plus(self._kept.get(key), gradient)

    def _first(self, node: fx.Node, at: int) -> bool:
        """Whether no segment before `at` uses a weight."""
        return self._uses[node][0] == at

    def _logits(self, values: Mapping[fx.Node, Any]) -> Logits:
        if self._readout is None:
            return WholeLogits(values[self._goal])
        return self._readout.logits(values)

    def _show(
        self,
        visit: Visit,
        number: int,
        values: Mapping[fx.Node, Any],
        gradients: Mapping[fx.Node, Tensor | None],
    ) -> None:
        beside = {n: self._kept[number, n] for n in self._beside if (number, n) in self._kept}
        shown = {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}
        visit(
            number,
            {**beside, **shown},
            {
                node: torch.zeros_like(shown[node]) if gradient is None else gradient
                for node, gradient in gradients.items()
            },
        )

    def _show_given(self, visit: Visit) -> None:
        """Show what the graph is given, whose gradients are whole at the end."""
        given = [node for node in self._watched if node.op == "placeholder"]
        weights = self._held.of([node for node in given if node in self._names])
        for number in self._own if given else ():
            values = {n: weights[n] if n in weights else self._kept[number, n] for n in given}
            gradients = {n: self._kept.get(("gradient", number, n)) for n in given}
            self._show(visit, number, values, gradients)


def _is_smooth(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _plus(total: Tensor | None, gradient: Tensor) -> Tensor:
    return gradient if total is None else total + gradient


def _gradients(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    leaves: Mapping[fx.Node, Tensor],
) -> dict[fx.Node, Tensor | None]:
    """Return the gradients by `leaves` of outputs, of which a loss may be one more at the end."""
    weights = [*gradients, *[None] * (len(outputs) - len(gradients))]
    held = [pair for pair in zip(outputs, weights, strict=True) if pair[0].requires_grad]
    if not held or not leaves:
        return {}
    found = torch.autograd.grad(
        [output for output, _ in held],
        list(leaves.values()),
        [weight for _, weight in held],
        allow_unused=True,
    )
    return dict(zip(leaves, found, strict=True))
