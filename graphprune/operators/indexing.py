"""Operators that pick elements by index, and operators that make tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphprune.axes import Axis
from graphprune.operators.base import Op, Type, Zero, rule


@rule("embedding.default", zero=Zero.KEEP)
def embedding(op: Op) -> Type:
    """Rows are picked by index; the rest of the table comes out."""
    table = op.type("weight")
    op.pick(table[0], op.arg("indices"), "rows")
    return (*op.type("indices"), *table[1:])


@rule("index.Tensor", zero=Zero.NEVER)
def index(op: Op) -> Type:
    """Elements are picked by index along some axes, the others come through."""
    type_, given, shape = op.type("self"), op.arg("indices"), op.shape()
    at = [dim for dim, node in enumerate(given) if node is not None]
    masks = any(node is not None and "bool" in str(node.meta["val"].dtype) for node in given)
    for dim in at:
        op.pick(type_[dim], given[dim])
    kept = [axis for dim, axis in enumerate(type_) if dim not in at]
    count = len(shape) - len(kept)
    if masks or count < 0:
        for axis in (*type_, *(axis for dim in at for axis in op.types[given[dim]])):
            op.freeze(axis, "its places are picked by a mask")
        return tuple(op.fixed(size, "picked by a mask") for size in shape)
    op.zero = Zero.KEEP
    picked = op.broadcast(
        *(op.types[given[dim]] for dim in at), shape=_index_shape(shape, at, count)
    )
    lead = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return (*kept[:lead], *picked, *kept[lead:])


def _index_shape(shape: Sequence[int], at: list[int], count: int) -> Sequence[int]:
    lead = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return shape[lead : lead + count]


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
    op.zero = Zero.ALL
    return type_


@rule("one_hot.default", zero=Zero.NEVER)
def one_hot(op: Op) -> Type:
    """Indices become places of a new axis."""
    axis = op.fresh(op.shape()[-1])
    op.pick(axis, op.arg("self"))
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
