"""Operators that move elements: views, permutations, joining and cutting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from graphprune.analysis.axes import UNIT, Axis
from graphprune.analysis.operators.rule import Op, Type, Zero, rule
from graphprune.ir.aten import name_of
from graphprune.ir.nodes import argument_names


def _regroup(op: Op, before: Sequence[Axis], shape: Sequence[int]) -> Type:
    """The axes of `before` viewed as `shape`: equal leading and trailing sizes stay as they are."""
    if math.prod(axis.size for axis in before) == 0:
        return tuple(map(op.fresh, shape))
    head = 0
    while head < min(len(before), len(shape)) and before[head].size == shape[head]:
        head += 1
    tail = 0
    limit = min(len(before), len(shape)) - head
    while tail < limit and before[-1 - tail].size == shape[-1 - tail]:
        tail += 1
    old = before[head : len(before) - tail]
    new = [op.fresh(size) for size in shape[head : len(shape) - tail]]
    op.unify(op.axes.product(*old), op.axes.product(*new))
    return (*before[:head], *new, *before[len(before) - tail :])


@rule("view.default", "reshape.default", "_unsafe_view.default", zero=Zero.KEEP)
def view(op: Op) -> Type:
    """Splits and merges axes row-major; the sizes follow the axes."""
    type_ = _regroup(op, op.type("self"), op.shape())
    op.size_literals("size" if op.arg("size") is not None else "shape", type_)
    return type_


@rule("flatten.using_ints", "unsqueeze.default", "squeeze.dim", "squeeze.default", zero=Zero.KEEP)
@rule("squeeze.dims", "ravel.default", "reshape_as.default", "view_as.default", zero=Zero.KEEP)
def reshape_by_rank(op: Op) -> Type:
    """Merges axes, or adds or drops axes of size 1; no size is written down."""
    dim = op.arg("dim")
    type_ = op.types[op.node.args[0]]  # type: ignore[index]
    if name_of(op.node) == "unsqueeze":
        at = dim if dim >= 0 else dim + len(type_) + 1
        return (*type_[:at], UNIT, *type_[at:])
    result = _regroup(op, type_, op.shape())
    if op.arg("other") is not None:
        for axis, other in zip(result, op.type("other"), strict=True):
            op.unify(axis, other)
    return result


@rule("unflatten.int", zero=Zero.KEEP)
def unflatten(op: Op) -> Type:
    """Splits one axis row-major; the sizes follow the axes."""
    type_ = _regroup(op, op.type("self"), op.shape())
    dim = op.dim("dim", len(op.type("self")))
    op.size_literals("sizes", type_[dim : dim + len(op.arg("sizes"))])
    return type_


@rule("view.dtype", zero=Zero.KEEP)
def reinterpret(op: Op) -> Type:
    """Elements as another type, along the last axis, which is frozen if its size changes."""
    type_, shape = op.type("self"), op.shape()
    if type_[-1].size != shape[-1]:
        op.freeze(type_[-1], "its elements are reinterpreted as another type")
        return (*type_[:-1], op.fixed(shape[-1], "elements reinterpreted from another type"))
    return type_


@rule("permute.default", zero=Zero.KEEP)
def permute(op: Op) -> Type:
    """Axes in another order."""
    type_ = op.type("self")
    return tuple(type_[dim] for dim in op.dims("dims", len(type_)))


@rule("transpose.int", "swapaxes.default", "swapdims.default", zero=Zero.KEEP)
def transpose(op: Op) -> Type:
    """Two axes exchanged."""
    type_ = list(op.type("self"))
    first, second = (op.dim(name, len(type_)) for name in argument_names(op.node)[1:3])
    type_[first], type_[second] = type_[second], type_[first]
    return tuple(type_)


@rule("t.default", "numpy_T.default", "mT.default", "adjoint.default", zero=Zero.KEEP)
def transpose_matrix(op: Op) -> Type:
    """The last two axes exchanged (all reversed for `T`)."""
    type_ = op.type("self")
    if name_of(op.node) == "numpy_T":
        return type_[::-1]
    return (*type_[:-2], *reversed(type_[-2:])) if len(type_) > 1 else type_


@rule("movedim.int", "movedim.intlist", "moveaxis.int", zero=Zero.KEEP)
def move_dim(op: Op) -> Type:
    """Axes in another order."""
    type_ = op.type("self")
    rank = len(type_)
    source, target = op.dims("source", rank), op.dims("destination", rank)
    rest = iter(dim for dim in range(rank) if dim not in source)
    place = dict(zip(target, source, strict=True))
    return tuple(type_[place[dim] if dim in place else next(rest)] for dim in range(rank))


@rule("expand.default", "expand_as.default", "broadcast_to.default", zero=Zero.KEEP)
def expand(op: Op) -> Type:
    """Axes of size 1 spread to new axes, whose sizes may follow others."""
    type_, shape = op.types[op.node.args[0]], op.shape()  # type: ignore[index]
    lead = len(shape) - len(type_)
    result = []
    for dim, size in enumerate(shape):
        old = type_[dim - lead] if dim >= lead else UNIT
        if old.size == size:
            result.append(old)
            continue
        axis = op.fresh(size)
        op.mark("spread", axis)
        result.append(axis)
    if op.arg("size") is not None:
        op.size_literals("size", result)
    elif op.arg("other") is not None:
        for axis, other in zip(result, op.type("other"), strict=True):
            op.unify(axis, other)
    return tuple(result)


@rule("repeat.default", "tile.default", zero=Zero.KEEP)
def repeat(op: Op) -> Type:
    """Each axis becomes (copies axis); the number of copies is an axis of its own."""
    type_ = op.type("self")
    name = "repeats" if op.arg("repeats") is not None else "dims"
    counts = op.arg(name)
    lead = len(counts) - len(type_)
    result = []
    for index, (count, size) in enumerate(zip(counts, op.shape(), strict=True)):
        old = type_[index - lead] if index >= lead else UNIT
        copies = op.fresh(size // old.size) if old.size else op.fresh(size)
        op.mark("spread", copies)
        if isinstance(count, int):
            op.size_literal(name, index, copies)
        result.append(op.axes.product(copies, old))
    return tuple(result)


@rule("repeat_interleave.self_int", zero=Zero.KEEP)
def repeat_interleave(op: Op) -> Type:
    """The axis becomes (axis copies)."""
    type_ = list(op.type("self"))
    if op.arg("dim") is None:
        type_ = [op.axes.product(*type_)]
    dim = 0 if op.arg("dim") is None else op.dim("dim", len(type_))
    copies = op.fresh(op.shape()[dim] // type_[dim].size)
    op.mark("spread", copies)
    op.size_literal("repeats", None, copies)
    type_[dim] = op.axes.product(type_[dim], copies)
    if op.arg("output_size") is not None:
        op.size_literal("output_size", None, type_[dim])
    return tuple(type_)


@rule("cat.default", zero=Zero.JOIN)
def concatenate(op: Op) -> Type:
    """The axes of the joined dimension become a sum, or places as in a stack; others are one."""
    shape = op.shape()
    types = [op.types[node] for node in op.arg("tensors")]
    types = [type_ for type_ in types if len(type_) == len(shape)]
    dim = op.dim("dim", len(shape))
    result = []
    for index in range(len(shape)):
        column = [type_[index] for type_ in types]
        if index == dim and len(column) > 1 and all(axis is UNIT for axis in column):
            result.append(_places(op, len(column)))
            continue
        if index == dim:
            result.append(op.axes.sum(*column))
            continue
        for other in column[1:]:
            op.unify(column[0], other)
        result.append(column[0])
    return tuple(result)


@rule("stack.default", zero=Zero.JOIN)
def stack(op: Op) -> Type:
    """A new axis, whose places go where what is chosen picks by them; all others are one."""
    types = [op.types[node] for node in op.arg("tensors")]
    for other in types[1:]:
        for left, right in zip(types[0], other, strict=True):
            op.unify(left, right)
    dim = op.dim("dim", len(types[0]) + 1)
    return (*types[0][:dim], _places(op, len(types)), *types[0][dim:])


def _places(op: Op, count: int) -> Axis:
    """A new axis whose places are the tensors that the node takes."""
    places = op.fresh(count)
    op.gather(places)
    return places


@rule("split_with_sizes.default", "split.sizes", zero=Zero.KEEP)
def split(op: Op) -> list[Type | None]:
    """The axis is a sum of the pieces."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    shapes = op.shapes(op.node)
    pieces = _cut(op, type_[dim], [shape[dim] for shape in shapes])
    op.size_literals("split_sizes" if op.arg("split_sizes") is not None else "split_size", pieces)
    return [(*type_[:dim], piece, *type_[dim + 1 :]) for piece in pieces]


@rule("split.Tensor", "chunk.default", zero=Zero.KEEP)
def split_evenly(op: Op) -> list[Type | None]:
    """Pieces whose number or size is fixed: the axis is frozen (capture spells static ones out)."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    op.freeze(type_[dim], "it is split into pieces of a dynamic size")
    return [
        (*type_[:dim], op.fixed(shape[dim], "a piece of a dynamic size"), *type_[dim + 1 :])
        for shape in op.shapes(op.node)
    ]


@rule("unbind.int", zero=Zero.KEEP)
def unbind(op: Op) -> list[Type | None]:
    """The axis is taken apart into fixed places."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    pieces = _cut(op, type_[dim], [1] * type_[dim].size)
    op.freeze(type_[dim], "it is taken apart into single places")
    return [(*type_[:dim], *type_[dim + 1 :]) for _ in pieces]


def _cut(op: Op, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    if sum(sizes) != axis.size or 0 in sizes:
        op.freeze(axis, "it is cut into pieces of a dynamic size")
        return [op.fixed(size, "a piece of a dynamic size") for size in sizes]
    return op.split(axis, sizes)


@rule("select.int", zero=Zero.KEEP)
def select(op: Op) -> Type:
    """One fixed place of an axis, [before + 1 + after], or what belongs to a unit of a choice."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    index = op.arg("index")
    rest = (*type_[:dim], *type_[dim + 1 :])
    size = type_[dim].size
    if isinstance(index, fx.Node) or _is_dynamic(op, "self", dim):
        op.freeze(type_[dim], "one place is selected by a dynamic index")
        return rest
    index = index + size if index < 0 else index
    if op.is_chosen_from(type_[dim]):
        op.read(type_[dim], index, ("index", 0), source=op.arg("self"))
        return rest
    _window(op, type_[dim], index, index + 1, "index", None)
    return rest


@rule("slice.Tensor", zero=Zero.KEEP)
def slice_(op: Op) -> Type:
    """Cuts an axis, [before + inside + after], or as `select` does; a step factors it."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    size, new = type_[dim].size, op.shape()[dim]
    start, end, step = op.arg("start") or 0, op.arg("end"), op.arg("step") or 1
    if new == size:
        if isinstance(end, int) and end == size:
            op.size_literal("end", None, type_[dim])
        return type_
    bounds = (start, end, step)
    if any(isinstance(bound, fx.Node) for bound in bounds) or _is_dynamic(op, "self", dim):
        op.freeze(type_[dim], "it is sliced at a dynamic bound")
        axis = op.fixed(new, "a slice at a dynamic bound")
    else:
        start, end, step = slice(start, end, step).indices(size)
        if new == 1 and op.is_chosen_from(type_[dim]):
            op.read(type_[dim], start, ("start", 0), ("end", 1), source=op.arg("self"))
            return (*type_[:dim], UNIT, *type_[dim + 1 :])
        axis = _strided(op, type_[dim], start, end, step)
    return (*type_[:dim], axis, *type_[dim + 1 :])


@rule("narrow.default", zero=Zero.KEEP)
def narrow(op: Op) -> Type:
    """Cuts an axis: [before + inside + after]."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    start, length = op.arg("start"), op.arg("length")
    if isinstance(start, fx.Node) or isinstance(length, fx.Node) or _is_dynamic(op, "self", dim):
        op.freeze(type_[dim], "it is narrowed at a dynamic bound")
        axis = op.fixed(op.shape()[dim], "narrowed at a dynamic bound")
    else:
        start = start + type_[dim].size if start < 0 else start
        axis = _window(op, type_[dim], start, start + length, "start", None)
        op.size_literal("length", None, axis)
    return (*type_[:dim], axis, *type_[dim + 1 :])


def _is_dynamic(op: Op, name: str, dim: int) -> bool:
    return not isinstance(op.arg(name).meta["val"].shape[dim], int)


def _strided(op: Op, axis: Axis, start: int, end: int, step: int) -> Axis:
    if step == 1:
        return _window(op, axis, start, end, "start", "end")
    if axis.size % step or start >= step or end <= axis.size - step:
        op.freeze(axis, f"it is sliced in steps of {step}")
        return op.fixed(len(range(start, end, step)), f"a slice in steps of {step}")
    outer, inner = op.factor(axis, (axis.size // step, step))
    op.freeze(inner, f"places of a slice in steps of {step}")
    if op.arg("end") is not None and op.arg("end") < axis.size:
        op.freeze(outer, "it is sliced in steps up to a bound")
    return outer


def _window(op: Op, axis: Axis, start: int, end: int, low: str, high: str | None) -> Axis:
    """The piece [start, end) of `axis`; `low` and `high` name the arguments of its bounds."""
    sizes = [size for size in (start, end - start, axis.size - end) if size]
    if end <= start:
        if start >= axis.size:
            op.size_literal(low, None, axis)
        elif start:
            op.freeze(axis, "an empty slice is taken inside it")
        return op.fresh(0)
    pieces = op.split(axis, sizes)
    at = 1 if start else 0
    if op.arg(low) is not None and op.arg(low) < 0:  # it counts what is behind the bound
        op.size_literal(low, None, op.axes.sum(*pieces[at:]))
    elif start:
        op.size_literal(low, None, pieces[0])
    if high is not None and op.arg(high) is not None:
        if op.arg(high) < 0:
            op.size_literal(high, None, op.axes.sum(*pieces[at + 1 :]))
        elif op.arg(high) <= axis.size:
            op.size_literal(high, None, op.axes.sum(*pieces[: at + 1]))
    return pieces[at]


@rule("constant_pad_nd.default", "pad.default", zero=Zero.KEEP)
def pad(op: Op) -> Type:
    """Fixed places are added before and after: [pad + axis + pad]."""
    type_ = list(op.type("self"))
    amounts = op.arg("pad")
    mode, value = op.arg("mode") or "constant", op.arg("value") or 0
    if value != 0:
        op.zero = Zero.NEVER
    for back in range(len(amounts) // 2):
        before, after = amounts[2 * back], amounts[2 * back + 1]
        dim = len(type_) - 1 - back
        if before == 0 and after == 0:
            continue
        size = op.shape()[dim]
        plain = isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0
        if not plain or mode != "constant" or value != 0:
            op.freeze(type_[dim], "it is padded with something other than zeros")
            type_[dim] = op.fixed(size, "a padded axis")
            continue
        pads = [op.fixed(count, "padding") if count else None for count in (before, after)]
        parts = [part for part in (pads[0], type_[dim], pads[1]) if part is not None]
        type_[dim] = op.axes.sum(*parts)
    return tuple(type_)


@rule("roll.default", "flip.default", "fft_fft.default", "fft_ifft.default", zero=Zero.KEEP)
@rule(
    "fft_rfft.default", "fft_irfft.default", "fft_fft2.default", "fft_ifft2.default", zero=Zero.KEEP
)
@rule(
    "fft_rfft2.default",
    "fft_irfft2.default",
    "fft_fftn.default",
    "fft_ifftn.default",
    zero=Zero.KEEP,
)
def mix(op: Op) -> Type:
    """Elements change places or are mixed along some axes, which are frozen; the others stay."""
    type_, shape = list(op.type("self")), op.shape()
    for dim in op.dims("dims" if op.arg("dims") is not None else "dim", len(type_)):
        op.freeze(type_[dim], "its elements change places or are mixed")
        type_[dim] = op.fixed(shape[dim], "elements that changed places or were mixed")
    return tuple(type_)


@rule("unfold.default", zero=Zero.KEEP)
def unfold(op: Op) -> Type:
    """Windows along an axis, which is frozen; the places within them are a new last axis."""
    type_, shape = list(op.type("self")), op.shape()
    dim = op.dim("dimension", len(type_))
    op.freeze(type_[dim], "windows are cut out of it")
    type_[dim] = op.fixed(shape[dim], "windows of an axis")
    return (*type_, op.fixed(shape[-1], "places of a window"))


@rule("im2col.default", zero=Zero.KEEP)
def image_to_columns(op: Op) -> Type:
    """Windows of an image: (channel place), and a column for each window."""
    type_ = op.type("self")
    for axis in type_[-2:]:
        op.freeze(axis, "places of an image")
    places = op.fixed(math.prod(op.arg("kernel_size")), "places of a window")
    columns = op.fixed(op.shape()[-1], "windows of an image")
    return (*type_[:-3], op.axes.product(type_[-3], places), columns)


@rule("col2im.default", zero=Zero.KEEP)
def columns_to_image(op: Op) -> Type:
    """Windows (channel place) are added up to an image."""
    type_, shape = op.type("self"), op.shape()
    channel, places = op.factor(type_[-2], (shape[-3], math.prod(op.arg("kernel_size"))))
    op.freeze(places, "places of a window")
    op.freeze(type_[-1], "windows of an image")
    return (*type_[:-2], channel, *(op.fixed(size, "places of an image") for size in shape[-2:]))


@rule("channel_shuffle.default", zero=Zero.KEEP)
def channel_shuffle(op: Op) -> Type:
    """(group channel) becomes (channel group)."""
    type_ = op.type("self")
    groups = op.arg("groups")
    group, channel = op.factor(type_[1], (groups, type_[1].size // groups))
    op.size_literal("groups", None, group)
    return (type_[0], op.axes.product(channel, group), *type_[2:])


@rule("pixel_shuffle.default", zero=Zero.KEEP)
def pixel_shuffle(op: Op) -> Type:
    """(c r r) channels become c channels and r by r pixels."""
    type_ = op.type("self")
    factor = op.arg("upscale_factor")
    channels = op.shape()[-3]
    kept, rows, columns = op.factor(type_[-3], (channels, factor, factor))
    op.freeze(rows, "pixels of a shuffle")
    op.freeze(columns, "pixels of a shuffle")
    spatial = (op.axes.product(type_[-2], rows), op.axes.product(type_[-1], columns))
    return (*type_[:-3], kept, *spatial)


@rule("pixel_unshuffle.default", zero=Zero.KEEP)
def pixel_unshuffle(op: Op) -> Type:
    """R by r pixels become channels: (c r r)."""
    type_ = op.type("self")
    factor = op.arg("downscale_factor")
    spatial, inner = [], []
    for axis in type_[-2:]:
        outer, within = op.factor(axis, (axis.size // factor, factor))
        op.freeze(within, "pixels of a shuffle")
        spatial.append(outer)
        inner.append(within)
    return (*type_[:-3], op.axes.product(type_[-3], *inner), *spatial)


@rule("glu.default", zero=Zero.KEEP)
def glu(op: Op) -> Type:
    """Two halves of an axis become one: value times sigmoid(gate)."""
    type_ = op.type("self")
    dim = op.dim("dim", len(type_))
    half = type_[dim].size // 2
    value, gate = op.split(type_[dim], (half, half))
    op.unify(value, gate)
    return (*type_[:dim], value, *type_[dim + 1 :])
