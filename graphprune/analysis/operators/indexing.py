"""Operators that pick elements by index, and operators that make tensors."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from graphprune.analysis.axes import Axis
from graphprune.analysis.operators.facts import Type, ZeroRule
from graphprune.analysis.operators.rule import RuleContext, rule


@rule("embedding.default", zero=ZeroRule.AS_FIRST)
def embedding(ctx: RuleContext) -> Type:
    """Rows are picked by index; the rest of the table comes out."""
    table = ctx.type("weight")
    ctx.pick(table[0], ctx.arg("indices"), "rows")
    return (*ctx.type("indices"), *table[1:])


@rule("index.Tensor", zero=ZeroRule.AS_FIRST)
def index(ctx: RuleContext) -> Type:
    """Elements are picked by index or mask along some axes, the others come through."""
    type_, shape = ctx.type("self"), ctx.shape()
    kept, lead, gone = _indexed(ctx)
    for dim, node in gone:
        if _is_mask(node):
            ctx.freeze(type_[dim], "its positions are picked by a mask")
        else:
            ctx.pick(type_[dim], node)
    count = len(shape) - len(kept)
    found = shape[lead : lead + count]
    masks = [node for _, node in gone if _is_mask(node)]
    picked = ctx.broadcast(*(ctx.types[node] for _, node in gone if node not in masks), shape=found)
    for axis in itertools.chain(*(ctx.types[mask] for mask in masks), picked if masks else ()):
        ctx.freeze(axis, "picked by a mask")
    return (*kept[:lead], *picked, *kept[lead:])


@rule("index_put.default", zero=ZeroRule.NEVER)
def index_put(ctx: RuleContext) -> Type:
    """Elements are written by index or mask along some axes, the others are one."""
    type_, values = ctx.type("self"), ctx.type("values")
    kept, lead, gone = _indexed(ctx)
    for dim, node in gone:
        ctx.freeze(type_[dim], "positions of it are written by index")
        for axis in ctx.types[node]:
            ctx.freeze(axis, "it writes positions by index")
    count = max(1 if _is_mask(node) else len(ctx.types[node]) for _, node in gone)
    whole = (*kept[:lead], *[None] * count, *kept[lead:])
    for axis, other in zip(reversed(values), reversed(whole), strict=False):
        if other is None:
            ctx.freeze(axis, "it writes positions by index")
        elif axis.size == other.size:
            ctx.unify(axis, other)
    ctx.zero_where((ctx.arg("self"),), (ctx.arg("values"),))
    return type_


def _indexed(ctx: RuleContext) -> tuple[list[Axis], int, list[tuple[int, fx.Node]]]:
    """Return the axes that come through, how many stand before what is picked, (dim, index)."""
    gone: list[tuple[int, fx.Node]] = []
    dim = 0
    for node in ctx.arg("indices"):
        width = node.meta["val"].ndim if node is not None and _is_mask(node) else 1
        if node is not None:
            gone += [(dim + at, node) for at in range(width)]
        dim += width
    dims = [dim for dim, _ in gone]
    kept = [axis for dim, axis in enumerate(ctx.type("self")) if dim not in dims]
    lead = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return kept, lead, gone


@rule("where.default", "nonzero_numpy.default", zero=ZeroRule.NEVER)
def positions_of_mask(ctx: RuleContext) -> list[Type | None]:
    """The indices where a mask holds, along each of its axes, which are frozen."""
    for axis in ctx.types[ctx.operands()[0]]:
        ctx.freeze(axis, "positions of it are found by a mask")
    return [(ctx.fixed(shape[0], "positions that a mask finds"),) for shape in ctx.shapes(ctx.node)]


@rule("nonzero.default", zero=ZeroRule.NEVER)
def coordinates_of_mask(ctx: RuleContext) -> Type:
    """The indices where a mask holds, a row for each; its axes are frozen."""
    for axis in ctx.type("self"):
        ctx.freeze(axis, "positions of it are found by a mask")
    return tuple(ctx.fixed(size, "positions that a mask finds") for size in ctx.shape())


def _is_mask(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


@rule("index_select.default", zero=ZeroRule.AS_FIRST)
def index_select(ctx: RuleContext) -> Type:
    """Places of one axis are picked by index."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    ctx.pick(type_[dim], ctx.arg("index"))
    return (*type_[:dim], *ctx.type("index"), *type_[dim + 1 :])


@rule("gather.default", "take_along_dim.default", zero=ZeroRule.NEVER)
def gather(ctx: RuleContext) -> Type:
    """Places of one axis are picked by an index tensor, whose axes come out."""
    type_ = ctx.type("self")
    index = ctx.arg("index") if ctx.arg("index") is not None else ctx.arg("indices")
    picked = ctx.types[index]
    dim = ctx.dim("dim", len(type_))
    ctx.pick(type_[dim], index)
    _same_but(ctx, type_, picked, dim)
    return picked


def _same_but(ctx: RuleContext, left: Type, right: Type, dim: int) -> None:
    for at, (ours, theirs) in enumerate(zip(left, right, strict=True)):
        if at == dim:
            continue
        if ours.size == theirs.size:
            ctx.unify(ours, theirs)
        else:
            ctx.freeze(ours, "only a part of it is picked")
            ctx.freeze(theirs, "it picks a part of another axis")


@rule(
    "scatter.src", "scatter.value", "scatter_add.default", "scatter_reduce.two", zero=ZeroRule.NEVER
)
def scatter(ctx: RuleContext) -> Type:
    """Values are put at indices of one axis."""
    type_, picked = ctx.type("self"), ctx.type("index")
    dim = ctx.dim("dim", len(type_))
    ctx.pick(type_[dim], ctx.arg("index"))
    ctx.freeze(picked[dim], "it writes positions by index")
    _same_but(ctx, type_, picked, dim)
    if isinstance(ctx.arg("src"), fx.Node):
        _same_but(ctx, picked, ctx.type("src"), -1)
        ctx.zero = ZeroRule.ALL_HOLDERS
    elif ctx.arg("value") == 0:
        ctx.zero = ZeroRule.AS_FIRST
    return type_


@rule("index_add.default", "index_copy.default", zero=ZeroRule.NEVER)
def index_add(ctx: RuleContext) -> Type:
    """Slices are added at indices of one axis, which is frozen."""
    type_, source = ctx.type("self"), ctx.type("source")
    dim = ctx.dim("dim", len(type_))
    ctx.freeze(type_[dim], "positions of it are written by index")
    for axis in (source[dim], *ctx.type("index")):
        ctx.freeze(axis, "it writes positions by index")
    _same_but(ctx, type_, source, dim)
    ctx.zero_where((ctx.arg("self"),), (ctx.arg("source"),))
    return type_


@rule("one_hot.default", zero=ZeroRule.NEVER)
def one_hot(ctx: RuleContext) -> Type:
    """Class numbers become indices of a new axis."""
    axis = ctx.fresh(ctx.shape()[-1])
    ctx.pick(axis, ctx.arg("self"))
    ctx.weight_routing(axis)
    ctx.size_literal("num_classes", None, axis)
    return (*ctx.type("self"), axis)


@rule("tril.default", "triu.default", zero=ZeroRule.AS_FIRST)
def triangle(ctx: RuleContext) -> Type:
    """Places of the last two axes are compared: both are frozen."""
    type_ = ctx.type("self")
    for axis in type_[-2:]:
        ctx.freeze(axis, "its positions are compared with those of another axis")
    return type_


@rule(
    "arange.default", "arange.start", "arange.start_step", "linspace.default", zero=ZeroRule.NEVER
)
@rule("eye.default", "eye.m", "scalar_tensor.default", "randperm.default", zero=ZeroRule.NEVER)
@rule("tril_indices.default", "triu_indices.default", zero=ZeroRule.NEVER)
def counting(ctx: RuleContext) -> Type:
    """Values that tell their index: the axes are frozen."""
    return tuple(ctx.fixed(size, "its values count its positions") for size in ctx.shape())


def _sized(ctx: RuleContext) -> Type:
    type_: list[Axis] = [ctx.fresh(size) for size in ctx.shape()]
    ctx.size_literals("size", type_)
    return tuple(type_)


@rule("ones.default", "full.default", "empty.memory_format", "rand.default", zero=ZeroRule.NEVER)
@rule(
    "randn.default",
    "new_ones.default",
    "new_full.default",
    "new_empty.default",
    zero=ZeroRule.NEVER,
)
def constant(ctx: RuleContext) -> Type:
    """One value everywhere: new axes, whose sizes follow what they meet."""
    return _sized(ctx)


@rule("zeros.default", "new_zeros.default", zero=ZeroRule.ALWAYS)
def zeros(ctx: RuleContext) -> Type:
    """Zeros: new axes, whose sizes follow what they meet."""
    return _sized(ctx)
