"""Operators that join and cut axes: cat, stack, split, slice, pad."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphprune.analysis.axes import UNIT, Axis
from graphprune.analysis.operators.facts import Type, ZeroRule
from graphprune.analysis.operators.rule import RuleContext, rule


@rule("cat.default", zero=ZeroRule.ALL_HOLDERS)
def concatenate(ctx: RuleContext) -> Type:
    """The axes of the joined dimension become a sum, or units as in a stack; others are one."""
    shape = ctx.shape()
    types = [ctx.types[node] for node in ctx.arg("tensors")]
    types = [type_ for type_ in types if len(type_) == len(shape)]
    dim = ctx.dim("dim", len(shape))
    result = []
    for index in range(len(shape)):
        column = [type_[index] for type_ in types]
        if index == dim and len(column) > 1 and all(axis is UNIT for axis in column):
            result.append(_stacked(ctx, len(column)))
            continue
        if index == dim:
            result.append(ctx.axes.sum(*column))
            continue
        for other in column[1:]:
            ctx.unify(column[0], other)
        result.append(column[0])
    return tuple(result)


@rule("stack.default", zero=ZeroRule.ALL_HOLDERS)
def stack(ctx: RuleContext) -> Type:
    """A new axis, whose units go where what is chosen picks by them; all others are one."""
    types = [ctx.types[node] for node in ctx.arg("tensors")]
    for other in types[1:]:
        for left, right in zip(types[0], other, strict=True):
            ctx.unify(left, right)
    dim = ctx.dim("dim", len(types[0]) + 1)
    return (*types[0][:dim], _stacked(ctx, len(types)), *types[0][dim:])


def _stacked(ctx: RuleContext, count: int) -> Axis:
    """Return a new axis whose units are the tensors that the node takes."""
    axis = ctx.fresh(count)
    ctx.stack_units(axis)
    return axis


@rule("split_with_sizes.default", "split.sizes", zero=ZeroRule.AS_FIRST)
def split(ctx: RuleContext) -> list[Type | None]:
    """The axis is a sum of the pieces."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    shapes = ctx.shapes(ctx.node)
    pieces = _cut(ctx, type_[dim], [shape[dim] for shape in shapes])
    ctx.size_literals("split_sizes" if ctx.arg("split_sizes") is not None else "split_size", pieces)
    return [(*type_[:dim], piece, *type_[dim + 1 :]) for piece in pieces]


@rule("split.Tensor", "chunk.default", zero=ZeroRule.AS_FIRST)
def split_evenly(ctx: RuleContext) -> list[Type | None]:
    """Pieces whose number or size is fixed: the axis is frozen (capture spells static ones out)."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    ctx.freeze(type_[dim], "it is split into pieces of a dynamic size")
    return [
        (*type_[:dim], ctx.fixed(shape[dim], "a piece of a dynamic size"), *type_[dim + 1 :])
        for shape in ctx.shapes(ctx.node)
    ]


@rule("unbind.int", zero=ZeroRule.AS_FIRST)
def unbind(ctx: RuleContext) -> list[Type | None]:
    """The axis is taken apart into fixed indices."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    pieces = _cut(ctx, type_[dim], [1] * type_[dim].size)
    ctx.freeze(type_[dim], "it is taken apart into single positions")
    return [(*type_[:dim], *type_[dim + 1 :]) for _ in pieces]


def _cut(ctx: RuleContext, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    if sum(sizes) != axis.size or 0 in sizes:
        ctx.freeze(axis, "it is cut into pieces of a dynamic size")
        return [ctx.fixed(size, "a piece of a dynamic size") for size in sizes]
    return ctx.split(axis, sizes)


@rule("select.int", zero=ZeroRule.AS_FIRST)
def select(ctx: RuleContext) -> Type:
    """One fixed index of an axis, [before + 1 + after], or what belongs to a unit of a choice."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    index = ctx.arg("index")
    rest = (*type_[:dim], *type_[dim + 1 :])
    size = type_[dim].size
    if isinstance(index, fx.Node) or _is_dynamic(ctx, "self", dim):
        ctx.freeze(type_[dim], "one position is selected by a dynamic index")
        return rest
    index = index + size if index < 0 else index
    if ctx.is_chosen_from(type_[dim]):
        ctx.select_unit(type_[dim], index, ("index", 0), source=ctx.arg("self"))
        return rest
    _window(ctx, type_[dim], index, index + 1, "index", None)
    return rest


@rule("slice.Tensor", zero=ZeroRule.AS_FIRST)
def slice_(ctx: RuleContext) -> Type:
    """Cuts an axis, [before + inside + after], or as `select` does; a step factors it."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    size, new = type_[dim].size, ctx.shape()[dim]
    start, end, step = ctx.arg("start") or 0, ctx.arg("end"), ctx.arg("step") or 1
    if new == size:
        if isinstance(end, int) and end == size:
            ctx.size_literal("end", None, type_[dim])
        return type_
    bounds = (start, end, step)
    if any(isinstance(bound, fx.Node) for bound in bounds) or _is_dynamic(ctx, "self", dim):
        ctx.freeze(type_[dim], "it is sliced at a dynamic bound")
        axis = ctx.fixed(new, "a slice at a dynamic bound")
    else:
        start, end, step = slice(start, end, step).indices(size)
        if new == 1 and ctx.is_chosen_from(type_[dim]):
            ctx.select_unit(type_[dim], start, ("start", 0), ("end", 1), source=ctx.arg("self"))
            return (*type_[:dim], UNIT, *type_[dim + 1 :])
        axis = _strided(ctx, type_[dim], start, end, step)
    return (*type_[:dim], axis, *type_[dim + 1 :])


@rule("narrow.default", zero=ZeroRule.AS_FIRST)
def narrow(ctx: RuleContext) -> Type:
    """Cuts an axis: [before + inside + after]."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    start, length = ctx.arg("start"), ctx.arg("length")
    if isinstance(start, fx.Node) or isinstance(length, fx.Node) or _is_dynamic(ctx, "self", dim):
        ctx.freeze(type_[dim], "it is narrowed at a dynamic bound")
        axis = ctx.fixed(ctx.shape()[dim], "narrowed at a dynamic bound")
    else:
        start = start + type_[dim].size if start < 0 else start
        axis = _window(ctx, type_[dim], start, start + length, "start", None)
        ctx.size_literal("length", None, axis)
    return (*type_[:dim], axis, *type_[dim + 1 :])


def _is_dynamic(ctx: RuleContext, name: str, dim: int) -> bool:
    return not isinstance(ctx.arg(name).meta["val"].shape[dim], int)


def _strided(ctx: RuleContext, axis: Axis, start: int, end: int, step: int) -> Axis:
    if step == 1:
        return _window(ctx, axis, start, end, "start", "end")
    if axis.size % step or start >= step or end <= axis.size - step:
        ctx.freeze(axis, f"it is sliced in steps of {step}")
        return ctx.fixed(len(range(start, end, step)), f"a slice in steps of {step}")
    outer, inner = ctx.factor(axis, (axis.size // step, step))
    ctx.freeze(inner, f"positions of a slice in steps of {step}")
    if ctx.arg("end") is not None and ctx.arg("end") < axis.size:
        ctx.freeze(outer, "it is sliced in steps up to a bound")
    return outer


def _window(ctx: RuleContext, axis: Axis, start: int, end: int, low: str, high: str | None) -> Axis:
    """Return the piece [start, end) of `axis`; `low` and `high` name the bounds."""
    sizes = [size for size in (start, end - start, axis.size - end) if size]
    if end <= start:
        if start >= axis.size:
            ctx.size_literal(low, None, axis)
        elif start:
            ctx.freeze(axis, "an empty slice is taken inside it")
        return ctx.fresh(0)
    pieces = ctx.split(axis, sizes)
    at = 1 if start else 0
    if ctx.arg(low) is not None and ctx.arg(low) < 0:  # it counts what is behind the bound
        ctx.size_literal(low, None, ctx.axes.sum(*pieces[at:]))
    elif start:
        ctx.size_literal(low, None, pieces[0])
    if high is not None and ctx.arg(high) is not None:
        if ctx.arg(high) < 0:
            ctx.size_literal(high, None, ctx.axes.sum(*pieces[at + 1 :]))
        elif ctx.arg(high) <= axis.size:
            ctx.size_literal(high, None, ctx.axes.sum(*pieces[: at + 1]))
    return pieces[at]


@rule("constant_pad_nd.default", "pad.default", zero=ZeroRule.AS_FIRST)
def pad(ctx: RuleContext) -> Type:
    """Fixed padding is added before and after: [pad + axis + pad]."""
    type_ = list(ctx.type("self"))
    amounts = ctx.arg("pad")
    mode, value = ctx.arg("mode") or "constant", ctx.arg("value") or 0
    if value != 0:
        ctx.zero = ZeroRule.NEVER
    for back in range(len(amounts) // 2):
        before, after = amounts[2 * back], amounts[2 * back + 1]
        dim = len(type_) - 1 - back
        if before == 0 and after == 0:
            continue
        size = ctx.shape()[dim]
        plain = isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0
        if not plain or mode != "constant" or value != 0:
            ctx.freeze(type_[dim], "it is padded with something other than zeros")
            type_[dim] = ctx.fixed(size, "a padded axis")
            continue
        pads = [ctx.fixed(count, "padding") if count else None for count in (before, after)]
        parts = [part for part in (pads[0], type_[dim], pads[1]) if part is not None]
        type_[dim] = ctx.axes.sum(*parts)
    return tuple(type_)


@rule("glu.default", zero=ZeroRule.AS_FIRST)
def glu(ctx: RuleContext) -> Type:
    """Two halves of an axis become one: value times sigmoid(gate)."""
    type_ = ctx.type("self")
    dim = ctx.dim("dim", len(type_))
    half = type_[dim].size // 2
    value, gate = ctx.split(type_[dim], (half, half))
    ctx.unify(value, gate)
    return (*type_[:dim], value, *type_[dim + 1 :])
