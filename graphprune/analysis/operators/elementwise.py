"""Element-wise operators: the axes of all operands are one."""

from __future__ import annotations

from torch import fx

from graphprune.analysis.axes import UNIT
from graphprune.analysis.operators.centering import is_centering
from graphprune.analysis.operators.facts import Type, ZeroRule
from graphprune.analysis.operators.rule import RuleContext, rule
from graphprune.ir.aten import is_idle_dropout, rule_name

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
    "lift_fresh_copy", "resolve_conj", "resolve_neg", "pin_memory", "real", "imag",
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


@rule(*(f"{name}.default" for name in (*_ZERO_AT_ZERO, *_SAME)), zero=ZeroRule.AS_FIRST)
@rule("to.dtype", "to.device", "to.dtype_layout", "to.other", zero=ZeroRule.AS_FIRST)
@rule("_to_copy.default", "type_as.default", "round.decimals", zero=ZeroRule.AS_FIRST)
def unary(ctx: RuleContext) -> Type:
    """One operand, f(0) = 0: same axes."""
    return ctx.types[ctx.node.args[0]]  # type: ignore[index]


@rule(*(f"{name}.default" for name in _NOT_ZERO_AT_ZERO), zero=ZeroRule.NEVER)
def unary_shifted(ctx: RuleContext) -> Type:
    """One operand, f(0) is not 0: same axes."""
    return unary(ctx)


@rule("alpha_dropout.default", "feature_alpha_dropout.default", zero=ZeroRule.NEVER)
def shifting_dropout(ctx: RuleContext) -> Type:
    """Same axes; a dropout that is at work shifts what stays, zeros too."""
    if is_idle_dropout(ctx.node):
        ctx.zero = ZeroRule.AS_FIRST
    return unary(ctx)


@rule("cos.default", zero=ZeroRule.NEVER)
def cosine(ctx: RuleContext) -> Type:
    """Same axes; with `sin`, the mark of a rotary embedding."""
    type_ = unary(ctx)
    for axis in type_:
        ctx.use("rotary", axis)
    return type_


@rule("pow.Tensor_Scalar", zero=ZeroRule.NEVER)
def power(ctx: RuleContext) -> Type:
    """Same axes; zero stays zero for positive exponents."""
    exponent = ctx.arg("exponent")
    if isinstance(exponent, int | float) and exponent > 0:
        ctx.zero = ZeroRule.AS_FIRST
    return unary(ctx)


@rule(
    "pow.Tensor_Tensor", "pow.Scalar", "atan2.default", "floor_divide.default", zero=ZeroRule.NEVER
)
@rule("fmod.Tensor", "fmod.Scalar", "remainder.Tensor", "remainder.Scalar", zero=ZeroRule.NEVER)
@rule(
    "hypot.default", "logaddexp.default", "heaviside.default", "xlogy.Tensor", zero=ZeroRule.NEVER
)
@rule("bitwise_left_shift.Tensor_Scalar", "floor_divide.Scalar", zero=ZeroRule.NEVER)
def binary(ctx: RuleContext) -> Type:
    """Operands of one shape after broadcasting; nothing is known of zeros."""
    return ctx.broadcast(*(ctx.types[node] for node in ctx.operands()))


@rule(*(f"{n}.Tensor" for n in _COMPARISONS), zero=ZeroRule.NEVER)
@rule(*(f"{n}.Scalar" for n in _COMPARISONS if n != "eq"), zero=ZeroRule.NEVER)
@rule(*(f"{n}.Tensor" for n in _BITWISE if "and" not in n), zero=ZeroRule.NEVER)
@rule(*(f"{n}.Scalar" for n in _BITWISE), zero=ZeroRule.NEVER)
@rule(*(f"{name}.default" for name in _LOGICAL), zero=ZeroRule.NEVER)
def compare(ctx: RuleContext) -> Type:
    """Comparisons and logic: operands of one shape after broadcasting."""
    name, other = rule_name(ctx.node.target), ctx.arg("other")
    if name in ("gt.Scalar", "lt.Scalar", "ne.Scalar") and other == 0:
        ctx.zero = ZeroRule.AS_FIRST
    return binary(ctx)


@rule("eq.Scalar", zero=ZeroRule.NEVER)
def equal(ctx: RuleContext) -> Type:
    """Same axes; a number that indices of an axis are compared with selects one of them."""
    numbers, index = ctx.arg("self"), ctx.arg("other")
    axis = ctx.unit_numbers.get((numbers, 0))
    if axis is not None and type(index) is int and 0 <= index < axis.size:
        ctx.picked.add(numbers)
        ctx.select_unit(axis, index, ("other", 0))
    return unary(ctx)


@rule("bitwise_and.Tensor", "__and__.Tensor", "logical_and.default", zero=ZeroRule.ANY_OPERAND)
def conjunction(ctx: RuleContext) -> Type:
    """Both of two: nothing where one is nothing; operands of one shape after broadcasting."""
    return binary(ctx)


@rule("mul.Tensor", "mul.Scalar", zero=ZeroRule.ANY_OPERAND)
def multiply(ctx: RuleContext) -> Type:
    """Product: zero where any factor is."""
    return binary(ctx)


@rule("div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode", zero=ZeroRule.AS_FIRST)
def divide(ctx: RuleContext) -> Type:
    """Quotient: zero where the numerator is."""
    return binary(ctx)


@rule(
    "add.Tensor",
    "sub.Tensor",
    "add.Scalar",
    "sub.Scalar",
    "rsub.Scalar",
    zero=ZeroRule.ALL_OPERANDS,
)
@rule(
    "rsub.Tensor",
    "maximum.default",
    "minimum.default",
    "min.other",
    "max.other",
    zero=ZeroRule.ALL_OPERANDS,
)
@rule("lerp.Tensor", "lerp.Scalar", zero=ZeroRule.ALL_OPERANDS)
def add(ctx: RuleContext) -> Type:
    """Sum, difference, larger or smaller: zero where all operands are."""
    if is_centering(ctx.node):
        for dim, (axis, mean) in enumerate(zip(ctx.type("self"), ctx.type("other"), strict=True)):
            if mean is UNIT:
                ctx.statistic(axis, dim, clears=True)
    other = ctx.node.args[1] if len(ctx.node.args) > 1 else None
    number = not isinstance(other, fx.Node) or ctx.types.get(other) is None  # a size may be one
    if number and (isinstance(other, fx.Node) or other != 0):
        ctx.zero = ZeroRule.NEVER
    return binary(ctx)


@rule("isin.Tensor_Tensor", zero=ZeroRule.NEVER)
def isin(ctx: RuleContext) -> Type:
    """Same axes; those of the set that is looked through are frozen."""
    for axis in ctx.type("test_elements"):
        ctx.freeze(axis, "it is looked through for equal values")
    return ctx.type("elements")


@rule("addcmul.default", "addcdiv.default", zero=ZeroRule.NEVER)
def add_product(ctx: RuleContext) -> Type:
    """A sum with a product of one shape after broadcasting."""
    return binary(ctx)


@rule("clamp.default", "clamp_min.default", "clamp_max.default", zero=ZeroRule.NEVER)
@rule("hardtanh.default", zero=ZeroRule.NEVER)
def clamp(ctx: RuleContext) -> Type:
    """Same axes; zero stays zero when the bounds enclose it."""
    names = ("min_val", "max_val") if ctx.arg("min_val") is not None else ("min", "max")
    low, high = map(ctx.arg, names)
    inside = all(isinstance(bound, int | float | None) for bound in (low, high))
    if inside and (low is None or low <= 0) and (high is None or high >= 0):
        ctx.zero = ZeroRule.AS_FIRST
    return unary(ctx)


@rule("clamp.Tensor", zero=ZeroRule.NEVER)
def clamp_by_tensor(ctx: RuleContext) -> Type:
    """Bounds that are tensors: one shape after broadcasting."""
    return binary(ctx)


@rule("where.self", zero=ZeroRule.ALL_OPERANDS)
@rule("where.ScalarOther", "where.ScalarSelf", "where.Scalar", zero=ZeroRule.NEVER)
def where(ctx: RuleContext) -> Type:
    """Choice by a mask: condition and branches of one shape after broadcasting."""
    return binary(ctx)


@rule("masked_fill.Scalar", "masked_fill.Tensor", zero=ZeroRule.NEVER)
def masked_fill(ctx: RuleContext) -> Type:
    """Same axes; the mask broadcasts; zero stays zero when zeros are filled in."""
    if ctx.arg("value") == 0:
        ctx.zero = ZeroRule.AS_FIRST
    return ctx.broadcast(ctx.type("self"), ctx.type("mask"))


@rule("prelu.default", zero=ZeroRule.AS_FIRST)
def prelu(ctx: RuleContext) -> Type:
    """Same axes; a slope for each channel (dimension 1), or one for all."""
    type_, slopes = ctx.type("self"), ctx.type("weight")
    if slopes[0].size > 1:
        ctx.unify(type_[1], slopes[0])
    return type_


@rule("copy.default", zero=ZeroRule.NEVER)
def copy(ctx: RuleContext) -> Type:
    """The values of another tensor after broadcasting."""
    ctx.zero_where((ctx.arg("src"),))
    return ctx.broadcast(ctx.type("self"), ctx.type("src"))


@rule("zeros_like.default", zero=ZeroRule.ALWAYS)
def zeros_like(ctx: RuleContext) -> Type:
    """Zeros: same axes."""
    return unary(ctx)


@rule("ones_like.default", "full_like.default", "rand_like.default", zero=ZeroRule.NEVER)
@rule("randn_like.default", "empty_like.default", "fill.Scalar", "fill.Tensor", zero=ZeroRule.NEVER)
@rule("bernoulli.default", zero=ZeroRule.NEVER)
def filled_like(ctx: RuleContext) -> Type:
    """One value everywhere: same axes."""
    return unary(ctx)
