"""Complex arithmetic in a graph, written in real numbers.

Rotary embeddings are often computed by complex products. Neither ONNX nor most kernels know them,
and the real and imaginary parts of one number are two indices of an axis that must not be parted.
So every complex value becomes a pair of real ones, and the numbers are the same to the last bit but
for the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.ir.aten import CASTS, MOVES, is_mutating, name_of
from graphprune.ir.nodes import made_from, valued

_ATEN = torch.ops.aten

Pair = tuple[fx.Node, fx.Node]
"""The real and the imaginary part."""

_LINEAR = {_ATEN.neg.default, _ATEN.add.Tensor, _ATEN.sub.Tensor}
"""Operators that compute the two parts alike, each by itself; so does what only moves values."""

_REAL_TYPES = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def write_in_reals(graph: fx.Graph) -> None:
    """Replace every complex value of `graph` by two real ones, or none if one cannot be."""
    given = [node for node in graph.find_nodes(op="placeholder") if _is_complex(node)]
    inside = [node for node in graph.nodes if _is_complex(node) and node not in given]
    leaving = {user for node in given + inside for user in node.users if not _is_complex(user)}
    if not inside or not all(map(_is_known, (*inside, *leaving))):
        return
    pairs: dict[fx.Node, Pair] = {}
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        for node in given:
            parts = valued(made_from(node, _ATEN.view_as_real.default, node))
            pairs[node] = _halves(node, parts)
    computed = {*inside, *leaving}
    for node in list(graph.nodes):
        if node in computed:
            with graph.inserting_before(node):
                made = _Parts(node, pairs).make()
            if isinstance(made, tuple):
                pairs[node] = made
            else:
                node.replace_all_uses_with(made)
    for node in reversed(list(graph.nodes)):
        if node in computed:
            graph.erase_node(node)


def _halves(origin: fx.Node, parts: object) -> Pair:
    """Return what stands first and second in the last dimension of `parts`."""
    select = _ATEN.select.int
    real, imaginary = (valued(made_from(origin, select, parts, -1, at)) for at in (0, 1))
    return real, imaginary


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _is_known(node: fx.Node) -> bool:
    if _is_each(node):
        both = node.target not in (_ATEN.add.Tensor, _ATEN.sub.Tensor)
        return both or all(isinstance(a, fx.Node) and _is_complex(a) for a in node.args)
    return node.target in _RULES


def _is_each(node: fx.Node) -> bool:
    """Return whether each part of the result is computed of that part of the operands."""
    moves = name_of(node) in (MOVES - CASTS) | {"index", "index_select"}
    return node.target in _LINEAR or (moves and not is_mutating(node))


class _Parts:
    """Makes the two parts of one complex node, or the real value that it computes of some."""

    def __init__(self, node: fx.Node, pairs: dict[fx.Node, Pair]) -> None:
        self.node = node
        self.pairs = pairs

    def make(self) -> Pair | fx.Node:
        if _is_each(self.node):
            return self._each(0), self._each(1)
        return _RULES[self.node.target](self)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a node with its value and the provenance of the old one."""
        return valued(made_from(self.node, target, *args, **kwargs))

    def _each(self, part: int) -> fx.Node:
        args, kwargs = fx.map_arg(
            (self.node.args, self.node.kwargs),
            lambda other: self.pairs[other][part] if other in self.pairs else other,
        )
        return self.call(self.node.target, *args, **kwargs)

    def pair(self) -> Pair:
        """Return the parts of the first argument."""
        argument = self.node.args[0]
        assert isinstance(argument, fx.Node)
        return self.pairs[argument]

    # -- rules ----------------------------------------------------------------------------------

    def polar(self) -> Pair:
        length, angle = self.node.args
        cosine, sine = self.call(_ATEN.cos.default, angle), self.call(_ATEN.sin.default, angle)
        multiply = _ATEN.mul.Tensor
        return self.call(multiply, length, cosine), self.call(multiply, length, sine)

    def from_parts(self) -> Pair:
        real, imaginary = self.node.args
        assert isinstance(real, fx.Node)
        assert isinstance(imaginary, fx.Node)
        return real, imaginary

    def from_real(self) -> Pair:
        return _halves(self.node, self.node.args[0])

    def to_real(self) -> fx.Node:
        return self.call(_ATEN.stack.default, list(self.pair()), -1)

    def real(self) -> fx.Node:
        return self.call(_ATEN.clone.default, self.pair()[0])

    def imaginary(self) -> fx.Node:
        return self.call(_ATEN.clone.default, self.pair()[1])

    def absolute(self) -> fx.Node:
        real, imaginary = (self.call(_ATEN.square.default, part) for part in self.pair())
        return self.call(_ATEN.sqrt.default, self.call(_ATEN.add.Tensor, real, imaginary))

    def conjugate(self) -> Pair:
        real, imaginary = self.pair()
        return real, self.call(_ATEN.neg.default, imaginary)

    def cast(self) -> Pair:
        dtype = _REAL_TYPES[self.node.meta["val"].dtype]
        real, imaginary = self.pair()
        if real.meta["val"].dtype == dtype:
            return real, imaginary
        return self.call(_ATEN.to.dtype, real, dtype), self.call(_ATEN.to.dtype, imaginary, dtype)

    def multiply(self) -> Pair:
        left, right = self.node.args
        multiply = _ATEN.mul.Tensor
        if left in self.pairs and right in self.pairs:
            (a, b), (c, d) = self.pairs[left], self.pairs[right]  # type: ignore[index]
            real = self.call(_ATEN.sub.Tensor, self.call(multiply, a, c), self.call(multiply, b, d))
            return real, self.call(
                _ATEN.add.Tensor, self.call(multiply, a, d), self.call(multiply, b, c)
            )
        parts, factor = (left, right) if left in self.pairs else (right, left)
        a, b = self.pairs[parts]  # type: ignore[index]
        return self.call(multiply, a, factor), self.call(multiply, b, factor)


_RULES: dict[Any, Callable[[_Parts], Pair | fx.Node]] = {
    _ATEN.polar.default: _Parts.polar,
    _ATEN.complex.default: _Parts.from_parts,
    _ATEN.view_as_complex.default: _Parts.from_real,
    _ATEN.view_as_real.default: _Parts.to_real,
    _ATEN.real.default: _Parts.real,
    _ATEN.imag.default: _Parts.imaginary,
    _ATEN.abs.default: _Parts.absolute,
    _ATEN.conj.default: _Parts.conjugate,
    _ATEN._conj.default: _Parts.conjugate,
    _ATEN.to.dtype: _Parts.cast,
    _ATEN.to.device: _Parts.cast,
    _ATEN.to.dtype_layout: _Parts.cast,
    _ATEN._to_copy.default: _Parts.cast,
    _ATEN.mul.Tensor: _Parts.multiply,
    _ATEN.mul.Scalar: _Parts.multiply,
}
