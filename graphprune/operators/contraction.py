"""Operators that multiply and sum: linear, matrix products, einsum, attention, convolutions."""

from __future__ import annotations

from torch import fx

from graphprune.axes import UNIT, Axis
from graphprune.operators.base import Attention, Op, Type, Zero, rule


@rule("linear.default", zero=Zero.ANY)
def linear(op: Op) -> Type:
    """The input's last axis is the weight's second; the weight's first comes out."""
    type_, weight = op.type("input"), op.type("weight")
    bias = op.arg("bias")
    op.unify(type_[-1], weight[-1])
    op.contract(type_[-1], op.arg("input"), op.arg("weight"))
    op.mark("linear", type_[-1])
    if len(weight) == 1:
        return type_[:-1]
    if bias is not None:
        op.unify(weight[0], op.types[bias][0])
    op.vanishes_as((op.arg("input"), op.arg("weight")), (bias,))
    return (*type_[:-1], weight[0])


@rule("matmul.default", "bmm.default", "mm.default", "mv.default", "dot.default", zero=Zero.ANY)
def matmul(op: Op) -> Type:
    """The left's last axis is the right's last but one; batch axes are one after broadcasting."""
    first, second = op.operands() if len(op.operands()) == 2 else op.operands() * 2
    return _product(op, op.types[first], op.types[second], (first, second))


def _product(op: Op, left: Type, right: Type, nodes: tuple[fx.Node, ...]) -> Type:
    contracted = right[-2] if len(right) > 1 else right[0]
    op.unify(left[-1], contracted)
    op.contract(left[-1], *nodes)
    op.mark("linear", left[-1])
    rows = left[-2:-1] if len(left) > 1 else ()
    columns = right[-1:] if len(right) > 1 else ()
    shape = op.shape()
    batch_rank = len(shape) - len(rows) - len(columns)
    sides = (left[:-2],) if op.apart else (left[:-2], right[:-2])
    batch = op.broadcast(*sides, shape=shape[:batch_rank])
    return (*batch, *rows, *columns)


@rule("addmm.default", "baddbmm.default", "addbmm.default", zero=Zero.ANY)
def add_matmul(op: Op) -> Type:
    """A matrix product plus a tensor that broadcasts."""
    names = ("mat1", "mat2") if op.arg("mat1") is not None else ("batch1", "batch2")
    left, right = (op.arg(name) for name in names)
    type_ = _product(op, op.types[left], op.types[right], (left, right))
    op.vanishes_as((left, right), (op.arg("self"),))
    return op.broadcast(type_, op.type("self"))


@rule("einsum.default", zero=Zero.ANY)
def einsum(op: Op) -> Type:
    """One axis for each letter; letters that do not come out are summed over."""
    equation = op.arg("equation").replace(" ", "")
    nodes = op.arg("tensors")
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if "..." in equation or "->" not in equation or any(len(set(t)) < len(t) for t in terms):
        return _all_frozen(op, f"einsum equation {op.arg('equation')!r} is not ruled")
    letters: dict[str, Axis] = {}
    holders: dict[str, list[fx.Node]] = {}
    for term, node in zip(terms, nodes, strict=True):
        for letter, axis in zip(term, op.types[node], strict=True):
            if axis is UNIT and letter in letters:
                continue
            if letters.get(letter, UNIT) is UNIT:
                letters[letter] = axis
            op.unify(letters[letter], axis)
            holders.setdefault(letter, []).append(node)
    for letter, axis in letters.items():
        if letter not in output:
            op.contract(axis, *holders.get(letter, []))
            op.mark("linear", axis)
    return tuple(letters[letter] for letter in output)


def _all_frozen(op: Op, why: str) -> Type:
    for node in op.operands():
        for axis in op.types[node]:
            op.freeze(axis, why)
    op.zero = Zero.NEVER
    return tuple(op.fixed(size, why) for size in op.shape())


@rule("scaled_dot_product_attention.default", zero=Zero.ANY)
def attention(op: Op) -> Type:
    """softmax(q k^T) v: batch axes are heads; query and key share their last axis."""
    query, key, value = (op.arg(name) for name in ("query", "key", "value"))
    q, k, v = (op.types[node] for node in (query, key, value))
    op.unify(q[-1], k[-1])
    op.unify(k[-2], v[-2])
    op.contract(q[-1], query, key)
    op.freeze(k[-2], "softmax runs over it")
    for key_axis, value_axis in zip(k[:-2], v[:-2], strict=True):
        op.unify(key_axis, value_axis)
    sides = (q[:-2],) if op.apart else (q[:-2], v[:-2])
    heads = op.broadcast(*sides, shape=[axis.size for axis in q[:-2]])
    if op.arg("enable_gqa") and not op.apart and q[-3].size != k[-3].size:
        slots = op.fresh(q[-3].size // k[-3].size)
        op.mark("spread", slots)
        op.unify(q[-3], op.axes.product(k[-3], slots))
    if op.arg("attn_mask") is not None:
        scores = (*heads, q[-2], k[-2])
        op.broadcast(scores, op.type("attn_mask"), shape=[axis.size for axis in scores])
    products = (op.node, op.node)
    op.facts.attentions.append(Attention(products, heads, q[-1], v[-1], (query, key, value)))
    # The weights of a head sum to one, so the result vanishes where its values do.
    op.vanishes_as((value,))
    return (*heads, q[-2], v[-1])


@rule("conv1d.default", "conv2d.default", "conv3d.default", zero=Zero.ANY)
@rule("conv2d.padding", "conv1d.padding", zero=Zero.ANY)
def convolution(op: Op) -> Type:
    """Channels are contracted, in groups where there are some; places are fixed."""
    type_, weight, shape = op.type("input"), op.type("weight"), op.shape()
    spatial = len(weight) - 2
    at = len(type_) - spatial - 1
    groups = op.arg("groups") or 1
    if isinstance(groups, fx.Node):
        return _all_frozen(op, "it is convolved in a dynamic number of groups")
    kernel = weight[2:]
    for axis in kernel:
        op.freeze(axis, "places of a kernel")
    for axis in type_[at + 1 :]:
        op.freeze(axis, "places of an image")
    out = weight[0]
    if groups == 1:
        op.unify(type_[at], weight[1])
        op.contract(type_[at], op.arg("input"), op.arg("weight"))
        op.mark("convolved", type_[at])
    else:
        group = op.fresh(groups)
        op.unify(type_[at], op.axes.product(group, weight[1]))
        op.unify(out, op.axes.product(group, op.fresh(out.size // groups)))
        op.contract(weight[1], op.arg("input"), op.arg("weight"))
        op.mark("convolved", weight[1])
        op.mark("convolved", group)
        op.size_literal("groups", None, group)
    if op.arg("bias") is not None:
        op.unify(out, op.type("bias")[0])
    op.vanishes_as((op.arg("input"), op.arg("weight")), (op.arg("bias"),))
    places = [op.fixed(size, "places of an image") for size in shape[at + 1 :]]
    return (*type_[:at], out, *places)


@rule("conv_transpose1d.default", "conv_transpose2d.input", zero=Zero.ANY)
@rule("conv_transpose3d.input", zero=Zero.ANY)
def transposed_convolution(op: Op) -> Type:
    """As a convolution, with the weight's first two axes exchanged."""
    type_, weight, shape = op.type("input"), op.type("weight"), op.shape()
    at = len(type_) - (len(weight) - 2) - 1
    groups = op.arg("groups") or 1
    if isinstance(groups, fx.Node):
        return _all_frozen(op, "it is convolved in a dynamic number of groups")
    for axis in (*weight[2:], *type_[at + 1 :]):
        op.freeze(axis, "places of a kernel or an image")
    op.unify(type_[at], weight[0])
    if groups == 1:
        out = weight[1]
    else:
        (group, _) = op.factor(weight[0], (groups, weight[0].size // groups))
        out = op.axes.product(group, weight[1])
        op.size_literal("groups", None, group)
    op.contract(type_[at], op.arg("input"), op.arg("weight"))
    op.mark("convolved", type_[at])
    if op.arg("bias") is not None:
        op.unify(out, op.type("bias")[0])
    op.vanishes_as((op.arg("input"), op.arg("weight")), (op.arg("bias"),))
    places = [op.fixed(size, "places of an image") for size in shape[at + 1 :]]
    return (*type_[:at], out, *places)
