"""Derive the shapes of an edited graph again, and make a program of it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from contextlib import nullcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphprune.errors import RewriteError, first_line
from graphprune.ir.devices import placed
from graphprune.ir.interpreter import Compute, Hooks, call, run_program
from graphprune.ir.nodes import get_argument, set_argument
from graphprune.ir.program import Program, value_of
from graphprune.ir.provenance import operator_of
from graphprune.ir.sample_inputs import random_inputs

# -- dynamic sizes ------------------------------------------------------------------------------


def follow_size(node: fx.Node, name: str, index: int | None, ratio: Fraction) -> None:
    """Multiply a size argument by `ratio`.

    A dynamic size (a product of a batch size and a head count, say) may follow by itself, where it
    is read off a tensor that changes; `with_graph` finds out and leaves it then.
    """
    old = get_argument(node, name, index)
    if not isinstance(old, fx.Node):
        set_argument(node, name, index, int(old * ratio))
        return
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(_scaled, (old, ratio.numerator, ratio.denominator))
    scaled.meta["expected"] = old.meta["val"] * ratio.numerator // ratio.denominator
    set_argument(node, name, index, scaled)


def _scaled(size: int, numerator: int, denominator: int) -> int:
    """Stands in an edited graph until it is known whether `size` follows by itself."""
    return size * numerator // denominator


# -- programs -----------------------------------------------------------------------------------

Shape = tuple[Any, ...]


def with_graph(
    program: Program,
    graph: fx.Graph,
    weights: Mapping[str, Tensor],
    shapes: Mapping[fx.Node, Shape | list[Shape]],
) -> Program:
    """`program` with another `graph` and other `weights`.

    Parameters
    ----------
    program
        What the graph was copied from.
    graph
        The edited graph; its placeholders are as before, but for those of weights that went.
    weights
        The weight of every placeholder that there is, in order.
    shapes
        The new shapes of nodes that change (a list of them for several results), dynamic sizes
        as symbols.

    Raises
    ------
    RewriteError
        Naming the first operator that does not accept its new sizes, or whose result is not of the
        shape it should have: sizes of all nodes are derived again, by running the graph on tensors
        without data.
    """
    _Values(graph).update(shapes)
    graph.lint()
    (output,) = graph.find_nodes(op="output")
    inputs = graph.find_nodes(op="placeholder")[len(weights) :]
    outputs: Any = output.args[0]
    rebuilt = dataclasses.replace(
        program,
        graph_module=fx.GraphModule(torch.nn.Module(), graph),
        weights=dict(weights),
        kinds={name: program.kinds[name] for name in weights},
        aliases={alias: name for alias, name in program.aliases.items() if name in weights},
        inputs=tuple(value_of(v.name, n) for v, n in zip(program.inputs, inputs, strict=True)),
        outputs=tuple(value_of(v.name, n) for v, n in zip(program.outputs, outputs, strict=True)),
    )
    _Proof(rebuilt).run_on_nothing()
    return rebuilt


class _Values:
    """Brings ``meta["val"]`` of every node up to date."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.changed: set[fx.Node] = set()
        values = (node.meta.get("val") for node in graph.nodes)
        # A graph that was kept for looking into has tensors on the meta device.
        modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))
        self.mode: FakeTensorMode | nullcontext[None] = next(modes, nullcontext())

    def update(self, shapes: Mapping[fx.Node, Shape | list[Shape]]) -> None:
        for node in list(self.graph.nodes):
            if node.target is _scaled:
                self._settle(node)
            elif node in shapes:
                node.meta["val"] = self._resized(node.meta["val"], shapes[node])
                self.changed.add(node)
            elif node.op == "call_function" and self._is_stale(node):
                self._derive(node)

    def _is_stale(self, node: fx.Node) -> bool:
        """Return whether a node is new, or computes with sizes that changed."""
        value = node.meta.get("val")
        if value is None:
            return True
        return isinstance(value, torch.SymInt) and not self.changed.isdisjoint(node.all_input_nodes)

    def _resized(self, old: Any, shape: Any) -> Any:
        if isinstance(old, list | tuple):
            return [self._resized(part, one) for part, one in zip(old, shape, strict=True)]
        empty = torch.empty(shape, dtype=old.dtype, device="meta")
        if isinstance(self.mode, FakeTensorMode):  # in half the time of making it under the mode
            return FakeTensor(self.mode, empty, old.device)
        return empty.to(old.device)

    def _derive(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        self.changed.add(node)

    def _settle(self, node: fx.Node) -> None:
        """Multiply a dynamic size by what changed, unless it has followed by itself."""
        size, numerator, denominator = node.args
        assert isinstance(size, fx.Node)
        result = size
        if _expression(size.meta["val"]) != _expression(node.meta["expected"]):
            with self.graph.inserting_before(node):
                product = self.graph.call_function(operator.mul, (size, numerator))
                result = self.graph.call_function(operator.floordiv, (product, denominator))
            for made in (product, result):
                self._derive(made)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)


def _expression(size: Any) -> Any:
    return getattr(getattr(size, "node", None), "expr", size)


class _Proof:
    """Runs a program on tensors without data and compares every shape with what is promised."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run_on_nothing(self) -> None:
        with torch.no_grad():
            try:  # ten times as quick as fake tensors, and refused where sizes depend on data
                return self._run(torch.device("meta"), self._compute_on_meta)
            except RewriteError:
                symbols = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
                with FakeTensorMode(shape_env=symbols, allow_non_fake_inputs=True):
                    return self._run(self.program.placement.device, self._compute)

    def _run(self, device: torch.device | None, compute: Compute) -> None:
        types = self.program.compute_types
        empty = {
            name: torch.empty(weight.shape, dtype=types[name], device=device)
            for name, weight in self.program.weights.items()
        }
        given = {
            name: torch.empty(value.shape, dtype=value.dtype, device=device)
            for name, value in self.program.fill(random_inputs(self.program)).items()
        }
        run_program(self.program, given, Hooks(compute=compute), empty)

    def _compute_on_meta(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._compute(node, *placed(args, kwargs, torch.device("meta")), without_values)

    def _compute(
        self,
        node: fx.Node,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        compute: Compute = call,
    ) -> Any:
        try:
            result = compute(node, args, kwargs)
        except Exception as error:
            raise RewriteError(
                f"{operator_of(node)} does not accept its new sizes: {first_line(error)}"
            ) from error
        if isinstance(result, Tensor):
            promised = node.meta["val"].shape
            for size, due in zip(result.shape, promised, strict=True):
                if isinstance(due, int) and isinstance(size, int) and due != size:
                    raise RewriteError(
                        f"{operator_of(node)} came out as {tuple(result.shape)}, not as "
                        f"{tuple(promised)}"
                    )
        return result


# -- tensors without values -----------------------------------------------------------------------


class _Sizes(NamedTuple):
    """All that there is to a tensor on the meta device."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Number(NamedTuple):
    """A number that is not an integer, though it may be equal to one."""

    kind: type
    value: float


def without_values(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a node as `call` does, once for all that are alike where tensors are on meta.

    Equal layers, and programs that differ in few of their sizes, ask for the same again and again.
    """
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return call(node, args, kwargs)
    try:
        named = tuple((key, _sizes(value)) for key, value in kwargs.items())
        return _made(_result(node.target, _sizes(args), named))
    except TypeError:  # if it is the operator's own, that says so again
        return call(node, args, kwargs)


@lru_cache(maxsize=1 << 13)
def _result(
    operator: OpOverload, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> Any:
    return _sizes(operator(*_made(args), **{key: _made(value) for key, value in kwargs}))


def _sizes(value: Any) -> Any:
    """Return `value` with sizes for tensors, such that what compares equal is.

    Raises
    ------
    TypeError
        For a tensor that has values, or more to it than these.
    """
    if isinstance(value, Tensor):
        if not value.is_meta or value.layout is not torch.strided or value.is_complex():
            raise TypeError
        return _Sizes(value.shape, value.stride(), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_sizes(each) for each in value)
    return _Number(type(value), value) if isinstance(value, bool | float) else value


def _made(value: Any) -> Any:
    if isinstance(value, _Sizes):
        return torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device="meta")
    if isinstance(value, _Number):
        return value.value
    return [_made(each) for each in value] if isinstance(value, tuple) else value
