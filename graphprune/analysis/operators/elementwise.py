"""Element-wise operators: the axes of all operands are one."""

from __future__ import annotations

from torch import fx

from graphprune.analysis.axes import UNIT
from graphprune.analysis.operators.centering import is_centring
from graphprune.analysis.operators.rule import Op, Type, Zero, rule
from graphprune.ir.aten import rule_name

# fmt: off
_ZERO_AT_ZERO = [
    "abs", "asin", "asinh", "atan", "atanh", "ceil", "erf", "expm1", "floor", "gelu",
    "hardswish", "leaky_relu", "log1p", "mish", "neg", "relu", "relu6", "round", "sgn",
    "sign", "silu", "sin", "sinh", "sqrt", "square", "tan", "tanh", "trunc", "elu", "selu",
    "celu", "hardshrink", "softshrink", "positive", "frac", "nan_to_num",
    "deg2rad", "rad2deg",
]
_NOT_ZERO_AT_ZERO = [
    "acos", "acosh", "cosh", "digamma", "erfc", "exp", "exp2", "hardsigmoid", "isfinite",
    "isinf", "isnan", "lgamma", "log", "log10", "log2", "log_sigmoid", "logical_not", "logit",
    "reciprocal", "rsqrt", "sigmoid", "softplus", "bitwise_not", "threshold",
]
_SAME = [
    "alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh",
    "lift_fresh_copy", "alpha_dropout", "resolve_conj", "resolve_neg", "pin_memory", "real", "imag",
]
_COMPARISONS = [
    "eq", "ne", "lt", "le", "gt", "ge",
]
_LOGICAL = [
    "logical_or", "logical_xor",
]
_BITWISE = [
    "bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__",
]
# fmt: on


@rule(*(f"{name}.default" for name in (*_ZERO_AT_ZERO, *_SAME)), zero=Zero.KEEP)
@rule("to.dtype", "to.device", "to.dtype_layout", "to.other", zero=Zero.KEEP)
@rule("_to_copy.default", "type_as.default", "round.decimals", zero=Zero.KEEP)
def unary(op: Op) -> Type:
    """One operand, f(0) = 0: same axes."""
    return op.types[op.node.args[0]]  # type: ignore[index]


@rule(*(f"{name}.default" for name in _NOT_ZERO_AT_ZERO), zero=Zero.NEVER)
def unary_shifted(op: Op) -> Type:
    """One operand, f(0) is not 0: same axes."""
    return unary(op)


@rule("cos.default", zero=Zero.NEVER)
def cosine(op: Op) -> Type:
    """Same axes; with `sin`, the mark of a rotary embedding."""
    type_ = unary(op)
    for axis in type_:
        op.mark("rotary", axis)
    return type_


@rule("pow.Tensor_Scalar", zero=Zero.NEVER)
def power(op: Op) -> Type:
    """Same axes; zero stays zero for positive exponents."""
    exponent = op.arg("exponent")
    if isinstance(exponent, int | float) and exponent > 0:
        op.zero = Zero.KEEP
    return unary(op)


@rule("pow.Tensor_Tensor", "pow.Scalar", "atan2.default", "floor_divide.default", zero=Zero.NEVER)
@rule("fmod.Tensor", "fmod.Scalar", "remainder.Tensor", "remainder.Scalar", zero=Zero.NEVER)
@rule("hypot.default", "logaddexp.default", "heaviside.default", "xlogy.Tensor", zero=Zero.NEVER)
@rule("bitwise_left_shift.Tensor_Scalar", "floor_divide.Scalar", zero=Zero.NEVER)
def binary(op: Op) -> Type:
    """Operands of one shape after broadcasting; nothing is known of zeros."""
    return op.broadcast(*(op.types[node] for node in op.operands()))


@rule(*(f"{n}.Tensor" for n in _COMPARISONS), zero=Zero.NEVER)
@rule(*(f"{n}.Scalar" for n in _COMPARISONS if n != "eq"), zero=Zero.NEVER)
@rule(*(f"{n}.Tensor" for n in _BITWISE if "and" not in n), zero=Zero.NEVER)
@rule(*(f"{n}.Scalar" for n in _BITWISE), zero=Zero.NEVER)
@rule(*(f"{name}.default" for name in _LOGICAL), zero=Zero.NEVER)
def compare(op: Op) -> Type:
    """Comparisons and logic: operands of one shape after broadcasting."""
    name, other = rule_name(op.node.target), op.arg("other")
    if name in ("gt.Scalar", "lt.Scalar", "ne.Scalar") and other == 0:
        op.zero = Zero.KEEP
    return binary(op)


@rule("eq.Scalar", zero=Zero.NEVER)
def equal(op: Op) -> Type:
    """Same axes; a number that places of an axis are compared with reads one of them."""
    places, index = op.arg("self"), op.arg("other")
    axis = op.contents.get((places, 0))
    if axis is not None and type(index) is int and 0 <= index < axis.size:
        op.picked.add(places)
        op.read(axis, index, ("other", 0))
    return unary(op)


@rule("bitwise_and.Tensor", "__and__.Tensor", "logical_and.default", zero=Zero.ANY)
def conjunction(op: Op) -> Type:
    """Both of two: nothing where one is nothing; operands of one shape after broadcasting."""
    return binary(op)


@rule("mul.Tensor", "mul.Scalar", zero=Zero.ANY)
def multiply(op: Op) -> Type:
    """Product: zero where any factor is."""
    return binary(op)


@rule("div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode", zero=Zero.KEEP)
def divide(op: Op) -> Type:
    """Quotient: zero where the numerator is."""
    return binary(op)


@rule("add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar", "rsub.Scalar", zero=Zero.ALL)
@rule("rsub.Tensor", "maximum.default", "minimum.default", "min.other", "max.other", zero=Zero.ALL)
@rule("lerp.Tensor", "lerp.Scalar", zero=Zero.ALL)
def add(op: Op) -> Type:
    """Sum, difference, larger or smaller: zero where all operands are."""
    if is_centring(op.node):
        for dim, (axis, mean) in enumerate(zip(op.type("self"), op.type("other"), strict=True)):
            if mean is UNIT:
                op.statistic(axis, dim, clears=True)
    other = op.node.args[1] if len(op.node.args) > 1 else None
    number = not isinstance(other, fx.Node) or op.types.get(other) is None  # a size may be one
    if number and (isinstance(other, fx.Node) or other != 0):
        op.zero = Zero.NEVER
    return binary(op)


@rule("isin.Tensor_Tensor", zero=Zero.NEVER)
def isin(op: Op) -> Type:
    """Same axes; those of the set that is looked through are frozen."""
    for axis in op.type("test_elements"):
        op.freeze(axis, "it is looked through for equal values")
    return op.type("elements")


@rule("addcmul.default", "addcdiv.default", zero=Zero.NEVER)
def add_product(op: Op) -> Type:
    """A sum with a product of one shape after broadcasting."""
    return binary(op)


@rule("clamp.default", "clamp_min.default", "clamp_max.default", zero=Zero.NEVER)
@rule("hardtanh.default", zero=Zero.NEVER)
def clamp(op: Op) -> Type:
    """Same axes; zero stays zero when the bounds enclose it."""
    names = ("min_val", "max_val") if op.arg("min_val") is not None else ("min", "max")
    low, high = map(op.arg, names)
    inside = all(isinstance(bound, int | float | None) for bound in (low, high))
    if inside and (low is None or low <= 0) and (high is None or high >= 0):
        op.zero = Zero.KEEP
    return unary(op)


@rule("clamp.Tensor", zero=Zero.NEVER)
def clamp_by_tensor(op: Op) -> Type:
    """Bounds that are tensors: one shape after broadcasting."""
    return binary(op)


@rule("where.self", zero=Zero.ALL)
@rule("where.ScalarOther", "where.ScalarSelf", "where.Scalar", zero=Zero.NEVER)
def where(op: Op) -> Type:
    """Choice by a mask: condition and branches of one shape after broadcasting."""
    return binary(op)


@rule("masked_fill.Scalar", "masked_fill.Tensor", zero=Zero.NEVER)
def masked_fill(op: Op) -> Type:
    """Same axes; the mask broadcasts; zero stays zero when zeros are filled in."""
    if op.arg("value") == 0:
        op.zero = Zero.KEEP
    return op.broadcast(op.type("self"), op.type("mask"))


@rule("prelu.default", zero=Zero.KEEP)
def prelu(op: Op) -> Type:
    """Same axes; a slope for each channel (dimension 1), or one for all."""
    type_, slopes = op.type("self"), op.type("weight")
    if slopes[0].size > 1:
        op.unify(type_[1], slopes[0])
    return type_


@rule("copy.default", zero=Zero.NEVER)
def copy(op: Op) -> Type:
    """The values of another tensor after broadcasting."""
    op.vanishes_as((op.arg("src"),))
    return op.broadcast(op.type("self"), op.type("src"))


@rule("zeros_like.default", zero=Zero.ALWAYS)
def zeros_like(op: Op) -> Type:
    """Zeros: same axes."""
    return unary(op)


@rule("ones_like.default", "full_like.default", "rand_like.default", zero=Zero.NEVER)
@rule("randn_like.default", "empty_like.default", "fill.Scalar", "fill.Tensor", zero=Zero.NEVER)
@rule("bernoulli.default", zero=Zero.NEVER)
def filled_like(op: Op) -> Type:
    """One value everywhere: same axes."""
    return unary(op)
