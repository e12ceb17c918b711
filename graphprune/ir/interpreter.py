"""Running a graph, or a part of it, with hooks around its nodes and an account of memory.

Everything that computes with a graph goes through here: whole programs, the part behind one node,
and programs that run segment by segment, where a segment's inputs are all that it needs to start.
"""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, UntypedStorage, fx

from graphprune.ir.aten import is_mutating, is_view
from graphprune.ir.devices import device_of, has_device, placed
from graphprune.ir.program import Program

# -- memory ---------------------------------------------------------------------------------------


class Memory:
    """Bytes that tensors take together, now and at most; memory that several share counts once.

    Parameters
    ----------
    aside
        Tensors whose memory is not counted, such as weights that are held anyway.
    """

    def __init__(self, aside: Iterable[Tensor] = ()) -> None:
        self.bytes = self.peak = 0
        self._aside: dict[int, UntypedStorage] = {}
        self._holders: Counter[int] = Counter()
        self.set_aside(aside)

    def set_aside(self, tensors: Iterable[Tensor]) -> None:
        """Leave the memory of `tensors` out from now on."""
        # The storages are held, so that no later one can take the place of one that went.
        storages = (tensor.untyped_storage() for tensor in tensors)
        self._aside |= {storage._cdata: storage for storage in storages}

    def let_go(self, tensors: Iterable[Tensor]) -> None:
        """Hold the memory of `tensors` no longer, which was left out."""
        for tensor in tensors:
            self._aside.pop(tensor.untyped_storage()._cdata, None)

    def hold(self, value: Any) -> None:
        """Count the tensors of `value` in."""
        for tensor in _tensors(value):
            key = tensor.untyped_storage()._cdata
            if key not in self._aside:
                self._holders[key] += 1
                if self._holders[key] == 1:
                    self.reserve(tensor.untyped_storage().nbytes())

    def release(self, value: Any) -> None:
        """Count the tensors of `value` out again."""
        for tensor in _tensors(value):
            key = tensor.untyped_storage()._cdata
            if key in self._holders:
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key]
                    self.reserve(-tensor.untyped_storage().nbytes())

    def reserve(self, count: int) -> None:
        """Count so many bytes in that no node holds, or out where `count` is negative."""
        self.bytes += count
        self.peak = max(self.peak, self.bytes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


class Values(UserDict[fx.Node, Any]):
    """The values of nodes that have been computed; `memory` knows what they take."""

    def __init__(self, given: Mapping[fx.Node, Any], memory: Memory | None = None) -> None:
        self.memory = memory
        super().__init__(given)

    def __setitem__(self, node: fx.Node, value: Any) -> None:
        if self.memory is not None:
            self.memory.hold(value)
            if node in self.data:
                self.memory.release(self.data[node])
        self.data[node] = value

    def __delitem__(self, node: fx.Node) -> None:
        value = self.data.pop(node)
        if self.memory is not None:
            self.memory.release(value)


# -- running --------------------------------------------------------------------------------------


def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what the function of `node` makes of arguments."""
    return node.target(*args, **kwargs)  # type: ignore[operator]


Before = Callable[[fx.Node, Mapping[fx.Node, Any]], Mapping[fx.Node, Any] | None]
Compute = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[fx.Node, Any, Mapping[fx.Node, Any]], Any]


def zeroing(nodes: Collection[fx.Node]) -> Compute:
    """Return what computes every node, and gives zeros for `nodes`."""

    def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = call(node, args, kwargs)
        return torch.zeros_like(value) if node in nodes else value

    return compute


@dataclass(frozen=True)
class Hooks:
    """Functions that are called around each node; every one may be left out.

    Parameters
    ----------
    before
        Given a node and the values so far: other values for nodes that it reads, for it alone.
    compute
        Given a node, its arguments and keyword arguments: its value.
    after
        Given a node, its value and the values that it was made of: the value to go on with.
    """

    before: Before | None = None
    compute: Compute = call
    after: After | None = None


class Interpreter:
    """Computes the nodes of a graph one by one, in the caller's grad mode.

    Parameters
    ----------
    values
        What is known at the start: weights and inputs, or whatever the nodes to run read. The
        values of nodes are added to it.
    hooks
        What is done around each node.
    last_uses
        Node -> the last one that reads it, after which its value is dropped; see `last_uses`.
        Nodes that it does not name stay.
    device
        Where values are made that are made of none; by default where `values` are.
    """

    def __init__(
        self,
        values: Values,
        hooks: Hooks | None = None,
        last_uses: Mapping[fx.Node, fx.Node] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.values = values
        self.hooks = hooks or Hooks()
        self.last_uses = last_uses or {}
        self.device = device or device_of(values.values())

    def run(self, nodes: Iterable[fx.Node]) -> None:
        """Compute `nodes`, which stand in the order of their graph."""
        for node in nodes:
            self.step(node)

    def step(self, node: fx.Node) -> None:
        """Compute one node; placeholders and the output are none of its business."""
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(node.graph.owning_module)
            self.values[node] = value.to(self.device) if isinstance(value, Tensor) else value
        elif node.op == "call_function":
            self.values[node] = self._value(node)
        for other in (*node.all_input_nodes, node):
            if self.last_uses.get(other) is node:
                self.values.pop(other, None)

    def _value(self, node: fx.Node) -> Any:
        hooks, values = self.hooks, self.values
        seen = hooks.before(node, values) if hooks.before is not None else None
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs),
            lambda other: seen[other] if seen and other in seen else values[other],
        )
        if has_device(node):
            args, kwargs = placed(args, kwargs, self.device)
        value = hooks.compute(node, args, kwargs)
        return value if hooks.after is None else hooks.after(node, value, values)


def last_uses(graph: fx.Graph, among: Collection[fx.Node] | None = None) -> dict[fx.Node, fx.Node]:
    """Return the last node that reads each node; what nothing reads is its own last use.

    What the graph gives is read by its output, which no part before it drops. With `among` only
    those nodes are run, and read others.
    """
    nodes = [node for node in graph.nodes if among is None or node in among]
    last = {node: node for node in nodes if node.op != "placeholder"}
    for node in nodes:
        last |= dict.fromkeys(node.all_input_nodes, node)
    return last


def given_of(
    program: Program, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
) -> dict[fx.Node, Tensor]:
    """Return every placeholder's value: `weights`, or the program's, and `inputs` filled in.

    Raises
    ------
    UsageError
        When an input is missing or unknown.
    """
    placed = program.placed(program.operands if weights is None else weights, inputs)
    return dict(zip(program.graph.find_nodes(op="placeholder"), placed, strict=True))


def run_program(
    program: Program,
    inputs: Mapping[str, Tensor],
    hooks: Hooks | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the outputs of `program` by name, run with `hooks` on its weights or on others."""
    values = Values(given_of(program, inputs, weights))
    (output,) = program.graph.find_nodes(op="output")
    until = {node: last for node, last in last_uses(program.graph).items() if last is not output}
    Interpreter(values, hooks, until).run(program.graph.nodes)
    return {value.name: values[node] for value, node in program.output_nodes()}


def run_part(
    program: Program, wanted: Sequence[fx.Node], given: Mapping[fx.Node, Any]
) -> tuple[Any, ...]:
    """Return the values of the nodes `wanted`, from weights and the `given` values of others."""
    needed = ancestors(wanted, given)
    nodes = {name: node for name, node in program.weight_nodes() if node in needed}
    weights = {nodes[name]: weight for name, weight in program.take(nodes).items()}
    values = Values({**weights, **given})
    with torch.no_grad():
        Interpreter(values).run(n for n in program.graph.nodes if n in needed and n not in values)
    return tuple(values[node] for node in wanted)


def ancestors(nodes: Sequence[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Return `nodes` and all that they are computed from, up to the nodes `stop`.

    What writes into one of them is among them.
    """
    pending, found = list(nodes), set(nodes)
    while pending:
        node = pending.pop()
        for other in () if node in stop else (*node.all_input_nodes, *_writers(node)):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def _writers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that write into `node`, be it through views."""
    for user in node.users:
        if user.op != "call_function" or user.all_input_nodes[0] is not node:
            continue
        if is_mutating(user):
            yield user
        elif is_view(user):
            yield from _writers(user)


# -- segments -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighboring nodes of a graph, and what goes in and out of them.

    Parameters
    ----------
    nodes
        In the order of the graph.
    inputs
        Nodes before it that it reads, weights among them.
    outputs
        Nodes of it that are read after it.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @classmethod
    def of(cls, nodes: Sequence[fx.Node]) -> Segment:
        """Return the segment of `nodes`."""
        inside = set(nodes)
        read = dict.fromkeys(other for node in nodes for other in node.all_input_nodes)
        return cls(
            tuple(nodes),
            tuple(other for other in read if other not in inside),
            tuple(node for node in nodes if any(user not in inside for user in node.users)),
        )

    def up_to(self, nodes: Iterable[fx.Node]) -> Segment:
        """Return its beginning that has computed all of its `nodes`."""
        return Segment.of(self.nodes[: 1 + max(map(self.nodes.index, nodes))])
