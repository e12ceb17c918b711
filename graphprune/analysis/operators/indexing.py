"""Operators that pick elements by index, and operators that make tensors."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from graphprune.analysis.axes import Axis
from graphprune.analysis.operators.rule import Op, Type, Zero, rule


@rule("embedding.default", zero=Zero.KEEP)
def embedding(op: Op) -> Type:
    """Rows are picked by index; the rest of the table comes out."""
    table = op.type("weight")
    op.pick(table[0], op.arg("indices"), "rows")
    return (*op.type("indices"), *table[1:])


@rule("index.Tensor", zero=Zero.KEEP)
def index(op: Op) -> Type:
    """Elements are picked by index or mask along some axes, the others come through."""
    type_, shape = op.type("self"), op.shape()
    kept, lead, gone = _indexed(op)
    for dim, node in gone:
        if _is_mask(node):
            op.freeze(type_[dim], "its places are picked by a mask")
        else:
            op.pick(type_[dim], node)
    count = len(shape) - len(kept)
    places = shape[lead : lead + count]
    masks = [node for _, node in gone if _is_mask(node)]
    picked = op.broadcast(*(op.types[node] for _, node in gone if node not in masks), shape=places)
    for axis in itertools.chain(*(op.types[mask] for mask in masks), picked if masks else ()):
        op.freeze(axis, "picked by a mask")
    return (*kept[:lead], *picked, *kept[lead:])


@rule("index_put.default", zero=Zero.NEVER)
def index_put(op: Op) -> Type:
    """Elements are written by index or mask along some axes, the others are one."""
    type_, values = op.type("self"), op.type("values")
    kept, lead, gone = _indexed(op)
    for dim, node in gone:
        op.freeze(type_[dim], "places of it are written by index")
        for axis in op.types[node]:
            op.freeze(axis, "it writes places by index")
    count = max(1 if _is_mask(node) else len(op.types[node]) for _, node in gone)
    whole = (*kept[:lead], *[None] * count, *kept[lead:])
    for axis, other in zip(reversed(values), reversed(whole), strict=False):
        if other is None:
            op.freeze(axis, "it writes places by index")
        elif axis.size == other.size:
            op.unify(axis, other)
    op.vanishes_as((op.arg("self"),), (op.arg("values"),))
    return type_


def _indexed(op: Op) -> tuple[list[Axis], int, list[tuple[int, fx.Node]]]:
    """The axes that come through an index, what is picked comes after how many, (dim, index)."""
    gone: list[tuple[int, fx.Node]] = []
    dim = 0
    for node in op.arg("indices"):
        width = node.meta["val"].ndim if node is not None and _is_mask(node) else 1
        if node is not None:
            gone += [(dim + at, node) for at in range(width)]
        dim += width
    dims = [dim for dim, _ in gone]
    kept = [axis for dim, axis in enumerate(op.type("self")) if dim not in dims]
    lead = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return kept, lead, gone


@rule("where.default", "nonzero_numpy.default", zero=Zero.NEVER)
def places_of_mask(op: Op) -> list[Type | None]:
    """The places where a mask holds, along each of its axes, which are frozen."""
    for axis in op.types[op.operands()[0]]:
        op.freeze(axis, "places of it are found by a mask")
    return [(op.fixed(shape[0], "places that a mask finds"),) for shape in op.shapes(op.node)]


@rule("nonzero.default", zero=Zero.NEVER)
def coordinates_of_mask(op: Op) -> Type:
    """The places where a mask holds, a row for each; its axes are frozen."""
    for axis in op.type("self"):
        op.freeze(axis, "places of it are found by a mask")
    return tuple(op.fixed(size, "places that a mask finds") for size in op.shape())


def _is_mask(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


@rule("index_select.default", zero=Zero.KEEP)
def index_select(op: Op) -> Type:
    """Places of one axis are picked by index."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    op.pick(type_[dim], op.arg("index"))
    return (*type_[:dim], *op.type("index"), *type_[dim + 1 :])


@rule("gather.default", "take_along_dim.default", zero=Zero.NEVER)
def gather(op: Op) -> Type:
    """Places of one axis are picked by an index tensor, whose axes come out."""
    type_ = op.type("self")
    index = op.arg("index") if op.arg("index") is not None else op.arg("indices")
    picked = op.types[index]
    dim = op.dim("dim", len(type_))
    op.pick(type_[dim], index)
    _same_but(op, type_, picked, dim)
    return picked


def _same_but(op: Op, left: Type, right: Type, dim: int) -> None:
    for at, (ours, theirs) in enumerate(zip(left, right, strict=True)):
        if at == dim:
            continue
        if ours.size == theirs.size:
            op.unify(ours, theirs)
        else:
            op.freeze(ours, "only a part of it is picked")
            op.freeze(theirs, "it picks a part of another axis")


@rule("scatter.src", "scatter.value", "scatter_add.default", "scatter_reduce.two", zero=Zero.NEVER)
def scatter(op: Op) -> Type:
    """Values are put at places of one axis."""
    type_, picked = op.type("self"), op.type("index")
    dim = op.dim("dim", len(type_))
    op.pick(type_[dim], op.arg("index"))
    op.freeze(picked[dim], "it writes places by index")
    _same_but(op, type_, picked, dim)
    if isinstance(op.arg("src"), fx.Node):
        _same_but(op, picked, op.type("src"), -1)
        op.zero = Zero.JOIN
    elif op.arg("value") == 0:
        op.zero = Zero.KEEP
    return type_


@rule("index_add.default", "index_copy.default", zero=Zero.NEVER)
def index_add(op: Op) -> Type:
    """Slices are added at places of one axis, which is frozen."""
    type_, source = op.type("self"), op.type("source")
    dim = op.dim("dim", len(type_))
    op.freeze(type_[dim], "places of it are written by index")
    for axis in (source[dim], *op.type("index")):
        op.freeze(axis, "it writes places by index")
    _same_but(op, type_, source, dim)
    op.vanishes_as((op.arg("self"),), (op.arg("source"),))
    return type_


@rule("one_hot.default", zero=Zero.NEVER)
def one_hot(op: Op) -> Type:
    """Indices become places of a new axis."""
    axis = op.fresh(op.shape()[-1])
    op.pick(axis, op.arg("self"))
    op.weigh(axis)
    op.size_literal("num_classes", None, axis)
    return (*op.type("self"), axis)


@rule("tril.default", "triu.default", zero=Zero.KEEP)
def triangle(op: Op) -> Type:
    """Places of the last two axes are compared: both are frozen."""
    type_ = op.type("self")
    for axis in type_[-2:]:
        op.freeze(axis, "its places are compared with those of another axis")
    return type_


@rule("arange.default", "arange.start", "arange.start_step", "linspace.default", zero=Zero.NEVER)
@rule("eye.default", "eye.m", "scalar_tensor.default", "randperm.default", zero=Zero.NEVER)
@rule("tril_indices.default", "triu_indices.default", zero=Zero.NEVER)
def counting(op: Op) -> Type:
    """Values that tell their place: the axes are frozen."""
    return tuple(op.fixed(size, "its values count its places") for size in op.shape())


def _sized(op: Op) -> Type:
    type_: list[Axis] = [op.fresh(size) for size in op.shape()]
    op.size_literals("size", type_)
    return tuple(type_)


@rule("ones.default", "full.default", "empty.memory_format", "rand.default", zero=Zero.NEVER)
@rule("randn.default", "new_ones.default", "new_full.default", "new_empty.default", zero=Zero.NEVER)
def constant(op: Op) -> Type:
    """One value everywhere: new axes, whose sizes follow what they meet."""
    return _sized(op)


@rule("zeros.default", "new_zeros.default", zero=Zero.ALWAYS)
def zeros(op: Op) -> Type:
    """Zeros: new axes, whose sizes follow what they meet."""
    return _sized(op)
