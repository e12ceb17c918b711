"""Operators that reduce, normalise or order along axes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from graphprune.analysis.axes import UNIT, Axis
from graphprune.analysis.operators.centering import is_centre, is_of_centred
from graphprune.analysis.operators.rule import MeanLiteral, Op, Type, Zero, rule
from graphprune.ir.aten import name_of


def _reduced(op: Op, type_: Type, dims: Iterable[int]) -> Type:
    keep = bool(op.arg("keepdim"))
    gone = set(dims)
    kept = [(UNIT if dim in gone else axis) for dim, axis in enumerate(type_)]
    return tuple(a for dim, a in enumerate(kept) if keep or dim not in gone)


@rule("sum.dim_IntList", "sum.default", "linalg_vector_norm.default", zero=Zero.KEEP)
@rule("norm.ScalarOpt_dim", "nansum.default", "count_nonzero.dim_IntList", zero=Zero.KEEP)
def sum_(op: Op) -> Type:
    """Sums and norms: exact where what is removed vanishes."""
    type_ = op.types[op.operands()[0]]
    dims = op.dims("dim", len(type_))
    order = op.arg("ord") if op.arg("ord") is not None else op.arg("p")
    for dim in dims:
        if order is not None and order <= 0:
            op.freeze(type_[dim], f"a norm of order {order} is taken over it")
        op.contract(type_[dim], op.operands()[0])
    return _reduced(op, type_, dims)


@rule("mean.dim", "mean.default", zero=Zero.KEEP)
def mean(op: Op) -> Type:
    """Means: rescaled by new/old size, exact where what is removed vanishes."""
    type_ = op.type("self")
    dims = op.dims("dim", len(type_))
    approximate = is_centre(op.node) or is_of_centred(op.node)
    for dim in dims:
        if approximate:
            op.statistic(type_[dim], dim)
            continue
        op.contract(type_[dim], op.operands()[0])
        if type_[dim] is not UNIT:
            op.facts.means.append(MeanLiteral(op.node, type_[dim], "mean"))
    return _reduced(op, type_, dims)


@rule("var.dim", "var.correction", "std.dim", "std.correction", "var.default", zero=Zero.KEEP)
@rule("std.default", zero=Zero.KEEP)
def variance(op: Op) -> Type:
    """Variances: approximate, they are of what stays."""
    type_ = op.type("self")
    dims = op.dims("dim", len(type_))
    correction = op.arg("correction") if op.arg("unbiased") is None else int(op.arg("unbiased"))
    least = 1 + math.ceil(1 if correction is None else correction)
    for dim in dims:
        op.statistic(type_[dim], dim, least=least)
    return _reduced(op, type_, dims)


@rule("var_mean.correction", "std_mean.correction", "var_mean.dim", "std_mean.dim", zero=Zero.KEEP)
def variance_and_mean(op: Op) -> list[Type | None]:
    """Variances with their means: approximate, they are of what stays."""
    type_ = variance(op)
    return [type_, type_]


@rule("amax.default", "amin.default", "all.dim", "all.default", "all.dims", zero=Zero.NEVER)
@rule("max.default", "min.default", zero=Zero.NEVER)
@rule("argmin.default", "prod.dim_int", "prod.default", "logsumexp.default", zero=Zero.NEVER)
def extreme(op: Op) -> Type:
    """Extremes and logic over axes, which are frozen: a zero in place of a value may win."""
    type_ = op.types[op.operands()[0]]
    dims = op.dims("dim", len(type_))
    for dim in dims:
        op.freeze(type_[dim], f"{name_of(op.node)} runs over it")
    return _reduced(op, type_, dims)


@rule("any.default", "any.dim", "any.dims", zero=Zero.KEEP)
def any_(op: Op) -> Type:
    """Whether there is one: the axes are frozen."""
    return extreme(op)


@rule("max.dim", zero=Zero.NEVER)
def largest(op: Op) -> list[Type | None]:
    """The largest of an axis with its place, which is chosen from."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    op.choose(dim, "max runs over it")
    op.holds_places(type_[dim], 1)
    result = _reduced(op, type_, (dim,))
    return [result, result]


@rule("min.dim", "median.dim", "mode.default", zero=Zero.NEVER)
def extreme_with_index(op: Op) -> list[Type | None]:
    """Extremes with their places: the axis is frozen."""
    type_ = extreme(op)
    return [type_, type_]


@rule("argmax.default", zero=Zero.NEVER)
def place_of_largest(op: Op) -> Type:
    """The place of the largest of an axis, which is chosen from."""
    type_ = op.type("self")
    if op.arg("dim") is None:
        return extreme(op)
    dim = op.dim("dim", len(type_))
    op.choose(dim, "argmax runs over it")
    op.holds_places(type_[dim])
    return _reduced(op, type_, (dim,))


@rule("softmax.int", "_softmax.default", zero=Zero.NEVER)
def softmax(op: Op) -> Type:
    """Softmax: the axis is chosen from, the others stay."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    op.choose(dim, "softmax runs over it")
    op.weigh(type_[dim])
    op.mark("softmax", type_[dim])
    return type_


@rule("log_softmax.int", "_log_softmax.default", zero=Zero.NEVER)
@rule("cumsum.default", "cumprod.default", "logcumsumexp.default", zero=Zero.NEVER)
def normalised(op: Op) -> Type:
    """Running sums and the like: the axis is frozen, the others stay."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    op.freeze(type_[dim], f"{name_of(op.node)} runs over it")
    return type_


@rule("argsort.default", "argsort.stable", zero=Zero.NEVER)
def order(op: Op) -> Type:
    """Ordering: the axis is frozen."""
    return normalised(op)


@rule("sort.default", "sort.stable", "cummax.default", "cummin.default", zero=Zero.NEVER)
def order_with_index(op: Op) -> list[Type | None]:
    """Ordering with places: the axis is frozen."""
    type_ = normalised(op)
    return [type_, type_]


@rule("topk.default", zero=Zero.NEVER)
def top(op: Op) -> list[Type | None]:
    """The largest few of an axis, which is chosen from; their number is fixed."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_)) if op.arg("dim") is not None else len(type_) - 1
    count = op.shapes(op.node)[0][dim]
    why = "the largest of it are picked"
    if op.arg("largest") is False:
        op.freeze(type_[dim], why)
    op.choose(dim, why, least=count)
    op.holds_places(type_[dim], 1)
    kept = op.fixed(count, "the number that is picked")
    result = (*type_[:dim], kept, *type_[dim + 1 :])
    return [result, result]


@rule("kthvalue.default", zero=Zero.NEVER)
def ranked(op: Op) -> list[Type | None]:
    """The k-th smallest of an axis, which is frozen."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    op.freeze(type_[dim], "the k-th of it is picked")
    result = _reduced(op, type_, (dim,))
    return [result, result]


# -- norms --------------------------------------------------------------------------------------


def _affine(op: Op, axes: tuple[Axis, ...]) -> None:
    for name in ("weight", "bias"):
        if op.arg(name) is not None:
            for axis, other in zip(axes, op.type(name), strict=True):
                op.unify(axis, other)


def _vanish_by_gain(op: Op) -> None:
    """Zeroed gain and bias make the result vanish whatever the statistics are."""
    if op.arg("weight") is not None:
        op.vanishes_as((op.arg("weight"),), (op.arg("bias"),))


@rule("layer_norm.default", zero=Zero.NEVER)
def layer_norm(op: Op) -> Type:
    """Mean and variance over the last axes: approximate, the statistics are of what stays."""
    type_ = op.type("input")
    axes = type_[-len(op.arg("normalized_shape")) :]
    _affine(op, axes)
    op.size_literals("normalized_shape", axes)
    for dim, axis in enumerate(axes, start=len(type_) - len(axes)):
        op.statistic(axis, dim, clears=True)
    _vanish_by_gain(op)
    return type_


@rule("rms_norm.default", zero=Zero.ANY)
def rms_norm(op: Op) -> Type:
    """Root mean square over the last axes: rescaled by new/old size, exact."""
    type_ = op.type("input")
    axes = type_[-len(op.arg("normalized_shape")) :]
    _affine(op, axes)
    op.size_literals("normalized_shape", axes)
    for axis in axes:
        op.contract(axis, op.arg("input"))
        op.facts.means.append(MeanLiteral(op.node, axis, "rms_norm"))
    return type_


@rule("group_norm.default", zero=Zero.NEVER)
def group_norm(op: Op) -> Type:
    """(group channel): whole groups go exactly, channels within a group approximately."""
    type_ = op.type("input")
    groups = op.arg("num_groups")
    _affine(op, type_[1:2])
    for axis in type_[2:]:
        op.freeze(axis, "places of an image")
    group, channel = op.factor(type_[1], (groups, type_[1].size // groups))
    op.size_literal("num_groups", None, group)
    op.statistic(channel, 1, clears=True)
    _vanish_by_gain(op)
    return type_


@rule("batch_norm.default", "instance_norm.default", zero=Zero.NEVER)
def batch_norm(op: Op) -> Type:
    """Statistics of each channel alone: exact; of other axes, unless held fixed: approximate."""
    type_ = op.type("input")
    if (op.arg("training") or op.arg("use_input_stats")) and op.arg("running_mean") is None:
        for dim in (0, *range(2, len(type_))) if op.arg("training") else range(2, len(type_)):
            op.statistic(type_[dim], dim, clears=True)
        op.vanishes_as((op.arg("input"), op.arg("weight")), (op.arg("bias"),))
    else:
        if op.arg("training") or op.arg("use_input_stats"):
            for axis in (type_[0], *type_[2:]):
                op.freeze(axis, "mean and variance are taken over it")
        _vanish_by_gain(op)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if op.arg(name) is not None:
            op.unify(type_[1], op.type(name)[0])
    return type_


# -- pooling ------------------------------------------------------------------------------------


@rule("max_pool1d.default", "max_pool2d.default", "max_pool3d.default", zero=Zero.KEEP)
@rule("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", zero=Zero.KEEP)
@rule("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", zero=Zero.KEEP)
@rule("adaptive_avg_pool3d.default", "upsample_nearest2d.default", zero=Zero.KEEP)
@rule("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec", zero=Zero.KEEP)
@rule("_upsample_nearest_exact2d.vec", "_upsample_bilinear2d_aa.vec", zero=Zero.KEEP)
@rule(
    "upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec", zero=Zero.KEEP
)
@rule("upsample_bicubic2d.vec", zero=Zero.KEEP)
def pool(op: Op) -> Type:
    """Places of an image are combined, each channel alone."""
    return _pooled(op, op.types[op.operands()[0]], op.shape())


@rule("adaptive_max_pool1d.default", "adaptive_max_pool2d.default", zero=Zero.KEEP)
@rule("adaptive_max_pool3d.default", "max_pool1d_with_indices.default", zero=Zero.KEEP)
@rule("max_pool2d_with_indices.default", "max_pool3d_with_indices.default", zero=Zero.KEEP)
def pool_with_index(op: Op) -> list[Type | None]:
    """The largest of the places of an image and where they were, each channel alone."""
    type_ = _pooled(op, op.type("self"), op.shapes(op.node)[0])
    return [type_, type_]


def _pooled(op: Op, type_: Type, shape: tuple[int, ...]) -> Type:
    found = re.search(r"(\d)d", name_of(op.node))
    assert found is not None
    result = list(type_)
    for back in range(1, int(found[1]) + 1):
        if not _is_whole(op, back, int(found[1])):
            op.freeze(type_[-back], "places of an image")
            result[-back] = op.fixed(shape[-back], "places of an image")
    return tuple(result)


def _is_whole(op: Op, back: int, count: int) -> bool:
    """Whether the window is of one place along the last but `back` dimension: nothing is pooled."""
    for name, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
        given = op.arg(name)
        sizes = [given] * count if isinstance(given, int) else given
        if name == "kernel_size" and not sizes:
            return False
        if sizes and sizes[-back if len(sizes) > 1 else 0] != neutral:
            return False
    return True


@rule("max_unpool2d.default", "max_unpool3d.default", zero=Zero.KEEP)
def unpool(op: Op) -> Type:
    """Values go back to the places of an image that they came from, each channel alone."""
    type_, shape = op.type("self"), op.shape()
    spatial = int(name_of(op.node).removesuffix("d")[-1])
    for axis, other in zip(type_, op.type("indices"), strict=True):
        op.unify(axis, other)
    for axis in type_[-spatial:]:
        op.freeze(axis, "places of an image")
    fixed = [op.fixed(size, "places of an image") for size in shape[-spatial:]]
    return (*type_[:-spatial], *fixed)


@rule("grid_sampler.default", zero=Zero.KEEP)
def sample(op: Op) -> Type:
    """Places of an image are picked and combined by a grid, each channel alone."""
    type_, grid, shape = op.type("input"), op.type("grid"), op.shape()
    for axis in (*type_[2:], *grid[1:]):
        op.freeze(axis, "places of an image")
    op.unify(type_[0], grid[0])
    return (*type_[:2], *(op.fixed(size, "places of an image") for size in shape[2:]))
