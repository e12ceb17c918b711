"""For every rule a call of its operator between two linear layers, and what must come of it.

A case is a function of ``h`` (batch, 4, 8), which a linear layer makes, to a tensor whose last axis
another linear layer reads. `keeps` says which groups reach into the first layer's 8 rows (their
sizes, in order), `frozen` instead why there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphprune.frontend.recurrences.operators import (
    delta_recurrence,
    linear_recurrence,
    max_recurrence,
)

A = torch.ops.aten


@dataclass(frozen=True)
class Case:
    apply: Callable[..., Tensor]
    keeps: tuple[int, ...] = (8,)
    frozen: str = ""
    weights: tuple[tuple[int, ...], ...] = ()


def keeps(apply: Callable[..., Tensor], *sizes: int, weights: Any = ()) -> Case:
    return Case(apply, sizes, "", tuple(weights))


def frozen(apply: Callable[..., Tensor], why: str, weights: Any = ()) -> Case:
    return Case(apply, (), why, tuple(weights))


def _small(h: Tensor) -> Tensor:
    return h.tanh() * 0.5


def _inside(h: Tensor) -> Tensor:
    return h.sigmoid() * 0.5 + 0.25


def _whole(h: Tensor) -> Tensor:
    return (h * 4).to(torch.int64)


def _square(h: Tensor) -> Tensor:
    """(batch, 4, 8) -> (batch, 8, 8) without making two axes one."""
    return torch.cat([h, h * 2], 1)


def _image(h: Tensor) -> Tensor:
    """(batch, 4, 8) -> (batch, 8 channels, 2, 2)."""
    return h.transpose(1, 2).unflatten(2, (2, 2))


def _rows(image: Tensor) -> Tensor:
    """An image back to (batch, places, channels)."""
    return image.flatten(2).transpose(1, 2)


def _delta(h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay, what is written, values and reads of two chunks of two tokens, all from `h`."""
    chunks = h.unflatten(1, (2, 2))
    decay = chunks.sigmoid().mean(2)[..., None]
    return decay, chunks.transpose(-1, -2), chunks * 2, chunks * 0.1


# -- element-wise: f(0) = 0 ---------------------------------------------------------------------

_PLAIN_ZERO = [
    "abs",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "ceil",
    "erf",
    "expm1",
    "floor",
    "gelu",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "log1p",
    "mish",
    "neg",
    "relu",
    "relu6",
    "round",
    "sgn",
    "sign",
    "silu",
    "sin",
    "sinh",
    "square",
    "tan",
    "tanh",
    "trunc",
    "elu",
    "selu",
    "celu",
    "hardshrink",
    "softshrink",
    "positive",
    "frac",
    "nan_to_num",
    "deg2rad",
    "rad2deg",
    "alias",
    "clone",
    "contiguous",
    "detach",
    "resolve_conj",
    "resolve_neg",
    "lift_fresh_copy",
]

VANISHING: dict[str, Case] = {
    **{f"{n}.default": Case(lambda h, n=n: getattr(A, n).default(_small(h))) for n in _PLAIN_ZERO},
    "sqrt.default": Case(lambda h: A.sqrt.default(h.relu())),
    "dropout.default": Case(lambda h: A.dropout.default(h, 0.5, False)),
    "feature_dropout.default": Case(lambda h: A.feature_dropout.default(h, 0.5, False)),
    "alpha_dropout.default": Case(lambda h: A.alpha_dropout.default(h, 0.5, False)),
    "feature_alpha_dropout.default": Case(lambda h: A.feature_alpha_dropout.default(h, 0.5, False)),
    "to.dtype": Case(lambda h: A.to.dtype(h, torch.float64).float()),
    "to.device": Case(lambda h: A.to.device(h, "cpu", torch.float64).float()),
    "to.dtype_layout": Case(lambda h: A.to.dtype_layout(h, dtype=torch.float64).float()),
    "to.other": Case(lambda h: A.to.other(h, torch.zeros(1, dtype=torch.float64)).float()),
    "_to_copy.default": Case(lambda h: A._to_copy.default(h, dtype=torch.float64).float()),
    "linear_recurrence.default": Case(lambda h: linear_recurrence(h, h.sigmoid(), 1)),
    "type_as.default": Case(lambda h: A.type_as.default(h, torch.zeros(1).double()).float()),
    "copy.default": Case(lambda h: A.copy.default(h.cos(), h)),
    "where.self": Case(lambda h: A.where.self(h > 0, h, h.sin())),
    **{
        f"{n}.Scalar (0)": Case(lambda h, n=n: getattr(A, n).Scalar(h, 0))
        for n in ("gt", "lt", "ne")
    },
    "logical_and.default": Case(lambda h: A.logical_and.default(h > 0, h.cos() > 0.3)),
    "bitwise_and.Tensor": Case(lambda h: A.bitwise_and.Tensor(h.cos() > 0.3, h > 0)),
    "__and__.Tensor": Case(lambda h: A.__and__.Tensor(h > 0, h.cos() > 0.3)),
    "index_add.default": Case(
        lambda h: A.index_add.default(h.sin(), 1, torch.tensor([1, 0, 2, 1]), h)
    ),
    "index_put.default": Case(lambda h: A.index_put.default(h.sin(), [h.sum(-1) > 0], h[0, 0])),
    "round.decimals": Case(lambda h: A.round.decimals(h, decimals=1)),
    "pow.Tensor_Scalar": Case(lambda h: A.pow.Tensor_Scalar(h, 3)),
    "mul.Tensor": Case(lambda h: A.mul.Tensor(h, h.sigmoid())),
    "mul.Scalar": Case(lambda h: A.mul.Scalar(h, 2.5)),
    "div.Tensor": Case(lambda h: A.div.Tensor(h, 1 + h.abs())),
    "div.Scalar": Case(lambda h: A.div.Scalar(h, 2.5)),
    "div.Tensor_mode": Case(lambda h: A.div.Tensor_mode(h, 1 + h.abs(), rounding_mode="trunc")),
    "div.Scalar_mode": Case(lambda h: A.div.Scalar_mode(h, 0.3, rounding_mode="floor")),
    "add.Tensor": Case(lambda h: A.add.Tensor(h, h.tanh(), alpha=2)),
    "add.Scalar": Case(lambda h: A.add.Scalar(h, 0)),
    "sub.Tensor": Case(lambda h: A.sub.Tensor(h, h.tanh(), alpha=2)),
    "sub.Scalar": Case(lambda h: A.sub.Scalar(h, 0)),
    "rsub.Tensor": Case(lambda h: A.rsub.Tensor(h, h.tanh())),
    "rsub.Scalar": Case(lambda h: A.rsub.Scalar(h, 0)),
    "maximum.default": Case(lambda h: A.maximum.default(h, h.tanh())),
    "minimum.default": Case(lambda h: A.minimum.default(h, h.tanh())),
    "max.other": Case(lambda h: A.max.other(h, h.tanh())),
    "min.other": Case(lambda h: A.min.other(h, h.tanh())),
    "lerp.Scalar": Case(lambda h: A.lerp.Scalar(h, h.tanh(), 0.3)),
    "clamp.default": Case(lambda h: A.clamp.default(h, -0.1, 0.2)),
    "clamp_min.default": Case(lambda h: A.clamp_min.default(h, -0.1)),
    "clamp_max.default": Case(lambda h: A.clamp_max.default(h, 0.1)),
    "masked_fill.Scalar": Case(
        lambda h: A.masked_fill.Scalar(h, torch.arange(4).remainder(2).eq(0)[:, None], 0)
    ),
    "prelu.default": Case(
        lambda h, slope: A.prelu.default(h.transpose(1, 2), slope).transpose(1, 2), weights=((8,),)
    ),
    "zeros_like.default": Case(lambda h: h + A.zeros_like.default(h)),
    "zeros.default": Case(lambda h: h + A.zeros.default([8])),
    "new_zeros.default": Case(lambda h: h + A.new_zeros.default(h, [8])),
    "rms_norm.default": Case(lambda h, gain: A.rms_norm.default(h, [8], gain), weights=((8,),)),
    "layer_norm.default": Case(
        lambda h, gain, bias: A.layer_norm.default(h, [8], gain, bias), weights=((8,), (8,))
    ),
    "glu.default": keeps(lambda h: A.glu.default(h, -1), 4),
}
"""Operators whose result vanishes where `h` does: their results may be summed over."""

# -- element-wise: nothing is known of zeros ----------------------------------------------------

_PLAIN_SHIFTED = [
    "acos",
    "cosh",
    "digamma",
    "erfc",
    "exp",
    "exp2",
    "hardsigmoid",
    "isfinite",
    "isinf",
    "isnan",
    "lgamma",
    "log",
    "log10",
    "log2",
    "log_sigmoid",
    "logit",
    "reciprocal",
    "rsqrt",
    "sigmoid",
    "softplus",
    "cos",
]
_COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]
_LOGICAL = ["and", "or", "xor"]
_NOT_AND = ["or", "xor"]

SHIFTED: dict[str, Case] = {
    **{
        f"{n}.default": Case(lambda h, n=n: getattr(A, n).default(_inside(h)))
        for n in _PLAIN_SHIFTED
    },
    "acosh.default": Case(lambda h: A.acosh.default(_inside(h) + 1)),
    "logical_not.default": Case(lambda h: A.logical_not.default(h > 0)),
    "bitwise_not.default": Case(lambda h: A.bitwise_not.default(_whole(h))),
    "threshold.default": Case(lambda h: A.threshold.default(h, 0.1, 0.7)),
    "pow.Tensor_Tensor": Case(lambda h: A.pow.Tensor_Tensor(_inside(h), h)),
    "pow.Scalar": Case(lambda h: A.pow.Scalar(2, h)),
    "atan2.default": Case(lambda h: A.atan2.default(h, _inside(h))),
    "floor_divide.default": Case(lambda h: A.floor_divide.default(h, _inside(h))),
    "floor_divide.Scalar": Case(lambda h: A.floor_divide.Scalar(h, 0.3)),
    "fmod.Tensor": Case(lambda h: A.fmod.Tensor(h, _inside(h))),
    "fmod.Scalar": Case(lambda h: A.fmod.Scalar(h, 0.3)),
    "remainder.Tensor": Case(lambda h: A.remainder.Tensor(h, _inside(h))),
    "remainder.Scalar": Case(lambda h: A.remainder.Scalar(h, 0.3)),
    "hypot.default": Case(lambda h: A.hypot.default(h, _inside(h))),
    "logaddexp.default": Case(lambda h: A.logaddexp.default(h, h.tanh())),
    "heaviside.default": Case(lambda h: A.heaviside.default(h, _inside(h))),
    "xlogy.Tensor": Case(lambda h: A.xlogy.Tensor(h, _inside(h))),
    "bitwise_left_shift.Tensor_Scalar": Case(
        lambda h: A.bitwise_left_shift.Tensor_Scalar(_whole(h).abs(), 1)
    ),
    **{
        f"{n}.Tensor": Case(lambda h, n=n: getattr(A, n).Tensor(h, h.tanh().neg()))
        for n in _COMPARISONS
    },
    **{f"{n}.Scalar": Case(lambda h, n=n: getattr(A, n).Scalar(h, 0.1)) for n in _COMPARISONS},
    **{
        f"logical_{n}.default": Case(
            lambda h, n=n: getattr(A, f"logical_{n}").default(h > 0, h.sin() > 0.3)
        )
        for n in _NOT_AND
    },
    **{
        f"{form}.Tensor": Case(lambda h, form=form: getattr(A, form).Tensor(h > 0, h.sin() > 0.3))
        for n in _NOT_AND
        for form in (f"bitwise_{n}", f"__{n}__")
    },
    **{
        f"{form}.Scalar": Case(lambda h, form=form: getattr(A, form).Scalar(_whole(h), 3))
        for n in _LOGICAL
        for form in (f"bitwise_{n}", f"__{n}__")
    },
    "add.Scalar (not 0)": Case(lambda h: A.add.Scalar(h, 1)),
    "rsub.Scalar (not 0)": Case(lambda h: A.rsub.Scalar(h, 1)),
    "pow.Tensor_Scalar (negative)": Case(lambda h: A.pow.Tensor_Scalar(_inside(h), -1)),
    "empty_like.default": Case(lambda h: h + A.fill.Scalar(A.empty_like.default(h), 0.5)),
    "hardtanh.default (above 0)": Case(lambda h: A.hardtanh.default(h, 1.0, 2.0)),
    "lerp.Tensor": Case(lambda h: A.lerp.Tensor(h, h.tanh(), h.cos())),
    "addcmul.default": Case(lambda h: A.addcmul.default(h, h, h.sin())),
    "addcdiv.default": Case(lambda h: A.addcdiv.default(h, h, _inside(h))),
    "clamp.default (above 0)": Case(lambda h: A.clamp.default(h, 0.1, 0.5)),
    "clamp.Tensor": Case(lambda h: A.clamp.Tensor(h, _small(h), _inside(h))),
    "where.self (not 0)": Case(lambda h: A.where.self(h > 0, h, h.cos())),
    "where.ScalarOther": Case(lambda h: A.where.ScalarOther(h > 0, h, 2.0)),
    "where.ScalarSelf": Case(lambda h: A.where.ScalarSelf(h > 0, 2.0, h)),
    "where.Scalar": Case(lambda h: A.where.Scalar(h > 0, 2.0, 3.0)),
    "masked_fill.Scalar (not 0)": Case(lambda h: A.masked_fill.Scalar(h, h > 0, 2.0)),
    "masked_fill.Tensor": Case(lambda h: A.masked_fill.Tensor(h, h > 0, torch.tensor(2.0))),
    "copy.default": Case(lambda h: A.copy.default(h.clone(), h[0].cos())),
    "ones_like.default": Case(lambda h: h + A.ones_like.default(h)),
    "full_like.default": Case(lambda h: h + A.full_like.default(h, 0.5)),
    "fill.Scalar": Case(lambda h: h + A.fill.Scalar(h, 0.5)),
    "fill.Tensor": Case(lambda h: h + A.fill.Tensor(h, torch.tensor(0.5))),
    "rand_like.default": Case(lambda h: h + 1 + 0 * A.rand_like.default(h)),
    "randn_like.default": Case(lambda h: h + 1 + 0 * A.randn_like.default(h)),
    "bernoulli.default": Case(lambda h: h + 1 + 0 * A.bernoulli.default(_inside(h))),
    "ones.default": Case(lambda h: h + A.ones.default([8])),
    "full.default": Case(lambda h: h + A.full.default([8], 0.5)),
    "new_ones.default": Case(lambda h: h + A.new_ones.default(h, [8])),
    "new_full.default": Case(lambda h: h + A.new_full.default(h, [8], 0.5)),
    "empty.memory_format": Case(lambda h: h + A.fill.Scalar(A.empty.memory_format([8]), 0.5)),
    "new_empty.default": Case(lambda h: h + A.fill.Scalar(A.new_empty.default(h, [8]), 0.5)),
    "rand.default": Case(lambda h: h + 1 + 0 * A.rand.default([8])),
    "randn.default": Case(lambda h: h + 1 + 0 * A.randn.default([8])),
}
"""Operators of which nothing is known at zero: their results must not be summed over."""

# -- layout -------------------------------------------------------------------------------------

LAYOUT: dict[str, Case] = {
    "view.default": keeps(
        lambda h: A.view.default(h, [-1, 4, 2, 4]).transpose(2, 3).flatten(2), 2, 4
    ),
    "reshape.default": keeps(
        lambda h: A.reshape.default(h, [-1, 4, 4, 2])[..., :3, :].flatten(2), 3, 2
    ),
    "_unsafe_view.default": keeps(lambda h: A._unsafe_view.default(h, [-1, 2, 16]), 8),
    "flatten.using_ints": keeps(lambda h: A.flatten.using_ints(h.unflatten(2, (2, 4)), 2), 2, 4),
    "ravel.default": keeps(lambda h: A.ravel.default(h).view(-1, 4, 8), 8),
    "unsqueeze.default": keeps(lambda h: A.unsqueeze.default(h, -2), 8),
    "squeeze.dim": keeps(lambda h: A.squeeze.dim(h[:, :1], 1), 8),
    "squeeze.dims": keeps(lambda h: A.squeeze.dims(h[:, :1, None], [1, 2]), 8),
    "squeeze.default": keeps(lambda h: A.squeeze.default(h[:, :1]), 8),
    "reshape_as.default": keeps(lambda h: A.reshape_as.default(h.flatten(1), h), 8),
    "view_as.default": keeps(lambda h: A.view_as.default(h.flatten(1), h), 8),
    "unflatten.int": keeps(
        lambda h: A.unflatten.int(h, 2, [2, 4]).transpose(2, 3).flatten(2), 2, 4
    ),
    "view.dtype": keeps(lambda h: A.view.dtype(h, torch.int32).view(torch.float32), 8),
    "view.dtype (other width)": frozen(
        lambda h: A.view.dtype(h, torch.int16).float(), "reinterpreted as another type"
    ),
    "permute.default": keeps(lambda h: A.permute.default(h, [1, 0, -1]).transpose(0, 1), 8),
    "transpose.int": keeps(lambda h: A.transpose.int(A.transpose.int(h, 1, 2), -1, -2), 8),
    "swapaxes.default": keeps(lambda h: A.swapaxes.default(h, 1, 2).transpose(1, 2), 8),
    "swapdims.default": keeps(lambda h: A.swapdims.default(h, 1, 2).transpose(1, 2), 8),
    "t.default": keeps(lambda h: A.t.default(A.t.default(h.flatten(0, 1))), 8),
    "numpy_T.default": keeps(lambda h: A.numpy_T.default(A.numpy_T.default(h.flatten(0, 1))), 8),
    "mT.default": keeps(lambda h: A.mT.default(h).transpose(1, 2), 8),
    "adjoint.default": keeps(lambda h: A.adjoint.default(h).transpose(1, 2), 8),
    "movedim.int": keeps(lambda h: A.movedim.int(h, -1, 0).permute(1, 2, 0), 8),
    "movedim.intlist": keeps(
        lambda h: A.movedim.intlist(h[:, None], [3, 1], [1, 0]).permute(2, 0, 3, 1), 8
    ),
    "moveaxis.int": keeps(lambda h: A.moveaxis.int(h, -1, 0).permute(1, 2, 0), 8),
    "expand.default": keeps(lambda h: A.expand.default(h[:, :, None], [-1, -1, 3, 8]), 8),
    "expand_as.default": keeps(lambda h: A.expand_as.default(h[:, :1], h), 8),
    "expand_as.default (its other)": keeps(
        lambda h: A.expand_as.default(h.mean(-1, keepdim=True), h) + 1, 8
    ),
    "broadcast_to.default": keeps(
        lambda h: A.broadcast_to.default(h[:, :, None], [-1, -1, 3, 8]), 8
    ),
    "repeat.default": keeps(lambda h: A.repeat.default(h, [1, 1, 2]), 8),
    "tile.default": keeps(lambda h: A.tile.default(h, [1, 1, 2]), 8),
    "repeat_interleave.self_int": keeps(lambda h: A.repeat_interleave.self_int(h, 2, -1), 8),
    "cat.default": keeps(lambda h: A.cat.default([h, h.sin()], -1), 8),
    "stack.default": keeps(lambda h: A.stack.default([h, h.sin()], -2).flatten(2), 8),
    "split_with_sizes.default": keeps(
        lambda h: torch.cat(A.split_with_sizes.default(h, [5, 3], -1)[::-1], -1), 5, 3
    ),
    "split.sizes": keeps(lambda h: torch.cat(A.split.sizes(h, [5, 3], -1)[::-1], -1), 5, 3),
    "split.Tensor": keeps(lambda h: torch.cat(A.split.Tensor(h, 3, -1)[::-1], -1), 3, 3, 2),
    "chunk.default": keeps(lambda h: torch.mul(*A.chunk.default(h, 2, -1)), 4),
    "unbind.int": keeps(lambda h: torch.cat(A.unbind.int(h.unflatten(2, (2, 4)), 2), -1), 4),
    "select.int": keeps(lambda h: A.select.int(h.unflatten(2, (4, 2)), 2, 1), 2, 2),
    "select.int (from the end)": keeps(lambda h: A.select.int(h.unflatten(2, (4, 2)), 2, -2), 2, 2),
    "slice.Tensor": keeps(lambda h: A.slice.Tensor(h, 2, 2, 7), 2, 5),
    "slice.Tensor (from the end)": keeps(lambda h: A.slice.Tensor(h, 2, -3, 2**63 - 1), 5, 3),
    "slice.Tensor (to the end)": keeps(lambda h: A.slice.Tensor(h, 2, 0, -3), 5, 3),
    "slice.Tensor (both)": keeps(lambda h: A.slice.Tensor(h, 2, -6, -2), 2, 4, 2),
    "slice.Tensor (steps)": keeps(lambda h: A.slice.Tensor(h, 2, 0, 8, 2), 4),
    "narrow.default": keeps(lambda h: A.narrow.default(h, 2, 2, 5), 2, 5),
    "narrow.default (from the end)": keeps(lambda h: A.narrow.default(h, 2, -3, 3), 5, 3),
    "constant_pad_nd.default": keeps(lambda h: A.constant_pad_nd.default(h, [1, 2]), 8),
    "pad.default": keeps(lambda h: A.pad.default(h, [0, 2]), 8),
    "pad.default (ones)": frozen(
        lambda h: A.pad.default(h, [0, 2], "constant", 1.0), "padded with something other"
    ),
    "pad.default (reflecting)": frozen(
        lambda h: A.pad.default(h, [1, 2], "reflect"), "padded with something other"
    ),
    "pad.default (others, reflecting)": keeps(
        lambda h: A.pad.default(h.mT, [1, 2], "reflect").mT, 8
    ),
    "pad.default (others, circular)": keeps(
        lambda h: A.pad.default(h.mT, [1, 2], "circular").mT, 8
    ),
    "roll.default": frozen(lambda h: A.roll.default(h, [1], [2]), "reordered"),
    "roll.default (all)": frozen(lambda h: A.roll.default(h, [1]), "reordered"),
    "roll.default (others)": keeps(lambda h: A.roll.default(h, [1, 1], [1, -3]), 8),
    "flip.default": frozen(lambda h: A.flip.default(h, [2]), "reordered"),
    "flip.default (others)": keeps(lambda h: A.flip.default(h, [-2]), 8),
    "unfold.default": frozen(lambda h: A.unfold.default(h, 2, 4, 2), "windows are cut out of it"),
    "unfold.default (others)": keeps(lambda h: A.unfold.default(h, 1, 2, 1).mT, 8),
    "fft_fft.default": frozen(lambda h: A.fft_fft.default(h).abs(), "mixed"),
    **{
        f"fft_{n}.default (others)": keeps(
            lambda h, n=n: getattr(A, f"fft_{n}").default(h, None, 1).abs(), 8
        )
        for n in ("fft", "ifft", "rfft", "irfft")
    },
    **{
        f"fft_{n}.default (others)": keeps(
            lambda h, n=n: (
                getattr(A, f"fft_{n}")
                .default(h.unflatten(1, (2, 2)), None, [1, 2])
                .abs()
                .flatten(1, 2)
            ),
            8,
        )
        for n in ("fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn")
    },
    "real.default": keeps(lambda h: A.real.default(A.fft_fft.default(h, None, 1)), 8),
    "imag.default": keeps(lambda h: A.imag.default(A.fft_fft.default(h, None, 1)), 8),
    "channel_shuffle.default": keeps(
        lambda h: A.channel_shuffle.default(h.transpose(1, 2), 2).transpose(1, 2), 2, 4
    ),
    "im2col.default": keeps(
        lambda h: A.im2col.default(_image(h), [2, 1], [1, 1], [0, 0], [1, 1]).mT, 8
    ),
    "col2im.default": keeps(
        lambda h: _rows(A.col2im.default(h.mT, [3, 2], [2, 1], [1, 1], [0, 0], [1, 1])), 4
    ),
    "pixel_shuffle.default": keeps(lambda h: _rows(A.pixel_shuffle.default(_image(h), 2)), 2),
    "pixel_unshuffle.default": keeps(lambda h: _rows(A.pixel_unshuffle.default(_image(h), 2)), 8),
}

# -- indexing -----------------------------------------------------------------------------------


INDEXING: dict[str, Case] = {
    "embedding.default": keeps(
        lambda h, table: h + A.embedding.default(table, torch.arange(4) % 2), 8, weights=((2, 8),)
    ),
    "index.Tensor": keeps(lambda h: A.index.Tensor(h, [None, torch.tensor([1, 0, 2])]), 8),
    "index.Tensor (neighbors)": keeps(
        lambda h: A.index.Tensor(h, [None, None, torch.tensor([-5, -4, -3])]), 3, 3, 2
    ),
    "index.Tensor (over it)": frozen(
        lambda h: A.index.Tensor(h, [None, None, torch.tensor([1, 0, 2])]), "picked by index"
    ),
    "index.Tensor (a mask)": keeps(
        lambda h: h * A.index.Tensor(h.cos(), [h.sum(-1) > 0]).sum(0), 8
    ),
    "index.Tensor (a mask over it)": frozen(
        lambda h: h * A.index.Tensor(h, [None, None, h[0, 0] > 0]).sum(), "picked by a mask"
    ),
    "index_put.default": keeps(
        lambda h: A.index_put.default(h.clone(), [h.sum(-1) > 0], h[0, 0].cos()), 8
    ),
    "index_put.default (by index)": keeps(
        lambda h: A.index_put.default(h.clone(), [None, torch.tensor([1, 0])], h[:, 2:]), 8
    ),
    "index_put.default (over it)": frozen(
        lambda h: A.index_put.default(h.clone(), [None, None, torch.tensor([1, 0])], h[..., 2:4]),
        "written by index",
    ),
    "index_select.default": keeps(lambda h: A.index_select.default(h, 1, torch.tensor([1, 0])), 8),
    "index_select.default (over it)": frozen(
        lambda h: A.index_select.default(h, 2, torch.tensor([1, 0])), "picked by index"
    ),
    "gather.default": frozen(lambda h: A.gather.default(h, 2, h.gt(0).long()), "picked by index"),
    "gather.default (beside it)": keeps(lambda h: A.gather.default(h, 1, h.gt(0).long()), 8),
    "take_along_dim.default": keeps(lambda h: A.take_along_dim.default(h, h.gt(0).long(), 1), 8),
    "scatter.src": keeps(
        lambda h: A.scatter.src(h, 1, h.gt(9).long() + torch.arange(4)[:, None], h.sin()), 8
    ),
    "scatter.value": keeps(
        lambda h: A.scatter.value(h, 1, h.gt(9).long() + torch.arange(4)[:, None], 2.0), 8
    ),
    "scatter_add.default": keeps(lambda h: A.scatter_add.default(h, 1, h.gt(0).long(), h.sin()), 8),
    "scatter_reduce.two": keeps(
        lambda h: A.scatter_reduce.two(h, 1, h.gt(0).long(), h.sin(), "amax"), 8
    ),
    "index_add.default": keeps(
        lambda h: A.index_add.default(h, 1, torch.tensor([1, 0, 2, 1]), h.sin()), 8
    ),
    "index_copy.default": keeps(
        lambda h: A.index_copy.default(h, 1, torch.tensor([1, 0, 2, 3]), h.sin()), 8
    ),
    "one_hot.default": frozen(
        lambda h: A.one_hot.default(h[..., 0].gt(0).long(), 8).float() * h, "picked by index"
    ),
    "where.default": frozen(lambda h: h + A.where.default(h > 0)[2].sum(), "found by a mask"),
    "nonzero_numpy.default": frozen(
        lambda h: h + A.nonzero_numpy.default(h > 0)[2].sum(), "found by a mask"
    ),
    "nonzero.default": frozen(lambda h: h + A.nonzero.default(h > 0).sum(), "found by a mask"),
    "one_hot.default (chosen)": keeps(lambda h: A.one_hot.default(h.argmax(-1), 8).float() * h, 8),
    "tril.default": frozen(lambda h: A.tril.default(h), "compared with those of another"),
    "triu.default": frozen(lambda h: A.triu.default(h), "compared with those of another"),
    "randperm.default": frozen(lambda h: h + 0 * A.randperm.default(8), "count its positions"),
    "scalar_tensor.default": keeps(lambda h: h * A.scalar_tensor.default(2.0), 8),
}

COUNTING: dict[str, Case] = {
    "arange.default": keeps(lambda h: h + A.arange.default(h.shape[0])[:, None, None], 8),
    "arange.default (constant)": keeps(lambda h: h + A.arange.default(8), 8),
    "arange.start": keeps(lambda h: h + A.arange.start(1, 1 + h.shape[0])[:, None, None], 8),
    "arange.start_step": keeps(
        lambda h: h + A.arange.start_step(0, 2 * h.shape[0], 2)[:, None, None], 8
    ),
    "eye.m (constant)": keeps(lambda h: h @ A.eye.m(8, 4), 8),
    "isin.Tensor_Tensor": keeps(
        lambda h: (
            h * A.isin.Tensor_Tensor(torch.arange(h.shape[0]), torch.tensor([1, 2]))[:, None, None]
        ),
        8,
    ),
}
"""Operators that count up to a size: capture computes what they do, but not for a dynamic one."""

# -- reductions and norms -----------------------------------------------------------------------


def _spread(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A value for each row, which scales the row."""
    return lambda h: h * function(h)


def _centered(h: Tensor) -> Tensor:
    """Its square sum does not see what was removed, though what is centered does not vanish."""
    h = h.cos()
    return h * (h - h.mean(-1, keepdim=True)).square().sum(-1, keepdim=True)


def _normalized(h: Tensor) -> Tensor:
    """LayerNorm as it is written out."""
    mean = h.double().mean(-1, keepdim=True)
    variance = (h.double() - mean).pow(2).mean(-1, keepdim=True)
    return ((h.double() - mean) * torch.rsqrt(variance + 1e-5)).to(h.dtype)


def _centered_by_pair(h: Tensor) -> Tensor:
    variance, mean = A.var_mean.correction(h, [-1], correction=0, keepdim=True)
    return (h - mean) / (variance + 1e-5).sqrt()


_OVER = " runs over it"

REDUCTIONS: dict[str, Case] = {
    "sum.dim_IntList": keeps(_spread(lambda h: A.sum.dim_IntList(h, [-1], True)), 8),
    "sum.dim_IntList (other)": keeps(lambda h: A.sum.dim_IntList(h, [1]), 8),
    "sum.default": keeps(lambda h, w: h * A.sum.default(w), 8, weights=((5,),)),
    "nansum.default (of all)": keeps(lambda h, w: h * A.nansum.default(w), 8, weights=((5,),)),
    "mean.default": keeps(lambda h, w: h * A.mean.default(w), 8, weights=((5,),)),
    "prod.default": keeps(lambda h, w: h * A.prod.default(w), 8, weights=((5,),)),
    **{
        f"{n}.default": keeps(lambda h, w, n=n: h * getattr(A, n).default(w), 8, weights=((5,),))
        for n in ("max", "min", "var", "std")
    },
    "any.default": keeps(lambda h, w: h * A.any.default(w > 0), 8, weights=((5,),)),
    "all.default": keeps(lambda h, w: h * A.all.default(w > 0), 8, weights=((5,),)),
    "nansum.default": keeps(_spread(lambda h: A.nansum.default(h, [-1], True)), 8),
    "count_nonzero.dim_IntList": keeps(
        _spread(lambda h: A.count_nonzero.dim_IntList(h.relu(), [-1])[..., None]), 8
    ),
    "linalg_vector_norm.default": keeps(
        _spread(lambda h: A.linalg_vector_norm.default(h, 2, [-1], True)), 8
    ),
    "linalg_vector_norm.default (order 0)": frozen(
        _spread(lambda h: A.linalg_vector_norm.default(h, 0, [-1], True)), "a norm of order 0"
    ),
    "norm.ScalarOpt_dim": keeps(_spread(lambda h: A.norm.ScalarOpt_dim(h, 3, [-1], True)), 8),
    "mean.dim": keeps(_spread(lambda h: A.mean.dim(h, [-1], True)), 8),
    "mean.dim (two)": keeps(_spread(lambda h: A.mean.dim(h, [1, 2], True)), 8),
    "var.dim": keeps(_spread(lambda h: A.var.dim(h, [-1], True, True)), 8),
    "var.correction": keeps(_spread(lambda h: A.var.correction(h, [-1], keepdim=True)), 8),
    "std.dim": keeps(_spread(lambda h: A.std.dim(h.cos(), [-1], True, True)), 8),
    "std.correction": keeps(_spread(lambda h: A.std.correction(h, [1, 2], keepdim=True)), 8),
    "var.correction (other)": keeps(lambda h: A.var.correction(h, [1]), 8),
    "var_mean.correction": keeps(
        lambda h: h * torch.add(*A.var_mean.correction(h.cos(), [-1], keepdim=True)), 8
    ),
    "std_mean.correction": keeps(
        lambda h: h * torch.add(*A.std_mean.correction(h.cos(), [-1], keepdim=True)), 8
    ),
    "var_mean.dim": keeps(lambda h: h * torch.add(*A.var_mean.dim(h.cos(), [-1], True, True)), 8),
    "std_mean.dim": keeps(lambda h: h + torch.mul(*A.std_mean.dim(h, [1], True, True)), 8),
    "var.dim (beside what is summed over)": keeps(
        lambda h: h * A.var.dim(h, [1], True, True).sum(-1, keepdim=True), 8
    ),
    "sub.Tensor (centered)": keeps(_centered, 8),
    "sub.Tensor (centered and scaled)": keeps(_normalized, 8),
    "sub.Tensor (centered and scaled by heads)": keeps(
        lambda h: _normalized(h.unflatten(2, (2, 4))).flatten(2), 2, 4
    ),
    "sub.Tensor (centered by a pair)": keeps(_centered_by_pair, 8),
    "amax.default": frozen(_spread(lambda h: A.amax.default(h, [-1], True)), "amax" + _OVER),
    "amin.default": frozen(_spread(lambda h: A.amin.default(h, [-1], True)), "amin" + _OVER),
    "amax.default (other)": keeps(lambda h: A.amax.default(h, [1]), 8),
    "any.dim": frozen(_spread(lambda h: A.any.dim(h > 0, -1, True)), "any" + _OVER),
    "any.dims": frozen(_spread(lambda h: A.any.dims(h > 0, [-1], True)), "any" + _OVER),
    "all.dim": frozen(_spread(lambda h: A.all.dim(h > 0, -1, True)), "all" + _OVER),
    "all.dims": frozen(_spread(lambda h: A.all.dims(h > 0, [-1], True)), "all" + _OVER),
    "prod.dim_int": frozen(_spread(lambda h: A.prod.dim_int(h, -1, True)), "prod" + _OVER),
    "logsumexp.default": frozen(
        _spread(lambda h: A.logsumexp.default(h, [-1], True)), "logsumexp" + _OVER
    ),
    "argmax.default": frozen(_spread(lambda h: A.argmax.default(h, -1, True)), "argmax" + _OVER),
    "argmin.default": frozen(_spread(lambda h: A.argmin.default(h, -1, True)), "argmin" + _OVER),
    "max.dim": frozen(_spread(lambda h: A.max.dim(h, -1, True)[0]), "max" + _OVER),
    "min.dim": frozen(_spread(lambda h: A.min.dim(h, -1, True)[0]), "min" + _OVER),
    "max.dim (other)": keeps(lambda h: A.max.dim(h, 1)[0], 8),
    "median.dim": frozen(_spread(lambda h: A.median.dim(h, -1, True)[0]), "median" + _OVER),
    "mode.default": frozen(_spread(lambda h: A.mode.default(h, -1, True)[0]), "mode" + _OVER),
    "softmax.int": frozen(lambda h: A.softmax.int(h, -1), "softmax" + _OVER),
    "softmax.int (other)": keeps(lambda h: A.softmax.int(h, 1), 8),
    "_softmax.default": frozen(lambda h: A._softmax.default(h, -1, False), "softmax" + _OVER),
    "log_softmax.int": frozen(lambda h: A.log_softmax.int(h, -1), "log_softmax" + _OVER),
    "_log_softmax.default": frozen(
        lambda h: A._log_softmax.default(h, -1, False), "log_softmax" + _OVER
    ),
    "cumsum.default": frozen(lambda h: A.cumsum.default(h, -1), "cumsum" + _OVER),
    "cumsum.default (other)": keeps(lambda h: A.cumsum.default(h, 1), 8),
    "cumprod.default": frozen(lambda h: A.cumprod.default(h, -1), "cumprod" + _OVER),
    "logcumsumexp.default": frozen(lambda h: A.logcumsumexp.default(h, -1), "logcumsumexp" + _OVER),
    "argsort.default": frozen(lambda h: A.argsort.default(h), "argsort" + _OVER),
    "argsort.stable": frozen(lambda h: A.argsort.stable(h, stable=True, dim=-1), "argsort" + _OVER),
    "sort.default": frozen(lambda h: A.sort.default(h)[0], "sort" + _OVER),
    "sort.stable": frozen(lambda h: A.sort.stable(h, stable=True, dim=-1)[0], "sort" + _OVER),
    "linear_recurrence.default": frozen(
        lambda h: linear_recurrence(h, h.sigmoid(), 2), "a recurrence" + _OVER
    ),
    "max_recurrence.default": keeps(lambda h: max_recurrence(h, -h.sigmoid(), 1), 8),
    "max_recurrence.default (over it)": frozen(
        lambda h: max_recurrence(h, -h.sigmoid(), -1), "a recurrence" + _OVER
    ),
    "cummax.default": frozen(lambda h: A.cummax.default(h, -1)[0], "cummax" + _OVER),
    "cummin.default": frozen(lambda h: A.cummin.default(h, -1)[0], "cummin" + _OVER),
    "topk.default": frozen(lambda h: A.topk.default(h, 3)[0], "the largest of it are picked"),
    "topk.default (other)": keeps(lambda h: A.topk.default(h, 2, 1)[0], 8),
    "kthvalue.default": keeps(lambda h: A.kthvalue.default(h, 2, 1, True)[0], 8),
    "kthvalue.default (over it)": frozen(
        _spread(lambda h: A.kthvalue.default(h, 2, -1, True)[0]), "the k-th of it is picked"
    ),
    "kthvalue.default (dropped)": keeps(lambda h: A.kthvalue.default(h, 2, 1)[0], 8),
    "layer_norm.default (plain)": keeps(lambda h: A.layer_norm.default(h, [8]), 8),
    "layer_norm.default (head)": keeps(
        lambda h: A.layer_norm.default(h.unflatten(2, (2, 4)), [4]).flatten(2), 2, 4
    ),
    "layer_norm.default (two)": keeps(
        lambda h: A.layer_norm.default(h.unflatten(2, (2, 4)), [2, 4]).flatten(2), 2, 4
    ),
    "rms_norm.default (head)": keeps(
        lambda h: A.rms_norm.default(h.unflatten(2, (2, 4)), [4]).flatten(2), 2, 4
    ),
    "rms_norm.default (two)": keeps(
        lambda h: A.rms_norm.default(h.unflatten(2, (2, 4)), [2, 4]).flatten(2), 2, 4
    ),
    "group_norm.default": keeps(
        lambda h, gain: _rows(A.group_norm.default(_image(h), 4, gain)), 4, 2, weights=((8,),)
    ),
    "batch_norm.default": keeps(
        lambda h, gain, mean: A.batch_norm.default(
            h.transpose(1, 2), gain, None, mean, gain.abs(), False, 0.1, 1e-5, False
        ).transpose(1, 2),
        8,
        weights=((8,), (8,)),
    ),
    "group_norm.default (plain)": keeps(
        lambda h: _rows(A.group_norm.default(_image(h).cos(), 2)), 2, 4
    ),
    "group_norm.default (of one group)": keeps(
        lambda h, gain, shift: _rows(A.group_norm.default(_image(h), 1, gain, shift)),
        8,
        weights=((8,), (8,)),
    ),
    "batch_norm.default (of a batch)": keeps(
        lambda h: A.batch_norm.default(h.cos(), None, None, None, None, True, 0.1, 1e-5, False), 8
    ),
    "batch_norm.default (of each)": keeps(
        lambda h: A.batch_norm.default(
            h.transpose(1, 2), None, None, None, None, True, 0.1, 1e-5, False
        ).transpose(1, 2),
        8,
    ),
    "batch_norm.default (of a batch, fixed)": frozen(
        lambda h, mean: A.batch_norm.default(h, None, None, mean, mean, True, 0.0, 1e-5, False),
        "mean and variance are taken over it",
        weights=((4,),),
    ),
    "instance_norm.default": keeps(
        lambda h, gain: A.instance_norm.default(
            h.transpose(1, 2), gain, None, None, None, True, 0.1, 1e-5, False
        ).transpose(1, 2),
        8,
        weights=((8,),),
    ),
    "instance_norm.default (over it)": keeps(
        lambda h: A.instance_norm.default(h, None, None, None, None, True, 0.1, 1e-5, False), 8
    ),
}

# -- contractions and pooling -------------------------------------------------------------------


def _attended(h: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, keys, values = (x.unflatten(2, (2, 4)).transpose(1, 2) for x in (h, h @ key, h @ value))
    return A.scaled_dot_product_attention.default(query, keys, values).transpose(1, 2).flatten(2)


def _attended_in_groups(h: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query = h.unflatten(2, (4, 2)).transpose(1, 2)
    keys, values = (x.unflatten(2, (2, 2)).transpose(1, 2) for x in (h @ key, h @ value))
    return (
        A.scaled_dot_product_attention.default(query, keys, values, enable_gqa=True)
        .transpose(1, 2)
        .flatten(2)
    )


def _gates(count: int, inside: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the weights of a recurrent layer of 6 units."""
    rows = count * 6
    return (rows, inside), (rows, 6), (rows,), (rows,)


def _states(h: Tensor, layers: int, count: int) -> list[Tensor]:
    return [torch.zeros(layers, h.shape[0], 6) for _ in range(count)]


CONTRACTIONS: dict[str, Case] = {
    "linear.default": keeps(lambda h, w: A.linear.default(h, w), 8, weights=((5, 8),)),
    "matmul.default": keeps(lambda h, w: A.matmul.default(h, w), 8, weights=((8, 5),)),
    "matmul.default (itself)": keeps(lambda h: h.mT.matmul(h).matmul(h.mT).mT, 8),
    "bmm.default": keeps(lambda h: A.bmm.default(A.bmm.default(h, h.mT), h), 8),
    "mm.default": keeps(lambda h, w: A.mm.default(h.flatten(0, 1), w), 8, weights=((8, 5),)),
    "mv.default": keeps(
        lambda h, w: h.flatten(0, 1) * A.mv.default(h.flatten(0, 1), w)[:, None], 8, weights=((8,),)
    ),
    "dot.default": keeps(lambda h, w, v: h * A.dot.default(w, v), 8, weights=((5,), (5,))),
    "addmm.default": keeps(
        lambda h, w, b: A.addmm.default(b, h.flatten(0, 1), w), 8, weights=((8, 5), (5,))
    ),
    "delta_recurrence.default (keys)": keeps(
        lambda h: (h.unflatten(1, (2, 2)) @ delta_recurrence(*_delta(h))).flatten(1, 2), 8
    ),
    "baddbmm.default": keeps(lambda h: A.baddbmm.default(h, h @ h.mT, h), 8),
    "addbmm.default": keeps(lambda h: h + A.addbmm.default(h[0], h @ h.mT, h), 8),
    "einsum.default": keeps(
        lambda h, w: A.einsum.default("bsi,io->bso", [h, w]), 8, weights=((8, 5),)
    ),
    "einsum.default (dots)": keeps(
        lambda h, w: A.einsum.default("...i,io->...o", [h, w]), 8, weights=((8, 5),)
    ),
    "einsum.default (dots that broadcast)": keeps(
        lambda h, w: A.einsum.default("s...,...->s...", [h.transpose(0, 1), w]).transpose(0, 1),
        8,
        weights=((8,),),
    ),
    "einsum.default (no arrow)": keeps(
        lambda h, w: A.einsum.default("bsi,io", [h, w]), 8, weights=((8, 5),)
    ),
    "einsum.default (diagonal)": frozen(
        lambda h: A.einsum.default("bsii->bsi", [h[..., None] * h[..., None, :]]), "is not ruled"
    ),
    "lstm.input": keeps(
        lambda h, *w: A.lstm.input(h, _states(h, 2, 2), w, True, 1, 0.0, False, True, True)[0],
        8,
        weights=_gates(4, 8) * 2,
    ),
    "lstm.input (of hidden units)": keeps(
        lambda h, *w: A.lstm.input(
            h[..., :6], _states(h, 1, 2), w, True, 1, 0.0, False, False, True
        )[0],
        6,
        2,
        weights=_gates(4, 6),
    ),
    "lstm.input (projected)": keeps(
        lambda h, *w: A.lstm.input(
            h,
            [h.new_zeros(1, len(h), 3), h.new_zeros(1, len(h), 6)],
            w,
            False,
            1,
            0.0,
            False,
            False,
            True,
        )[0],
        8,
        weights=((24, 8), (24, 3), (3, 6)),
    ),
    "gru.input": keeps(
        lambda h, *w: A.gru.input(h, _states(h, 2, 1)[0], w, True, 2, 0.0, False, False, True)[0],
        8,
        weights=(*_gates(3, 8), *_gates(3, 6)),
    ),
    **{
        f"rnn_{n}.input": keeps(
            lambda h, *w, n=n: (
                getattr(A, f"rnn_{n}")
                .input(
                    h.transpose(0, 1), _states(h, 1, 1)[0], w, False, 1, 0.0, False, False, False
                )[0]
                .transpose(0, 1)
            ),
            8,
            weights=((6, 8), (6, 6)),
        )
        for n in ("tanh", "relu")
    },
    "scaled_dot_product_attention.default": keeps(_attended, 2, 4, weights=((8, 8), (8, 8))),
    "scaled_dot_product_attention.default (groups)": keeps(
        _attended_in_groups, 2, 2, 2, weights=((8, 4), (8, 4))
    ),
    "conv1d.default": keeps(
        lambda h, w: A.conv1d.default(h.mT, w, None, [1], [1]).mT, 8, weights=((5, 8, 3),)
    ),
    "conv1d.padding": keeps(
        lambda h, w: A.conv1d.padding(h.mT, w, None, [1], "same").mT, 8, weights=((5, 8, 3),)
    ),
    "conv1d.default (each channel)": keeps(
        lambda h, w: A.conv1d.default(h.mT, w, None, [1], [1], [1], 8).mT, 8, weights=((8, 1, 3),)
    ),
    "conv1d.default (groups)": keeps(
        lambda h, w: A.conv1d.default(h.mT, w, None, [1], [1], [1], 2).mT,
        2,
        4,
        weights=((6, 4, 3),),
    ),
    "conv2d.default": keeps(
        lambda h, w, b: _rows(A.conv2d.default(_image(h), w, b)), 8, weights=((5, 8, 2, 2), (5,))
    ),
    "conv2d.padding": keeps(
        lambda h, w: _rows(A.conv2d.padding(_image(h), w, None, [1, 1], "same")),
        8,
        weights=((5, 8, 3, 3),),
    ),
    "conv3d.default": keeps(
        lambda h, w: _rows(A.conv3d.default(_image(h)[..., None], w)), 8, weights=((5, 8, 1, 2, 1),)
    ),
    "conv_transpose1d.default": keeps(
        lambda h, w: A.conv_transpose1d.default(h.mT, w).mT, 8, weights=((8, 5, 3),)
    ),
    "conv_transpose2d.input": keeps(
        lambda h, w, b: _rows(A.conv_transpose2d.input(_image(h), w, b)),
        8,
        weights=((8, 5, 2, 2), (5,)),
    ),
    "conv_transpose2d.input (groups)": keeps(
        lambda h, w: _rows(A.conv_transpose2d.input(_image(h), w, None, [1, 1], [0, 0], [0, 0], 2)),
        2,
        4,
        weights=((8, 3, 2, 2),),
    ),
    "conv_transpose3d.input": keeps(
        lambda h, w: _rows(A.conv_transpose3d.input(_image(h)[..., None], w)),
        8,
        weights=((8, 5, 1, 2, 1),),
    ),
}

RECURRENT: dict[str, Case] = {
    "lstm_cell.default": keeps(
        lambda h, rows, back: A.lstm_cell.default(
            h.flatten(0, 1), [h.new_zeros(4 * len(h), 3)] * 2, rows, back
        )[0].unflatten(0, (-1, 4)),
        8,
        weights=((12, 8), (12, 3)),
    ),
    "gru_cell.default (of a state)": keeps(
        lambda h, rows, back, shift: A.gru_cell.default(
            torch.ones(len(h), 3), h[:, 0], rows, back, shift, shift
        ),
        8,
        weights=((24, 3), (24, 8), (24,)),
    ),
    "rnn_tanh_cell.default": keeps(
        lambda h, rows, back, shift: A.rnn_tanh_cell.default(
            h[:, 0], h.new_zeros(len(h), 3), rows, back, shift, shift
        ),
        8,
        weights=((3, 8), (3, 3), (3,)),
    ),
    "rnn_relu_cell.default": keeps(
        lambda h, rows, back: A.rnn_relu_cell.default(h[:, 0], h[:, 1], rows, back),
        8,
        weights=((8, 8), (8, 8)),
    ),
}

POOLING: dict[str, Case] = {
    "max_unpool2d.default": keeps(
        lambda h: _rows(
            A.max_unpool2d.default(*A.max_pool2d_with_indices.default(_image(h), [2, 1]), [2, 2])
        ),
        8,
    ),
    "max_unpool3d.default": keeps(
        lambda h: _rows(
            A.max_unpool3d.default(
                *A.max_pool3d_with_indices.default(_image(h)[..., None], [2, 1, 1]),
                [2, 2, 1],
                [2, 1, 1],
                [0, 0, 0],
            )
        ),
        8,
    ),
    "max_pool1d.default": keeps(lambda h: A.max_pool1d.default(h.mT, [2]).mT, 8),
    "avg_pool1d.default": keeps(lambda h: A.avg_pool1d.default(h.mT, [2]).mT, 8),
    "adaptive_avg_pool1d.default": keeps(lambda h: A.adaptive_avg_pool1d.default(h.mT, [2]).mT, 8),
    "upsample_nearest1d.vec": keeps(lambda h: A.upsample_nearest1d.vec(h.mT, [8], None).mT, 8),
    "upsample_linear1d.vec": keeps(lambda h: A.upsample_linear1d.vec(h.mT, [9], False, None).mT, 8),
    "max_pool2d.default": keeps(lambda h: _rows(A.max_pool2d.default(_image(h), [2, 1])), 8),
    "avg_pool2d.default": keeps(lambda h: _rows(A.avg_pool2d.default(_image(h), [2, 1])), 8),
    "avg_pool2d.default (over rows)": keeps(lambda h: A.avg_pool2d.default(h, [2, 1]), 8),
    "avg_pool2d.default (over it)": frozen(
        lambda h: A.avg_pool2d.default(h, [2, 1], [1, 2]), "positions of an image"
    ),
    "adaptive_avg_pool2d.default": keeps(
        lambda h: _rows(A.adaptive_avg_pool2d.default(_image(h), [1, 1])), 8
    ),
    "upsample_nearest2d.vec": keeps(
        lambda h: _rows(A.upsample_nearest2d.vec(_image(h), [3, 4], None)), 8
    ),
    "upsample_nearest2d.default": keeps(
        lambda h: _rows(A.upsample_nearest2d.default(_image(h), [3, 4])), 8
    ),
    "upsample_bilinear2d.vec": keeps(
        lambda h: _rows(A.upsample_bilinear2d.vec(_image(h), [3, 4], False, None)), 8
    ),
    "upsample_bicubic2d.vec": keeps(
        lambda h: _rows(A.upsample_bicubic2d.vec(_image(h), [3, 4], False, None)), 8
    ),
    "upsample_nearest3d.vec": keeps(
        lambda h: _rows(A.upsample_nearest3d.vec(_image(h)[..., None], [3, 4, 1], None)), 8
    ),
    "upsample_trilinear3d.vec": keeps(
        lambda h: _rows(A.upsample_trilinear3d.vec(_image(h)[..., None], [3, 4, 1], False, None)), 8
    ),
    "_upsample_nearest_exact2d.vec": keeps(
        lambda h: _rows(A._upsample_nearest_exact2d.vec(_image(h), [3, 4], None)), 8
    ),
    "_upsample_bilinear2d_aa.vec": keeps(
        lambda h: _rows(A._upsample_bilinear2d_aa.vec(_image(h), [3, 4], False, None)), 8
    ),
    "grid_sampler.default": keeps(
        lambda h, grid: _rows(
            A.grid_sampler.default(_image(h), grid.expand(len(h), -1, -1, -1), 0, 0, False)
        ),
        8,
        weights=((1, 3, 2, 2),),
    ),
    "adaptive_max_pool1d.default": keeps(
        lambda h: A.adaptive_max_pool1d.default(h.mT, [2])[0].mT, 8
    ),
    "adaptive_max_pool2d.default": keeps(
        lambda h: _rows(A.adaptive_max_pool2d.default(_image(h), [1, 2])[0]), 8
    ),
    "adaptive_max_pool3d.default": keeps(
        lambda h: _rows(A.adaptive_max_pool3d.default(_image(h)[..., None], [1, 2, 1])[0]), 8
    ),
    "max_pool1d_with_indices.default": keeps(
        lambda h: A.max_pool1d_with_indices.default(h.mT, [2])[0].mT, 8
    ),
    "max_pool2d_with_indices.default": keeps(
        lambda h: _rows(A.max_pool2d_with_indices.default(_image(h), [2, 1])[0]), 8
    ),
    "max_pool3d_with_indices.default": keeps(
        lambda h: _rows(A.max_pool3d_with_indices.default(_image(h)[..., None], [2, 1, 1])[0]), 8
    ),
    "max_pool3d.default": keeps(
        lambda h: _rows(A.max_pool3d.default(_image(h)[..., None], [2, 1, 1])), 8
    ),
    "avg_pool3d.default": keeps(
        lambda h: _rows(A.avg_pool3d.default(_image(h)[..., None], [2, 1, 1])), 8
    ),
    "adaptive_avg_pool3d.default": keeps(
        lambda h: _rows(A.adaptive_avg_pool3d.default(_image(h)[..., None], [1, 1, 1])), 8
    ),
}

FAMILIES: dict[str, dict[str, Case]] = {
    "vanishing": VANISHING,
    "shifted": SHIFTED,
    "layout": LAYOUT,
    "indexing": INDEXING,
    "counting": COUNTING,
    "reductions": REDUCTIONS,
    "contractions": CONTRACTIONS,
    "recurrent": RECURRENT,
    "pooling": POOLING,
}
