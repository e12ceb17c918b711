"""Operators that reduce, normalize or order along axes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from graphprune.analysis.axes import UNIT, Axis
from graphprune.analysis.operators.centering import is_center, is_of_centered
from graphprune.analysis.operators.facts import MeanLiteral, Type, ZeroRule
from graphprune.analysis.operators.rule import RuleContext, rule
from graphprune.ir.aten import name_of


def _reduced(ctx: RuleContext, type_: Type, dims: Iterable[int]) -> Type:
    keep = bool(ctx.arg("keepdim"))
    gone = set(dims)
    kept = [(UNIT if dim in gone else axis) for dim, axis in enumerate(type_)]
    return tuple(a for dim, a in enumerate(kept) if keep or dim not in gone)


@rule("sum.dim_IntList", "sum.default", "linalg_vector_norm.default", zero=ZeroRule.AS_FIRST)
@rule("norm.ScalarOpt_dim", "nansum.default", "count_nonzero.dim_IntList", zero=ZeroRule.AS_FIRST)
def sum_(ctx: RuleContext) -> Type:
    """Sums and norms: exact where what is removed is zero."""
    type_ = ctx.types[ctx.operands()[0]]
    dims = ctx.dims("dim", len(type_))
    order = ctx.arg("ord") if ctx.arg("ord") is not None else ctx.arg("p")
    for dim in dims:
        if order is not None and order <= 0:
            ctx.freeze(type_[dim], f"a norm of order {order} is taken over it")
        ctx.contract(type_[dim], ctx.operands()[0])
    return _reduced(ctx, type_, dims)


@rule("mean.dim", "mean.default", zero=ZeroRule.AS_FIRST)
def mean(ctx: RuleContext) -> Type:
    """Means: rescaled by new/old size, exact where what is removed is zero."""
    type_ = ctx.type("self")
    dims = ctx.dims("dim", len(type_))
    approximate = is_center(ctx.node) or is_of_centered(ctx.node)
    for dim in dims:
        if approximate:
            ctx.statistic(type_[dim], dim)
            continue
        ctx.contract(type_[dim], ctx.operands()[0])
        if type_[dim] is not UNIT:
            ctx.facts.means.append(MeanLiteral(ctx.node, type_[dim], "mean"))
    return _reduced(ctx, type_, dims)


@rule(
    "var.dim", "var.correction", "std.dim", "std.correction", "var.default", zero=ZeroRule.AS_FIRST
)
@rule("std.default", zero=ZeroRule.AS_FIRST)
def variance(ctx: RuleContext) -> Type:
    """Variances: approximate, they are of what stays."""
    type_ = ctx.type("self")
    dims = ctx.dims("dim", len(type_))
    correction = ctx.arg("correction") if ctx.arg("unbiased") is None else int(ctx.arg("unbiased"))
    least = 1 + math.ceil(1 if correction is None else correction)
    for dim in dims:
        ctx.statistic(type_[dim], dim, min_units=least)
    return _reduced(ctx, type_, dims)


@rule(
    "var_mean.correction",
    "std_mean.correction",
    "var_mean.dim",
    "std_mean.dim",
    zero=ZeroRule.AS_FIRST,
)
def variance_and_mean(ctx: RuleContext) -> list[Type | None]:
    """Variances with their means: approximate, they are of what stays."""
    type_ = variance(ctx)
    return [type_, type_]


@rule("amax.default", "amin.default", "all.dim", "all.default", "all.dims", zero=ZeroRule.NEVER)
@rule("max.default", "min.default", zero=ZeroRule.NEVER)
@rule("argmin.default", "prod.dim_int", "prod.default", "logsumexp.default", zero=ZeroRule.NEVER)
def extreme(ctx: RuleContext) -> Type:
    """Extremes and logic over axes, which are frozen: a zero where a value was may win."""
    type_ = ctx.types[ctx.operands()[0]]
    dims = ctx.dims("dim", len(type_))
    for dim in dims:
        ctx.freeze(type_[dim], f"{name_of(ctx.node)} runs over it")
    return _reduced(ctx, type_, dims)


@rule("any.default", "any.dim", "any.dims", zero=ZeroRule.AS_FIRST)
def any_(ctx: RuleContext) -> Type:
    """A test for any or all: the axes are frozen."""
    return extreme(ctx)


@rule("max.dim", zero=ZeroRule.NEVER)
def largest(ctx: RuleContext) -> list[Type | None]:
    """The largest of an axis with its index, which is chosen from."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    ctx.route(dim, "max runs over it")
    ctx.hold_unit_numbers(type_[dim], 1)
    result = _reduced(ctx, type_, (dim,))
    return [result, result]


@rule("min.dim", "median.dim", "mode.default", zero=ZeroRule.NEVER)
def extreme_with_index(ctx: RuleContext) -> list[Type | None]:
    """Extremes with their indices: the axis is frozen."""
    type_ = extreme(ctx)
    return [type_, type_]


@rule("argmax.default", zero=ZeroRule.NEVER)
def index_of_largest(ctx: RuleContext) -> Type:
    """The index of the largest of an axis, which is chosen from."""
    type_ = ctx.type("self")
    if ctx.arg("dim") is None:
        return extreme(ctx)
    dim = ctx.dim("dim", len(type_))
    ctx.route(dim, "argmax runs over it")
    ctx.hold_unit_numbers(type_[dim])
    return _reduced(ctx, type_, (dim,))


@rule("softmax.int", "_softmax.default", zero=ZeroRule.NEVER)
def softmax(ctx: RuleContext) -> Type:
    """Softmax: the axis is chosen from, the others stay."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    ctx.route(dim, "softmax runs over it")
    ctx.weight_routing(type_[dim])
    ctx.use("softmax", type_[dim])
    return type_


@rule("log_softmax.int", "_log_softmax.default", zero=ZeroRule.NEVER)
@rule("cumsum.default", "cumprod.default", "logcumsumexp.default", zero=ZeroRule.NEVER)
def normalized(ctx: RuleContext) -> Type:
    """Running sums and the like: the axis is frozen, the others stay."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    ctx.freeze(type_[dim], f"{name_of(ctx.node)} runs over it")
    return type_


@rule("linear_recurrence.default", zero=ZeroRule.AS_FIRST)
def recurrence(ctx: RuleContext) -> Type:
    """A state that fades from place to place: their axis is frozen, the others stay."""
    type_ = ctx.broadcast(ctx.type("update"), ctx.type("decay"))
    ctx.freeze(type_[ctx.dim("dim", len(type_))], "a recurrence runs over it")
    return type_


@rule("max_recurrence.default", zero=ZeroRule.NEVER)
def largest_so_far(ctx: RuleContext) -> Type:
    """The largest so far, which fades from place to place: their axis is frozen."""
    return recurrence(ctx)


@rule("argsort.default", "argsort.stable", zero=ZeroRule.NEVER)
def order(ctx: RuleContext) -> Type:
    """Ordering: the axis is frozen."""
    return normalized(ctx)


@rule("sort.default", "sort.stable", "cummax.default", "cummin.default", zero=ZeroRule.NEVER)
def order_with_index(ctx: RuleContext) -> list[Type | None]:
    """Ordering with indices: the axis is frozen."""
    type_ = normalized(ctx)
    return [type_, type_]


@rule("topk.default", zero=ZeroRule.NEVER)
def top(ctx: RuleContext) -> list[Type | None]:
    """The largest few of an axis, which is chosen from; their number is fixed."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_)) if ctx.arg("dim") is not None else len(type_) - 1
    count = ctx.shapes(ctx.node)[0][dim]
    why = "the largest of it are picked"
    if ctx.arg("largest") is False:
        ctx.freeze(type_[dim], why)
    ctx.route(dim, why, min_units=count)
    ctx.hold_unit_numbers(type_[dim], 1)
    kept = ctx.fixed(count, "the number that is picked")
    result = (*type_[:dim], kept, *type_[dim + 1 :])
    return [result, result]


@rule("kthvalue.default", zero=ZeroRule.NEVER)
def ranked(ctx: RuleContext) -> list[Type | None]:
    """The k-th smallest of an axis, which is frozen."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    ctx.freeze(type_[dim], "the k-th of it is picked")
    result = _reduced(ctx, type_, (dim,))
    return [result, result]


# -- norms --------------------------------------------------------------------------------------


def _affine(ctx: RuleContext, axes: tuple[Axis, ...]) -> None:
    for name in ("weight", "bias"):
        if ctx.arg(name) is not None:
            for axis, other in zip(axes, ctx.type(name), strict=True):
                ctx.unify(axis, other)


def _zero_by_gain(ctx: RuleContext) -> None:
    """Say that zeroed gain and bias make the result zero whatever the statistics are."""
    if ctx.arg("weight") is not None:
        ctx.zero_where((ctx.arg("weight"),), (ctx.arg("bias"),))


@rule("layer_norm.default", zero=ZeroRule.NEVER)
def layer_norm(ctx: RuleContext) -> Type:
    """Mean and variance over the last axes: approximate, the statistics are of what stays."""
    type_ = ctx.type("input")
    axes = type_[-len(ctx.arg("normalized_shape")) :]
    _affine(ctx, axes)
    ctx.size_literals("normalized_shape", axes)
    for dim, axis in enumerate(axes, start=len(type_) - len(axes)):
        ctx.statistic(axis, dim, clears=True)
    _zero_by_gain(ctx)
    return type_


@rule("rms_norm.default", zero=ZeroRule.ANY_OPERAND)
def rms_norm(ctx: RuleContext) -> Type:
    """Root mean square over the last axes: rescaled by new/old size, exact."""
    type_ = ctx.type("input")
    axes = type_[-len(ctx.arg("normalized_shape")) :]
    _affine(ctx, axes)
    ctx.size_literals("normalized_shape", axes)
    for axis in axes:
        ctx.contract(axis, ctx.arg("input"))
        ctx.facts.means.append(MeanLiteral(ctx.node, axis, "rms_norm"))
    return type_


@rule("group_norm.default", zero=ZeroRule.NEVER)
def group_norm(ctx: RuleContext) -> Type:
    """(group channel): whole groups go exactly, channels within a group approximately."""
    type_ = ctx.type("input")
    groups = ctx.arg("num_groups")
    _affine(ctx, type_[1:2])
    for axis in type_[2:]:
        ctx.freeze(axis, "positions of an image")
    group, channel = ctx.factor(type_[1], (groups, type_[1].size // groups))
    ctx.size_literal("num_groups", None, group)
    ctx.statistic(channel, 1, clears=True)
    _zero_by_gain(ctx)
    return type_


@rule("batch_norm.default", "instance_norm.default", zero=ZeroRule.NEVER)
def batch_norm(ctx: RuleContext) -> Type:
    """Statistics of each channel alone: exact; of other axes, unless held fixed: approximate."""
    type_ = ctx.type("input")
    if (ctx.arg("training") or ctx.arg("use_input_stats")) and ctx.arg("running_mean") is None:
        for dim in (0, *range(2, len(type_))) if ctx.arg("training") else range(2, len(type_)):
            ctx.statistic(type_[dim], dim, clears=True)
        ctx.zero_where((ctx.arg("input"), ctx.arg("weight")), (ctx.arg("bias"),))
    else:
        if ctx.arg("training") or ctx.arg("use_input_stats"):
            for axis in (type_[0], *type_[2:]):
                ctx.freeze(axis, "mean and variance are taken over it")
        _zero_by_gain(ctx)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if ctx.arg(name) is not None:
            ctx.unify(type_[1], ctx.type(name)[0])
    return type_


# -- pooling ------------------------------------------------------------------------------------


@rule("max_pool1d.default", "max_pool2d.default", "max_pool3d.default", zero=ZeroRule.AS_FIRST)
@rule("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", zero=ZeroRule.AS_FIRST)
@rule("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", zero=ZeroRule.AS_FIRST)
@rule("adaptive_avg_pool3d.default", "upsample_nearest2d.default", zero=ZeroRule.AS_FIRST)
@rule(
    "upsample_nearest1d.vec",
    "upsample_nearest2d.vec",
    "upsample_nearest3d.vec",
    zero=ZeroRule.AS_FIRST,
)
@rule("_upsample_nearest_exact2d.vec", "_upsample_bilinear2d_aa.vec", zero=ZeroRule.AS_FIRST)
@rule(
    "upsample_linear1d.vec",
    "upsample_bilinear2d.vec",
    "upsample_trilinear3d.vec",
    zero=ZeroRule.AS_FIRST,
)
@rule("upsample_bicubic2d.vec", zero=ZeroRule.AS_FIRST)
def pool(ctx: RuleContext) -> Type:
    """Places of an image are combined, each channel alone."""
    return _pooled(ctx, ctx.types[ctx.operands()[0]], ctx.shape())


@rule("adaptive_max_pool1d.default", "adaptive_max_pool2d.default", zero=ZeroRule.AS_FIRST)
@rule("adaptive_max_pool3d.default", "max_pool1d_with_indices.default", zero=ZeroRule.AS_FIRST)
@rule("max_pool2d_with_indices.default", "max_pool3d_with_indices.default", zero=ZeroRule.AS_FIRST)
def pool_with_index(ctx: RuleContext) -> list[Type | None]:
    """The largest pixels of a window and where they were, each channel alone."""
    type_ = _pooled(ctx, ctx.type("self"), ctx.shapes(ctx.node)[0])
    return [type_, type_]


def _pooled(ctx: RuleContext, type_: Type, shape: tuple[int, ...]) -> Type:
    found = re.search(r"(\d)d", name_of(ctx.node))
    assert found is not None
    result = list(type_)
    for back in range(1, int(found[1]) + 1):
        if not _is_whole(ctx, back, int(found[1])):
            ctx.freeze(type_[-back], "positions of an image")
            result[-back] = ctx.fixed(shape[-back], "positions of an image")
    return tuple(result)


def _is_whole(ctx: RuleContext, back: int, count: int) -> bool:
    """Return whether the window is of size 1 along the last but `back` dimension."""
    for name, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
        given = ctx.arg(name)
        sizes = [given] * count if isinstance(given, int) else given
        if name == "kernel_size" and not sizes:
            return False
        if sizes and sizes[-back if len(sizes) > 1 else 0] != neutral:
            return False
    return True


@rule("max_unpool2d.default", "max_unpool3d.default", zero=ZeroRule.AS_FIRST)
def unpool(ctx: RuleContext) -> Type:
    """Values go back to the pixels that they came from, each channel alone."""
    type_, shape = ctx.type("self"), ctx.shape()
    spatial = int(name_of(ctx.node).removesuffix("d")[-1])
    for axis, other in zip(type_, ctx.type("indices"), strict=True):
        ctx.unify(axis, other)
    for axis in type_[-spatial:]:
        ctx.freeze(axis, "positions of an image")
    fixed = [ctx.fixed(size, "positions of an image") for size in shape[-spatial:]]
    return (*type_[:-spatial], *fixed)


@rule("grid_sampler.default", zero=ZeroRule.AS_FIRST)
def sample(ctx: RuleContext) -> Type:
    """Places of an image are picked and combined by a grid, each channel alone."""
    type_, grid, shape = ctx.type("input"), ctx.type("grid"), ctx.shape()
    for axis in (*type_[2:], *grid[1:]):
        ctx.freeze(axis, "positions of an image")
    ctx.unify(type_[0], grid[0])
    return (*type_[:2], *(ctx.fixed(size, "positions of an image") for size in shape[2:]))
