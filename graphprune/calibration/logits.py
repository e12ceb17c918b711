"""Logits over a vocabulary, which are made for a few tokens at a time and never held all at once.

Where a graph ends in a linear map and what is done to each of its outputs, everything before runs
as usual, and the end is run for those tokens that are asked for. Any other graph gives its logits
whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from graphprune.calibration.segments import segments
from graphprune.ir.aten import is_copy, is_mutating, is_operator
from graphprune.ir.interpreter import (
    Hooks,
    Interpreter,
    Segment,
    Values,
    ancestors,
    given_of,
    last_uses,
)
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program
from graphprune.weights.deferred import made

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""Given logits ``[n, classes]`` and which of the rows asked for they are, ``[n]``: a loss of each,
``[n]``."""

_AT_ONCE = 2**24
"""Logits that are in memory at once, in each of the forms that a loss makes of them."""


class Logits(ABC):
    """The logits of a batch, ``[..., classes]``; its rows are counted over all but the classes."""

    shape: torch.Size
    device: torch.device

    @abstractmethod
    def rows(self, at: Tensor) -> Tensor:
        """Return the logits of the rows `at`, ``[n, classes]``, in the caller's grad mode."""

    @abstractmethod
    def summed(self, at: Tensor, loss: RowLoss) -> Tensor:
        """Return the sum of the losses of the rows `at`: a float32 scalar, differentiable."""

    def all(self) -> Tensor:
        """Return all logits."""
        count = self.shape[:-1].numel()
        return self.rows(torch.arange(count, device=self.device)).view(self.shape)

    @torch.no_grad()
    def each(self, at: Tensor, loss: RowLoss) -> Tensor:
        """Return the losses of the rows `at`, ``[n]``, without gradients."""
        found = [loss(self.rows(at[piece]), piece) for piece in self._pieces(len(at))]
        return torch.cat(found) if found else torch.zeros(0, device=self.device)

    def _pieces(self, count: int) -> Iterator[Tensor]:
        rows = max(_AT_ONCE // max(self.shape[-1], 1), 1)
        yield from torch.arange(count, device=self.device).split(rows) if count else ()


class WholeLogits(Logits):
    """Logits that are in memory, ``[..., classes]``."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.shape, self.device = logits, logits.shape, logits.device

    def rows(self, at: Tensor) -> Tensor:
        """Pick the rows."""
        return self.logits.flatten(0, -2).index_select(0, at)

    def all(self) -> Tensor:
        """Return them as they are."""
        return self.logits

    def summed(self, at: Tensor, loss: RowLoss) -> Tensor:
        """Add up the losses of pieces, each computed again when it is differentiated."""

        def of(logits: Tensor, piece: Tensor) -> Tensor:
            return loss(logits, piece).float().sum()

        logits, pieces = self.rows(at), list(self._pieces(len(at)))
        if len(pieces) < 2:
            return of(logits, torch.arange(len(at), device=self.device))
        sums = [checkpoint(of, logits[piece], piece, use_reentrant=False) for piece in pieces]
        return torch.stack(sums).sum()


def as_logits(logits: Tensor | Logits) -> Logits:
    """Return `logits` themselves, or a tensor as logits that are in memory."""
    return logits if isinstance(logits, Logits) else WholeLogits(logits)


# -- logits that a projection makes ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Readout:
    """The end of a graph that makes an output of single rows: a linear map and what follows it.

    Parameters
    ----------
    linear
        The linear map.
    tail
        What is done to each of its elements, in order; the last of them, or `linear`, is the
        output.
    """

    linear: fx.Node
    tail: tuple[fx.Node, ...] = ()

    @classmethod
    def of(cls, output: fx.Node) -> Readout | None:
        """Return how `output` comes from a linear map, or None where it does not, or not only."""
        tail: list[fx.Node] = []
        reader: fx.Node | None = None
        node = output
        while node.op == "call_function" and "val" in node.meta:
            users = [user for user in node.users if user.op != "output"]
            if users != ([] if reader is None else [reader]):
                return None  # something else looks at it
            if node.target is torch.ops.aten.linear.default:
                hidden = node.meta["val"].ndim
                return cls(node, tuple(reversed(tail))) if hidden > 1 else None
            before = _element_by_element(node)
            if before is None:
                return None
            tail.append(node)
            node, reader = before, node
        return None

    @property
    def hidden(self) -> fx.Node:
        """The input of the linear map, ``[..., in]``."""
        node = arguments_of(self.linear)["input"]
        assert isinstance(node, fx.Node)
        return node

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The nodes that it reads: hidden values, the weight, a bias, and those of the tail."""
        inside = {self.linear, *self.tail}
        read = (other for node in (self.linear, *self.tail) for other in node.all_input_nodes)
        return tuple(dict.fromkeys(other for other in read if other not in inside))

    def logits(self, values: Mapping[fx.Node, Any], hooks: Hooks | None = None) -> ProjectedLogits:
        """Return the logits that it makes of `values`, which hold all `inputs`."""
        return ProjectedLogits(self, values, hooks)


def _element_by_element(node: fx.Node) -> fx.Node | None:
    """Return what `node` changes element by element, all rows alike; None if it does more."""
    if is_mutating(node) or not is_operator(node):
        return None
    if is_copy(node):
        return node.all_input_nodes[0]
    if torch.Tag.pointwise not in node.target.tags:  # type: ignore[union-attr]
        return None
    sizes = {other: _sizes(other) for other in node.all_input_nodes}
    wide = [other for other, size in sizes.items() if size == _sizes(node)]
    alike = all(set(size[:-1]) <= {"1"} for other, size in sizes.items() if other not in wide)
    return wide[0] if len(wide) == 1 and alike else None


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in getattr(node.meta.get("val"), "shape", ())]


class ProjectedLogits(Logits):
    """Logits that a `Readout` makes of hidden values, when they are asked for."""

    def __init__(
        self, readout: Readout, values: Mapping[fx.Node, Any], hooks: Hooks | None = None
    ) -> None:
        self.readout, self.hooks = readout, hooks
        self.values = {node: made(values[node]) for node in readout.inputs}
        hidden: Tensor = self.values[readout.hidden]
        args = arguments_of(readout.linear)
        self.weight: Tensor = self.values[args["weight"]]
        self.bias: Tensor | None = None if args["bias"] is None else self.values[args["bias"]]
        self.shape = torch.Size([*hidden.shape[:-1], len(self.weight)])
        self.device = hidden.device
        self.flat = hidden.flatten(0, -2)

    def rows(self, at: Tensor) -> Tensor:
        """Run the end of the graph for the rows."""
        hidden = self.flat.index_select(0, at).type(self.weight.dtype)
        return self.after(torch.nn.functional.linear(hidden, self.weight, self.bias), self.values)

    def summed(self, at: Tensor, loss: RowLoss) -> Tensor:
        """Add up the losses of pieces, with the gradients of each while its logits are there."""
        args = arguments_of(self.readout.linear)
        fixed = {self.readout.hidden, args["weight"], args["bias"]}
        others = [node for node in self.readout.inputs if node not in fixed]
        extra = [self.values[node] for node in others]
        found: Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
            self, at, loss, others, self.flat, self.weight, self.bias, *extra
        )
        return found

    def after(self, outputs: Tensor, values: Mapping[fx.Node, Any]) -> Tensor:
        """Return what the tail makes of outputs of the linear map, ``[n, classes]``."""
        if not self.readout.tail:
            return outputs
        # Rows stand where the last but one axis is, so that what is combined broadcasts as before.
        lead = (1,) * (len(self.shape) - 2)
        held = Values({**values, self.readout.linear: outputs.view(*lead, *outputs.shape)})
        Interpreter(held, self.hooks).run(self.readout.tail)
        result: Tensor = held[self.readout.tail[-1]]
        return result.view(outputs.shape)


class _Summed(torch.autograd.Function):
    """The sum of losses of rows, whose gradients are taken together with it.

    A piece of logits is made once: differentiated at once, it need neither be kept nor made again,
    and the weight's gradient is added up in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: ProjectedLogits,
        at: Tensor,
        loss: RowLoss,
        others: Sequence[fx.Node],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *extra: Any,
    ) -> Tensor:
        needed = ctx.needs_input_grad[4:]
        given = (hidden, weight, bias, *extra)
        dtype = _compute_type(weight)
        matrix = weight.detach().to(dtype)
        gradients = [
            torch.zeros_like(of) if need else None for of, need in zip(given, needed, strict=True)
        ]
        total = torch.zeros((), device=hidden.device)
        for piece in logits._pieces(len(at)):
            rows = hidden.detach().index_select(0, at[piece]).to(dtype)
            with _no_autocast(hidden.device):
                out = torch.nn.functional.linear(
                    rows, matrix, None if bias is None else bias.detach().to(dtype)
                )
            with torch.enable_grad():
                leaf = out.requires_grad_(any(needed))
                held = [
                    each.detach().requires_grad_() if need else each
                    for each, need in zip(extra, needed[3:], strict=True)
                ]
                values = {**logits.values, **dict(zip(others, held, strict=True))}
                value = loss(logits.after(leaf, values), piece).float().sum()
            total += value.detach()
            if not any(needed):
                continue
            leaves = [leaf, *(each for each, need in zip(held, needed[3:], strict=True) if need)]
            found, *rest = torch.autograd.grad(value, leaves, allow_unused=True)
            _add(gradients, found, rows, matrix, at[piece])
            for into, more in zip((g for g in gradients[3:] if g is not None), rest, strict=True):
                if more is not None:
                    into += more
        ctx.save_for_backward(*(each for each in gradients if each is not None))
        ctx.needed = needed
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        held = iter(ctx.saved_tensors)
        scaled = (next(held) * gradient if need else None for need in ctx.needed)
        return (None, None, None, None, *scaled)


def _add(
    gradients: Sequence[Tensor | None], found: Tensor, rows: Tensor, matrix: Tensor, at: Tensor
) -> None:
    """Add what the gradient of some outputs means for hidden values, weight and bias."""
    hidden, weight, bias = gradients[:3]
    if hidden is not None:
        hidden.index_add_(0, at, (found @ matrix).to(hidden.dtype))
    if weight is not None:
        if weight.dtype is found.dtype:
            weight.addmm_(found.mT, rows)
        else:
            weight += found.mT @ rows
    if bias is not None:
        bias += found.sum(0)


def _compute_type(weight: Tensor) -> torch.dtype:
    """Return the type that products with `weight` are made in here."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _no_autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, enabled=False)


# -- running a program up to its logits ------------------------------------------------------------


def run_to_logits(
    program: Program,
    inputs: Mapping[str, Tensor],
    output: str | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    hooks: Hooks | None = None,
    hooked: Collection[fx.Node] = (),
    again: bool = False,
) -> Logits:
    """Run what one output of a program needs, in the caller's grad mode.

    Parameters
    ----------
    program
        The program.
    inputs
        By name; what may be left out is filled in.
    output
        The output's name; None for the first.
    weights
        What to run it on instead of its own.
    hooks
        What is done around each node, but for a linear map that the logits come from.
    hooked
        Nodes that `hooks` must see as a whole; where the logits come from such, they are whole.
    again
        Whether gradients run each segment again instead of keeping what it computed.
    """
    readout, goals = ending(program, output, hooked)
    needed = ancestors(goals)
    values = Values(given_of(program, inputs, weights))
    nodes = {each for each in needed if each.op != "placeholder"}
    parts = [Segment.of([each for each in program.graph.nodes if each in nodes])]
    if again and torch.is_grad_enabled():
        parts = segments(program, among=nodes)
    last = last_uses(program.graph, among=needed)
    until = {
        each: by for each, by in last.items() if each not in goals and each.op != "placeholder"
    }
    for part in parts:
        if len(parts) > 1:
            values.update(_run_again(part, values, hooks, goals))
        else:
            Interpreter(values, hooks, until).run(part.nodes)
    return WholeLogits(values[goals[0]]) if readout is None else readout.logits(values, hooks)


def saves_memory(program: Program) -> bool:
    """Return whether gradients had better compute activations again than keep them: see `again`."""
    return program.device.type != "cpu" or program.placement.memory is not None


def _run_again(
    segment: Segment, values: Values, hooks: Hooks | None, goals: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """Return what a segment gives away; to be differentiated, it is run once more."""
    given = {node: values[node] for node in segment.inputs}
    tensors = [node for node, value in given.items() if isinstance(value, Tensor)]
    away = [node for node in segment.nodes if node in segment.outputs or node in goals]

    def run(*args: Tensor) -> tuple[Any, ...]:
        held = Values({**given, **dict(zip(tensors, args, strict=True))})
        Interpreter(held, hooks).run(segment.nodes)
        return tuple(held[node] for node in away)

    found = checkpoint(run, *(given[node] for node in tensors), use_reentrant=False)
    return dict(zip(away, found, strict=True))


def ending(
    program: Program, output: str | None = None, seen: Collection[fx.Node] = ()
) -> tuple[Readout | None, tuple[fx.Node, ...]]:
    """Return the end of the graph that makes an output, if it is one, and what is run up to.

    It is none where `seen`, nodes that somebody looks at as a whole, holds one of its own.
    """
    node = output_node(program, output)
    readout = Readout.of(node)
    if readout is not None and not {readout.linear, *readout.tail}.isdisjoint(seen):
        readout = None
    return readout, (node,) if readout is None else readout.inputs


def output_node(program: Program, name: str | None = None) -> fx.Node:
    """Return the node that computes the output called `name`, or the first."""
    nodes = {value.name: node for value, node in program.output_nodes()}
    return nodes[name or program.outputs[0].name]
