"""The canonical form of a captured graph: free of side effects, with every size spelled out.

What the code of a model computes from constants alone, such as the slopes of ALiBi from a number of
heads, becomes a constant of the program: a tensor whose axes can lose units as those of a weight
can.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.frontend.complex_to_real import write_in_reals
from graphprune.ir.aten import (
    is_mutating,
    is_operator,
    is_random,
    is_view,
    name_of,
    plain_name,
)
from graphprune.ir.nodes import arguments_of, made_from, valued

_ATEN = torch.ops.aten

_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_assert_async")
"""Operators that only check; they tie a graph to one device and type and compute nothing."""

_COUNTING = {
    _ATEN.arange.default,
    _ATEN.arange.start,
    _ATEN.arange.start_step,
    _ATEN.linspace.default,
    _ATEN.eye.default,
    _ATEN.eye.m,
    _ATEN.tril_indices.default,
    _ATEN.triu_indices.default,
}
"""Operators whose values are indices or positions."""

_ALIASES = {
    "absolute": "abs",
    "arctan2": "atan2",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "fix": "trunc",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "linalg_matmul": "matmul",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_expit": "sigmoid",
    "subtract": "sub",
    "true_divide": "div",
}
"""Operators that are others by another name, overload by overload."""

_LARGEST = 1 << 22
"""Elements that a constant may have."""

Values = Mapping[fx.Node, Tensor]


def canonicalize(
    graph: fx.Graph, constants: Values, dynamic: Collection[int] = ()
) -> dict[fx.Node, Tensor]:
    """Bring `graph` into its canonical form.

    Parameters
    ----------
    graph
        A graph as `torch.export` made it, whose placeholders of weights come first; edited.
    constants
        Placeholders of constants -> their values.
    dynamic
        Sizes that stand for dynamic ones: a tensor with one of them is no constant.

    Returns
    -------
    dict
        New placeholders, which are the first of the graph, -> the constants that they stand for.
    """
    _erase_checks(graph)
    _erase_unused(graph)
    _rename(graph)
    write_in_reals(graph)
    _write_down_sizes(graph)
    values = _evaluate(graph, constants, dynamic)
    for node in list(graph.nodes):
        if node.op == "call_function":
            _spell_out(node, values)
    _make_apart(graph)
    lifted = _lift(graph, values)
    _erase_unused(graph)
    return lifted


def _erase_checks(graph: fx.Graph) -> None:
    """Erase checks, and create on the CPU what a capture on meta would create there."""
    meta, cpu = torch.device("meta"), torch.device("cpu")
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if name_of(node) in _CHECKS:
            graph.erase_node(node)
            continue
        if any(
            arg == meta
            for arg in (*node.args, *node.kwargs.values())
            if isinstance(arg, torch.device)
        ):
            node.args = tuple(cpu if arg == meta else arg for arg in node.args)
            node.kwargs = {k: cpu if v == meta else v for k, v in node.kwargs.items()}


def _write_down_sizes(graph: fx.Graph) -> None:
    """Replace a size that turned out to be fixed by its number."""
    numbers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if not numbers.keys().isdisjoint(node.all_input_nodes):
            node.args, node.kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda other: numbers.get(other, other)
            )
        size = node.meta.get("val")
        fixed = isinstance(size, torch.SymInt) and size.node.expr.is_number
        if node.op == "call_function" and (fixed or type(size) is int):
            numbers[node] = int(size)


def _rename(graph: fx.Graph) -> None:
    """Call every operator by one name."""
    for node in graph.nodes:
        name = name_of(node)
        plain = name.removesuffix("_")
        if plain in _ALIASES:
            packet = getattr(_ATEN, _ALIASES[plain] + name[len(plain) :])
            node.target = getattr(packet, node.target._overloadname)


def _erase_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not is_mutating(node):
            graph.erase_node(node)


# -- constants ----------------------------------------------------------------------------------


def _evaluate(
    graph: fx.Graph, constants: Values, dynamic: Collection[int]
) -> dict[fx.Node, Tensor]:
    """Map every node whose value follows from `constants` and indices alone to that value."""
    values = {node: value for node, value in constants.items() if not value.is_meta}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        inputs = node.all_input_nodes
        if not (inputs or node.target in _COUNTING) or not all(each in values for each in inputs):
            continue
        if any(map(is_mutating, (node, *node.users))) or is_random(node):
            continue
        value = node.meta["val"]
        if value.numel() <= _LARGEST and not set(map(int, value.shape)) & set(dynamic):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    return values


def _lift(graph: fx.Graph, values: Values) -> dict[fx.Node, Tensor]:
    """Replace the last values that derive from constants and indices alone by placeholders."""
    lifted: dict[fx.Node, Tensor] = {}
    counted: set[fx.Node] = set()
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node not in values or node.op == "placeholder":
            continue
        if node.target in _COUNTING or not counted.isdisjoint(node.all_input_nodes):
            counted.add(node)
    for node in counted:
        if all(user in values for user in node.users):
            continue
        with graph.inserting_before(first):
            placeholder = graph.placeholder(f"c_{node.name}")
        placeholder.meta = dict(node.meta)
        node.replace_all_uses_with(placeholder)
        lifted[placeholder] = values[node].contiguous()
    return lifted


# -- tensors without structure --------------------------------------------------------------

_SHAPELESS = {
    _ATEN.expand.default,
    _ATEN.full.default,
    _ATEN.ones.default,
    _ATEN.zeros.default,
}
"""Operators that make a tensor of whatever size is asked for: every user may have its own."""


def _make_apart(graph: fx.Graph) -> None:
    """Give every user of such a tensor its own, so that it couples no two users."""
    for node in list(graph.nodes):
        if node.target not in _SHAPELESS or _is_written(node):
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                own = graph.node_copy(node)
            user.replace_input_with(node, own)


def write_to_copies(graph: fx.Graph) -> list[fx.Node]:
    """Let what the graph writes to be a copy of its inputs and weights, which keep their values.

    Returns the placeholders that were written to.
    """
    placeholders, written = graph.find_nodes(op="placeholder"), written_to(graph)
    with graph.inserting_after(placeholders[-1]):
        for node in written:
            copy = made_from(node, _ATEN.clone.default, node)
            node.replace_all_uses_with(copy, delete_user_cb=partial(operator.is_not, copy))
            valued(copy)
    return written


def written_to(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs and weights that the graph writes in place."""
    return [node for node in graph.find_nodes(op="placeholder") if _is_changed(node)]


def _is_changed(node: fx.Node) -> bool:
    """Tell whether `node`, or a view of it, is written in place."""
    return any(_writes(user, node) or (is_view(user) and _is_changed(user)) for user in node.users)


def _writes(user: fx.Node, node: fx.Node) -> bool:
    if plain_name(user) in ("batch_norm", "instance_norm"):  # whose schemas do not say so
        given = arguments_of(user)
        running = given["running_mean"], given["running_var"]
        return node in running and bool(given.get("training", given.get("use_input_stats")))
    return is_mutating(user) and user.args[0] is node


def _is_written(node: fx.Node) -> bool:
    """Tell whether `node`, or a view of it, is written in place or leaves the graph."""
    for user in node.users:
        if not is_operator(user) or is_mutating(user):
            return True
        if is_view(user) and _is_written(user):
            return True
    return False


# -- sizes --------------------------------------------------------------------------------------


_SPLITTING = {
    _ATEN.split.Tensor,
    _ATEN.split_with_sizes.default,
    _ATEN.chunk.default,
    _ATEN.tensor_split.sections,
    _ATEN.tensor_split.indices,
}


def _spell_out(node: fx.Node, values: Values) -> None:
    """Make explicit what an operator would derive from a size, so that it can be edited."""
    if node.target in _SPLITTING:
        _spell_out_split(node)
    elif node.target is _ATEN.unbind.int:
        _take_one_by_one(node, _ATEN.select.int)
    elif node.target is _ATEN.index.Tensor:
        _spell_out_index(node, values)
    elif node.target is _ATEN.scaled_dot_product_attention.default:
        width = _value(node.args[0]).shape[-1]
        if node.kwargs.get("scale") is None and isinstance(width, int):
            node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(width)}
    elif node.target in (_ATEN.squeeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.dims):
        _spell_out_squeeze(node)
    elif node.target is _ATEN._weight_norm.default:
        _spell_out_weight_norm(node)
    elif node.target is _ATEN.rms_norm.default:
        epsilon = node.args[3] if len(node.args) > 3 else node.kwargs.get("eps")
        if epsilon is None:
            node.args = node.args[:3]
            node.kwargs = {**node.kwargs, "eps": torch.finfo(_value(node.args[0]).dtype).eps}


def _value(argument: object) -> Tensor:
    assert isinstance(argument, fx.Node)
    value = argument.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _spell_out_split(node: fx.Node) -> None:
    """Write pieces of one size, or a number of pieces, as pieces of explicit sizes."""
    dim: Any = arguments_of(node)["dim"]
    sizes = [piece.shape[dim] for piece in node.meta["val"]]
    if all(type(size) is int and size == 1 for size in sizes):
        _take_one_by_one(node, _ATEN.slice.Tensor)
    elif all(isinstance(size, int) for size in sizes):
        node.target = _ATEN.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _take_one_by_one(node: fx.Node, target: Any) -> None:
    """Take each index by itself, so that one of them may be removed without the others."""
    given = arguments_of(node)
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        end = (index + 1,) if target is _ATEN.slice.Tensor else ()  # type: ignore[operator]
        user.target, user.args = target, (given["self"], given["dim"], index, *end)
    node.graph.erase_node(node)


def _spell_out_squeeze(node: fx.Node) -> None:
    """Name the dimensions that have size 1 now: others may come to have it."""
    source = _value(node.args[0])
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", range(source.ndim))
    dims = [given] if isinstance(given, int) else list(given)
    dims = [dim for dim in dims if source.ndim and type(source.shape[dim]) is int]
    dims = [dim for dim in dims if source.shape[dim] == 1]
    if dims:
        node.target, node.args, node.kwargs = _ATEN.squeeze.dims, (node.args[0], dims), {}
    else:
        node.target, node.args, node.kwargs = _ATEN.alias.default, (node.args[0],), {}


def _spell_out_weight_norm(node: fx.Node) -> None:
    """Write the weight as the product of direction and length over norm."""
    direction, length, *rest = node.args
    kept, rank = (rest[0] if rest else node.kwargs.get("dim", 0)), _value(direction).ndim
    dims = [dim for dim in range(rank) if kept == -1 or dim != kept % rank]  # type: ignore[operator]

    def made(target: Any, *args: Any) -> fx.Node:
        return valued(made_from(node, target, *args))

    with node.graph.inserting_before(node):
        norm = made(_ATEN.linalg_vector_norm.default, direction, 2, dims, True)
        result = made(_ATEN.mul.Tensor, direction, made(_ATEN.div.Tensor, length, norm))
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _spell_out_index(node: fx.Node, values: Values) -> None:
    """Write neighboring indices that a constant picks as a slice."""
    source, picks = node.args
    chosen = [(dim, pick) for dim, pick in enumerate(picks) if pick is not None]  # type: ignore[arg-type]
    if len(chosen) != 1 or chosen[0][1] not in values:
        return
    (dim, pick), size = chosen[0], _value(source).shape[chosen[0][0]]
    indices = values[pick]
    if indices.ndim != 1 or indices.dtype != torch.int64 or not isinstance(size, int):
        return
    start = int(indices[0]) % size if len(indices) else 0
    if len(indices) and torch.equal(indices % size, torch.arange(start, start + len(indices))):
        node.target = _ATEN.slice.Tensor
        node.args = (source, dim, start, start + len(indices))
