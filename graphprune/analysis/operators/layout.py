"""Operators that move elements: views, permutations, repetition, windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphprune.analysis.axes import UNIT, Axis
from graphprune.analysis.operators.facts import Type, ZeroRule
from graphprune.analysis.operators.rule import RuleContext, rule
from graphprune.ir.aten import name_of
from graphprune.ir.nodes import argument_names


def _regroup(ctx: RuleContext, before: Sequence[Axis], shape: Sequence[int]) -> Type:
    """Return `before` viewed as `shape`; equal leading and trailing sizes stay as they are."""
    if math.prod(axis.size for axis in before) == 0:
        return tuple(map(ctx.fresh, shape))
    head = 0
    while head < min(len(before), len(shape)) and before[head].size == shape[head]:
        head += 1
    tail = 0
    limit = min(len(before), len(shape)) - head
    while tail < limit and before[-1 - tail].size == shape[-1 - tail]:
        tail += 1
    old = before[head : len(before) - tail]
    new = [ctx.fresh(size) for size in shape[head : len(shape) - tail]]
    ctx.unify(ctx.axes.product(*old), ctx.axes.product(*new))
    return (*before[:head], *new, *before[len(before) - tail :])


@rule("view.default", "reshape.default", "_unsafe_view.default", zero=ZeroRule.AS_FIRST)
def view(ctx: RuleContext) -> Type:
    """Splits and merges axes row-major; the sizes follow the axes."""
    type_ = _regroup(ctx, ctx.type("self"), ctx.shape())
    ctx.size_literals("size" if ctx.arg("size") is not None else "shape", type_)
    return type_


@rule(
    "flatten.using_ints",
    "unsqueeze.default",
    "squeeze.dim",
    "squeeze.default",
    zero=ZeroRule.AS_FIRST,
)
@rule(
    "squeeze.dims", "ravel.default", "reshape_as.default", "view_as.default", zero=ZeroRule.AS_FIRST
)
def reshape_by_rank(ctx: RuleContext) -> Type:
    """Merges axes, or adds or drops axes of size 1; no size is written down."""
    dim = ctx.arg("dim")
    type_ = ctx.types[ctx.node.args[0]]  # type: ignore[index]
    if name_of(ctx.node) == "unsqueeze":
        at = dim if dim >= 0 else dim + len(type_) + 1
        return (*type_[:at], UNIT, *type_[at:])
    result = _regroup(ctx, type_, ctx.shape())
    if ctx.arg("other") is not None:
        for axis, other in zip(result, ctx.type("other"), strict=True):
            ctx.unify(axis, other)
    return result


@rule("view_as_real.default", zero=ZeroRule.AS_FIRST)
def parts_of_complex(ctx: RuleContext) -> Type:
    """Adds an axis of the real and the imaginary part."""
    return (*ctx.type("self"), ctx.fixed(2, "real and imaginary part"))


@rule("unflatten.int", zero=ZeroRule.AS_FIRST)
def unflatten(ctx: RuleContext) -> Type:
    """Splits one axis row-major; the sizes follow the axes."""
    type_ = _regroup(ctx, ctx.type("self"), ctx.shape())
    dim = ctx.dim("dim", len(ctx.type("self")))
    ctx.size_literals("sizes", type_[dim : dim + len(ctx.arg("sizes"))])
    return type_


@rule("view.dtype", zero=ZeroRule.AS_FIRST)
def reinterpret(ctx: RuleContext) -> Type:
    """Elements as another type, along the last axis, which is frozen if its size changes."""
    type_, shape = ctx.type("self"), ctx.shape()
    if type_[-1].size != shape[-1]:
        ctx.freeze(type_[-1], "its elements are reinterpreted as another type")
        return (*type_[:-1], ctx.fixed(shape[-1], "elements reinterpreted from another type"))
    return type_


@rule("permute.default", zero=ZeroRule.AS_FIRST)
def permute(ctx: RuleContext) -> Type:
    """Axes in another order."""
    type_ = ctx.type("self")
    return tuple(type_[dim] for dim in ctx.dims("dims", len(type_)))


@rule("transpose.int", "swapaxes.default", "swapdims.default", zero=ZeroRule.AS_FIRST)
def transpose(ctx: RuleContext) -> Type:
    """Two axes exchanged."""
    type_ = list(ctx.type("self"))
    first, second = (ctx.dim(name, len(type_)) for name in argument_names(ctx.node)[1:3])
    type_[first], type_[second] = type_[second], type_[first]
    return tuple(type_)


@rule("t.default", "numpy_T.default", "mT.default", "adjoint.default", zero=ZeroRule.AS_FIRST)
def transpose_matrix(ctx: RuleContext) -> Type:
    """The last two axes exchanged (all reversed for `T`)."""
    type_ = ctx.type("self")
    if name_of(ctx.node) == "numpy_T":
        return type_[::-1]
    return (*type_[:-2], *reversed(type_[-2:])) if len(type_) > 1 else type_


@rule("movedim.int", "movedim.intlist", "moveaxis.int", zero=ZeroRule.AS_FIRST)
def move_dim(ctx: RuleContext) -> Type:
    """Axes in another order."""
    type_ = ctx.type("self")
    rank = len(type_)
    source, target = ctx.dims("source", rank), ctx.dims("destination", rank)
    rest = iter(dim for dim in range(rank) if dim not in source)
    moved = dict(zip(target, source, strict=True))
    return tuple(type_[moved[dim] if dim in moved else next(rest)] for dim in range(rank))


@rule("expand.default", "expand_as.default", "broadcast_to.default", zero=ZeroRule.AS_FIRST)
def expand(ctx: RuleContext) -> Type:
    """Axes of size 1 spread to new axes, whose sizes may follow others."""
    type_, shape = ctx.types[ctx.node.args[0]], ctx.shape()  # type: ignore[index]
    lead = len(shape) - len(type_)
    result = []
    for dim, size in enumerate(shape):
        old = type_[dim - lead] if dim >= lead else UNIT
        if old.size == size:
            result.append(old)
            continue
        axis = ctx.fresh(size)
        ctx.use("spread", axis)
        result.append(axis)
    if ctx.arg("size") is not None:
        ctx.size_literals("size", result)
    elif ctx.arg("other") is not None:
        for axis, other in zip(result, ctx.type("other"), strict=True):
            ctx.unify(axis, other)
    return tuple(result)


@rule("repeat.default", "tile.default", zero=ZeroRule.AS_FIRST)
def repeat(ctx: RuleContext) -> Type:
    """Each axis becomes (copies axis); the number of copies is an axis of its own."""
    type_ = ctx.type("self")
    name = "repeats" if ctx.arg("repeats") is not None else "dims"
    counts = ctx.arg(name)
    lead = len(counts) - len(type_)
    result = []
    for index, (count, size) in enumerate(zip(counts, ctx.shape(), strict=True)):
        old = type_[index - lead] if index >= lead else UNIT
        copies = ctx.fresh(size // old.size) if old.size else ctx.fresh(size)
        ctx.use("spread", copies)
        if isinstance(count, int):
            ctx.size_literal(name, index, copies)
        result.append(ctx.axes.product(copies, old))
    return tuple(result)


@rule("repeat_interleave.self_int", zero=ZeroRule.AS_FIRST)
def repeat_interleave(ctx: RuleContext) -> Type:
    """The axis becomes (axis copies)."""
    type_ = list(ctx.type("self"))
    if ctx.arg("dim") is None:
        type_ = [ctx.axes.product(*type_)]
    dim = 0 if ctx.arg("dim") is None else ctx.dim("dim", len(type_))
    copies = ctx.fresh(ctx.shape()[dim] // type_[dim].size)
    ctx.use("spread", copies)
    ctx.size_literal("repeats", None, copies)
    type_[dim] = ctx.axes.product(type_[dim], copies)
    if ctx.arg("output_size") is not None:
        ctx.size_literal("output_size", None, type_[dim])
    return tuple(type_)


@rule("roll.default", "flip.default", "fft_fft.default", "fft_ifft.default", zero=ZeroRule.AS_FIRST)
@rule(
    "fft_rfft.default",
    "fft_irfft.default",
    "fft_fft2.default",
    "fft_ifft2.default",
    zero=ZeroRule.AS_FIRST,
)
@rule(
    "fft_rfft2.default",
    "fft_irfft2.default",
    "fft_fftn.default",
    "fft_ifftn.default",
    zero=ZeroRule.AS_FIRST,
)
def mix(ctx: RuleContext) -> Type:
    """Elements are moved or mixed along some axes, which are frozen; the others stay."""
    type_, shape = list(ctx.type("self")), ctx.shape()
    for dim in ctx.dims("dims" if ctx.arg("dims") is not None else "dim", len(type_)):
        ctx.freeze(type_[dim], "its elements are reordered or mixed")
        type_[dim] = ctx.fixed(shape[dim], "elements that are reordered or mixed")
    return tuple(type_)


@rule("unfold.default", zero=ZeroRule.AS_FIRST)
def unfold(ctx: RuleContext) -> Type:
    """Windows along an axis, which is frozen; the positions within them are a new last axis."""
    type_, shape = list(ctx.type("self")), ctx.shape()
    dim = ctx.dim("dimension", len(type_))
    ctx.freeze(type_[dim], "windows are cut out of it")
    type_[dim] = ctx.fixed(shape[dim], "windows of an axis")
    return (*type_, ctx.fixed(shape[-1], "positions of a window"))


@rule("im2col.default", zero=ZeroRule.AS_FIRST)
def image_to_columns(ctx: RuleContext) -> Type:
    """Windows of an image: (channel tap), and a column for each window."""
    type_ = ctx.type("self")
    for axis in type_[-2:]:
        ctx.freeze(axis, "positions of an image")
    positions = ctx.fixed(math.prod(ctx.arg("kernel_size")), "positions of a window")
    columns = ctx.fixed(ctx.shape()[-1], "windows of an image")
    return (*type_[:-3], ctx.axes.product(type_[-3], positions), columns)


@rule("col2im.default", zero=ZeroRule.AS_FIRST)
def columns_to_image(ctx: RuleContext) -> Type:
    """Windows (channel tap) are added up to an image."""
    type_, shape = ctx.type("self"), ctx.shape()
    channel, positions = ctx.factor(type_[-2], (shape[-3], math.prod(ctx.arg("kernel_size"))))
    ctx.freeze(positions, "positions of a window")
    ctx.freeze(type_[-1], "windows of an image")
    return (
        *type_[:-2],
        channel,
        *(ctx.fixed(size, "positions of an image") for size in shape[-2:]),
    )


@rule("channel_shuffle.default", zero=ZeroRule.AS_FIRST)
def channel_shuffle(ctx: RuleContext) -> Type:
    """(group channel) becomes (channel group)."""
    type_ = ctx.type("self")
    groups = ctx.arg("groups")
    group, channel = ctx.factor(type_[1], (groups, type_[1].size // groups))
    ctx.size_literal("groups", None, group)
    return (type_[0], ctx.axes.product(channel, group), *type_[2:])


@rule("pixel_shuffle.default", zero=ZeroRule.AS_FIRST)
def pixel_shuffle(ctx: RuleContext) -> Type:
    """(c r r) channels become c channels and r by r pixels."""
    type_ = ctx.type("self")
    factor = ctx.arg("upscale_factor")
    channels = ctx.shape()[-3]
    kept, rows, columns = ctx.factor(type_[-3], (channels, factor, factor))
    ctx.freeze(rows, "pixels of a shuffle")
    ctx.freeze(columns, "pixels of a shuffle")
    spatial = (ctx.axes.product(type_[-2], rows), ctx.axes.product(type_[-1], columns))
    return (*type_[:-3], kept, *spatial)


@rule("pixel_unshuffle.default", zero=ZeroRule.AS_FIRST)
def pixel_unshuffle(ctx: RuleContext) -> Type:
    """R by r pixels become channels: (c r r)."""
    type_ = ctx.type("self")
    factor = ctx.arg("downscale_factor")
    spatial, inner = [], []
    for axis in type_[-2:]:
        outer, within = ctx.factor(axis, (axis.size // factor, factor))
        ctx.freeze(within, "pixels of a shuffle")
        spatial.append(outer)
        inner.append(within)
    return (*type_[:-3], ctx.axes.product(type_[-3], *inner), *spatial)
