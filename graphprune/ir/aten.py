"""Facts about ATen operators, other than how they type axes: names, and sets of one kind.

Sets hold names as `name_of` gives them: every overload is meant, and no in-place form.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx

from graphprune.ir.nodes import arguments_of

# fmt: off
CASTS = frozenset({"to", "_to_copy", "type_as"})
"""The same values in the same order, in another type or on another device."""

COPIES = CASTS | {
    "clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy", "resolve_conj",
    "resolve_neg", "pin_memory",
}
"""The same values in the same order."""

RESHAPES = frozenset({
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "ravel", "unflatten",
    "unsqueeze", "squeeze",
})
"""The same values in the same order, with other sizes."""

PERMUTES = frozenset({
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "numpy_T", "mT",
})
"""The same values with the axes in another order."""

PARTS = frozenset({"slice", "select", "narrow"})
"""Some of the values, picked by numbers that the call holds."""

REPEATS = frozenset({"expand", "expand_as", "repeat", "repeat_interleave"})
"""The same values, some of them several times."""

MOVES = COPIES | RESHAPES | PERMUTES | PARTS | REPEATS
"""What changes no value, only where it lies, whether it stays, and how often."""

SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})
"""Several results, which hold each value once."""

PRODUCTS = frozenset({"mm", "bmm", "matmul"})
"""Matrix products of two operands and nothing else."""

RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
"""Whole recurrent layers, of several levels and one or two directions."""

LOOKUPS = frozenset({"embedding", "index", "index_select"})
"""Rows of the first operand picked by the values of another."""
# fmt: on


def name_of(node: fx.Node) -> str:
    """Return an operator's name without namespace and overload; "" for what is no operator.

    Examples
    --------
    >>> graph = torch.fx.Graph()
    >>> name_of(graph.call_function(torch.ops.aten.add.Tensor))
    'add'
    """
    return str(node.target).split(".")[1] if is_operator(node) else ""


def plain_name(node: fx.Node) -> str:
    """Return `name_of` without the mark of in-place forms: where it does not matter who writes."""
    return rule_name(node.target).partition(".")[0] if is_operator(node) else ""


@cache
def rule_name(target: Any) -> str:
    """Return the name that rules are found by, which an operator and its in-place form share.

    Examples
    --------
    >>> rule_name(torch.ops.aten.add_.Tensor)
    'add.Tensor'
    """
    if not isinstance(target, torch._ops.OpOverload):
        return str(target)
    _, base, overload = str(target).split(".")
    is_marked = base.endswith("_") and not base.endswith("__")
    return f"{base[:-1] if is_marked else base}.{overload}"


def printed_name(target: Any) -> str:
    """Return the name for people: ``aten.linear.default``, or ``getitem`` for Python's own."""
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return str(getattr(target, "__name__", target))


def is_operator(node: fx.Node) -> bool:
    """Return whether `node` calls an operator of torch."""
    return isinstance(node.target, torch._ops.OpOverload)


def is_mutating(node: fx.Node) -> bool:
    """Return whether `node` writes into one of its inputs."""
    # `detach_` is marked so, and changes what autograd records of a tensor, not its values.
    return (
        is_operator(node)
        and node.target._schema.is_mutable  # type: ignore[union-attr]
        and node.target is not torch.ops.aten.detach_.default
    )


def is_view(node: fx.Node) -> bool:
    """Return whether the result of `node` may share the memory of its first input."""
    if not is_operator(node):
        return False
    first = node.target._schema.arguments[:1]  # type: ignore[union-attr]
    return any(argument.alias_info is not None for argument in first)


def is_random(node: fx.Node) -> bool:
    """Return whether `node` draws from a generator."""
    is_seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return is_seeded and not _drops_nothing(node)


def _drops_nothing(node: fx.Node) -> bool:
    """Return whether `node` only draws a dropout that is off: its own, or of attention, an LSTM."""
    given = arguments_of(node)
    rates = [given[name] for name in ("p", "dropout", "dropout_p") if name in given]
    return bool(rates) and (not rates[0] or not given.get("train", True))


def random_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that draw from a generator, in order."""
    return [node for node in graph.nodes if is_random(node)]


_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})


def is_idle_dropout(node: fx.Node) -> bool:
    """Return whether `node` is a dropout that drops nothing: not training, or of probability 0."""
    return name_of(node) in _DROPOUTS and _drops_nothing(node)


def is_copy(node: fx.Node) -> bool:
    """Return whether `node` has the values of its first input in the same order.

    A dropout that is at work changes values, and is none.
    """
    return name_of(node) in COPIES or is_idle_dropout(node)


def uncopied(node: fx.Node) -> fx.Node:
    """Return the value that `node` is a copy of, however often it was copied."""
    while is_copy(node):
        node = node.all_input_nodes[0]
    return node
