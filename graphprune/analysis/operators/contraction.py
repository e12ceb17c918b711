"""Operators that multiply and sum: linear, matrix products, einsum, attention, convolutions."""

from __future__ import annotations

from torch import fx

from graphprune.analysis.axes import UNIT, Axis
from graphprune.analysis.operators.facts import Type, ZeroRule
from graphprune.analysis.operators.rule import RuleContext, rule


@rule("linear.default", zero=ZeroRule.ANY_OPERAND)
def linear(ctx: RuleContext) -> Type:
    """The input's last axis is the weight's second; the weight's first comes out."""
    type_, weight = ctx.type("input"), ctx.type("weight")
    bias = ctx.arg("bias")
    ctx.unify(type_[-1], weight[-1])
    ctx.contract(type_[-1], ctx.arg("input"), ctx.arg("weight"))
    ctx.use("linear", type_[-1])
    if len(weight) == 1:
        return type_[:-1]
    if bias is not None:
        ctx.unify(weight[0], ctx.types[bias][0])
    ctx.zero_where((ctx.arg("input"), ctx.arg("weight")), (bias,))
    return (*type_[:-1], weight[0])


@rule(
    "matmul.default",
    "bmm.default",
    "mm.default",
    "mv.default",
    "dot.default",
    zero=ZeroRule.ANY_OPERAND,
)
def matmul(ctx: RuleContext) -> Type:
    """The left's last axis is the right's last but one; batch axes are one after broadcasting."""
    first, second = ctx.operands() if len(ctx.operands()) == 2 else ctx.operands() * 2
    return _product(ctx, ctx.types[first], ctx.types[second], (first, second))


def _product(ctx: RuleContext, left: Type, right: Type, nodes: tuple[fx.Node, ...]) -> Type:
    contracted = right[-2] if len(right) > 1 else right[0]
    ctx.unify(left[-1], contracted)
    ctx.contract(left[-1], *nodes)
    ctx.use("linear", left[-1])
    rows = left[-2:-1] if len(left) > 1 else ()
    columns = right[-1:] if len(right) > 1 else ()
    shape = ctx.shape()
    batch_rank = len(shape) - len(rows) - len(columns)
    sides = (left[:-2],) if ctx.untied else (left[:-2], right[:-2])
    batch = ctx.broadcast(*sides, shape=shape[:batch_rank])
    return (*batch, *rows, *columns)


@rule("addmm.default", "baddbmm.default", "addbmm.default", zero=ZeroRule.ANY_OPERAND)
def add_matmul(ctx: RuleContext) -> Type:
    """A matrix product plus a tensor that broadcasts."""
    names = ("mat1", "mat2") if ctx.arg("mat1") is not None else ("batch1", "batch2")
    left, right = (ctx.arg(name) for name in names)
    type_ = _product(ctx, ctx.types[left], ctx.types[right], (left, right))
    ctx.zero_where((left, right), (ctx.arg("self"),))
    return ctx.broadcast(type_, ctx.type("self"))


@rule("delta_recurrence.default", zero=ZeroRule.NEVER)
def delta_recurrence(ctx: RuleContext) -> Type:
    """States before chunks, each of which writes the values that it does not read already."""
    written, values, reads = (ctx.arg(name) for name in ("written", "values", "reads"))
    (*_, keys, tokens), (*_, width) = ctx.type("written"), ctx.type("values")
    for left, right in ((ctx.type("values")[-2], tokens), (ctx.type("reads")[-2], tokens)):
        ctx.unify(left, right)
    ctx.unify(ctx.type("reads")[-1], keys)
    ctx.contract(tokens, written, values)
    ctx.contract(keys, reads, written)  # the state is zero where nothing is written
    lead = [ctx.type(name)[:-2] for name in ("decay", "written", "values", "reads")]
    *batch, chunks = ctx.broadcast(*lead, shape=ctx.shape()[:-2])
    ctx.freeze(chunks, "a recurrence runs over it")
    ctx.zero_where((written, values))
    return ctx.broadcast((*batch, chunks, keys, width), ctx.type("decay"))


@rule("einsum.default", zero=ZeroRule.ANY_OPERAND)
def einsum(ctx: RuleContext) -> Type:
    """One axis for each letter; letters that do not come out are summed over."""
    nodes = ctx.arg("tensors")
    terms, output = letters_of(ctx.arg("equation"), [len(ctx.types[node]) for node in nodes])
    if any(len(set(term)) < len(term) for term in terms):
        return _all_frozen(ctx, f"einsum equation {ctx.arg('equation')!r} is not ruled")
    letters: dict[str, Axis] = {}
    holders: dict[str, list[fx.Node]] = {}
    for term, node in zip(terms, nodes, strict=True):
        for letter, axis in zip(term, ctx.types[node], strict=True):
            if axis is UNIT and letter in letters:
                continue
            if letters.get(letter, UNIT) is UNIT:
                letters[letter] = axis
            ctx.unify(letters[letter], axis)
            holders.setdefault(letter, []).append(node)
    for letter, axis in letters.items():
        if letter not in output:
            ctx.contract(axis, *holders.get(letter, []))
            ctx.use("linear", axis)
    return tuple(letters[letter] for letter in output)


def letters_of(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the letters of every operand and of the result; dots are numbers from the last."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:  # what occurs once comes out, in alphabetical order
        once = sorted(c for c in set(inputs) - {".", ","} if inputs.count(c) == 1)
        output = "..." * ("..." in inputs) + "".join(once)
    hidden = [
        rank - len(term) + 3 if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    dots = "".join(map(str, reversed(range(max(hidden)))))
    spelled = [
        term.replace("...", dots[len(dots) - count :])
        for term, count in zip(terms, hidden, strict=True)
    ]
    return spelled, output.replace("...", dots)


def _all_frozen(ctx: RuleContext, why: str) -> Type:
    for node in ctx.operands():
        for axis in ctx.types[node]:
            ctx.freeze(axis, why)
    ctx.zero = ZeroRule.NEVER
    return tuple(ctx.fixed(size, why) for size in ctx.shape())


@rule("scaled_dot_product_attention.default", zero=ZeroRule.ANY_OPERAND)
def attention(ctx: RuleContext) -> Type:
    """softmax(q k^T) v: batch axes are heads; query and key share their last axis."""
    query, key, value = (ctx.arg(name) for name in ("query", "key", "value"))
    q, k, v = (ctx.types[node] for node in (query, key, value))
    ctx.unify(q[-1], k[-1])
    ctx.unify(k[-2], v[-2])
    ctx.contract(q[-1], query, key)
    ctx.freeze(k[-2], "softmax runs over it")
    for key_axis, value_axis in zip(k[:-2], v[:-2], strict=True):
        ctx.unify(key_axis, value_axis)
    sides = (q[:-2],) if ctx.untied else (q[:-2], v[:-2])
    heads = ctx.broadcast(*sides, shape=[axis.size for axis in q[:-2]])
    if ctx.arg("enable_gqa") and not ctx.untied and q[-3].size != k[-3].size:
        slots = ctx.fresh(q[-3].size // k[-3].size)
        ctx.use("spread", slots)
        ctx.unify(q[-3], ctx.axes.product(k[-3], slots))
    if ctx.arg("attn_mask") is not None:
        scores = (*heads, q[-2], k[-2])
        ctx.broadcast(scores, ctx.type("attn_mask"), shape=[axis.size for axis in scores])
    # The weights of a head sum to one, so the result is zero where its values are.
    ctx.zero_where((value,))
    return (*heads, q[-2], v[-1])


@rule("conv1d.default", "conv2d.default", "conv3d.default", zero=ZeroRule.ANY_OPERAND)
@rule("conv2d.padding", "conv1d.padding", zero=ZeroRule.ANY_OPERAND)
def convolution(ctx: RuleContext) -> Type:
    """Channels are contracted, in groups where there are some; positions are fixed."""
    type_, weight, shape = ctx.type("input"), ctx.type("weight"), ctx.shape()
    spatial = len(weight) - 2
    at = len(type_) - spatial - 1
    groups = ctx.arg("groups") or 1
    if isinstance(groups, fx.Node):
        return _all_frozen(ctx, "it is convolved in a dynamic number of groups")
    kernel = weight[2:]
    for axis in kernel:
        ctx.freeze(axis, "positions of a kernel")
    for axis in type_[at + 1 :]:
        ctx.freeze(axis, "positions of an image")
    out = weight[0]
    if groups == 1:
        ctx.unify(type_[at], weight[1])
        ctx.contract(type_[at], ctx.arg("input"), ctx.arg("weight"))
        ctx.use("convolved", type_[at])
    else:
        group = ctx.fresh(groups)
        ctx.unify(type_[at], ctx.axes.product(group, weight[1]))
        ctx.unify(out, ctx.axes.product(group, ctx.fresh(out.size // groups)))
        ctx.contract(weight[1], ctx.arg("input"), ctx.arg("weight"))
        ctx.use("convolved", weight[1])
        ctx.use("convolved", group)
        ctx.size_literal("groups", None, group)
    if ctx.arg("bias") is not None:
        ctx.unify(out, ctx.type("bias")[0])
    ctx.zero_where((ctx.arg("input"), ctx.arg("weight")), (ctx.arg("bias"),))
    positions = [ctx.fixed(size, "positions of an image") for size in shape[at + 1 :]]
    return (*type_[:at], out, *positions)


@rule("conv_transpose1d.default", "conv_transpose2d.input", zero=ZeroRule.ANY_OPERAND)
@rule("conv_transpose3d.input", zero=ZeroRule.ANY_OPERAND)
def transposed_convolution(ctx: RuleContext) -> Type:
    """As a convolution, with the weight's first two axes exchanged."""
    type_, weight, shape = ctx.type("input"), ctx.type("weight"), ctx.shape()
    at = len(type_) - (len(weight) - 2) - 1
    groups = ctx.arg("groups") or 1
    if isinstance(groups, fx.Node):
        return _all_frozen(ctx, "it is convolved in a dynamic number of groups")
    for axis in (*weight[2:], *type_[at + 1 :]):
        ctx.freeze(axis, "positions of a kernel or an image")
    ctx.unify(type_[at], weight[0])
    if groups == 1:
        out = weight[1]
    else:
        (group, _) = ctx.factor(weight[0], (groups, weight[0].size // groups))
        out = ctx.axes.product(group, weight[1])
        ctx.size_literal("groups", None, group)
    ctx.contract(type_[at], ctx.arg("input"), ctx.arg("weight"))
    ctx.use("convolved", type_[at])
    if ctx.arg("bias") is not None:
        ctx.unify(out, ctx.type("bias")[0])
    ctx.zero_where((ctx.arg("input"), ctx.arg("weight")), (ctx.arg("bias"),))
    positions = [ctx.fixed(size, "positions of an image") for size in shape[at + 1 :]]
    return (*type_[:at], out, *positions)


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input", zero=ZeroRule.NEVER)
def recurrent(ctx: RuleContext) -> list[Type | None]:
    """Gates of (gate cell) from input and state, which a projection may make smaller."""
    type_, result = ctx.type("input"), ctx.shapes(ctx.node)
    states, weights = ctx.arg("hx"), ctx.arg("params")
    states = states if isinstance(states, list | tuple) else [states]
    sides = 2 if ctx.arg("bidirectional") else 1
    each = len(weights) // (sides * ctx.arg("num_layers"))
    biases = 2 if ctx.arg("has_biases") else 0
    time, batch = (1, 0) if ctx.arg("batch_first") else (0, 1)
    ctx.freeze(type_[time], "it is run over in time")
    hidden, cell = ctx.types[states[0]][2], ctx.types[states[-1]][2]
    layers = ctx.fixed(result[1][0], "layers of a recurrent network")
    held = [(layers, type_[batch], width) for width in (hidden, cell)[: len(states)]]
    for state, own in zip(states, held, strict=True):
        for axis, other in zip(ctx.types[state], own, strict=True):
            ctx.unify(axis, other)
    if each == 2 + biases:
        ctx.unify(hidden, cell)
    projections: list[fx.Node] = []
    out = ctx.axes.sum(*[hidden] * sides)

    def multiply(matrix: fx.Node, rows: Axis, columns: Axis, *source: fx.Node) -> None:
        ctx.unify(ctx.types[matrix][0], rows)
        ctx.unify(ctx.types[matrix][1], columns)
        ctx.contract(columns, *source, matrix)
        ctx.use("linear", columns)

    for at in range(0, len(weights), each):
        first, second, *others = weights[at : at + each]
        gates = ctx.fixed(ctx.types[first][0].size // cell.size, "gates")
        rows = ctx.axes.product(gates, cell)
        if at < each * sides:
            multiply(first, rows, type_[2], ctx.arg("input"))
        else:
            multiply(first, rows, out)
        multiply(second, rows, hidden)
        for bias in others[:biases]:
            ctx.unify(ctx.types[bias][0], rows)
        for projection in others[biases:]:
            multiply(projection, hidden, cell)
            projections.append(projection)
    # A unit whose weights are zero stays at what a part of its state is: zero, where it starts so.
    # What projects it is zero wherever a row of the projection is.
    if projections:
        ctx.zero_where(*((projection, states[-1]) for projection in projections))
    else:
        ctx.zero_where(*((node,) for node in (*states, *weights)))
    return [(*type_[:2], out), *held]


@rule("lstm_cell.default", "gru_cell.default", zero=ZeroRule.NEVER)
@rule("rnn_tanh_cell.default", "rnn_relu_cell.default", zero=ZeroRule.NEVER)
def recurrent_cell(ctx: RuleContext) -> Type | list[Type | None]:
    """One step of a recurrent layer: gates of (gate hidden) from the input and the state."""
    type_, states = ctx.type("input"), ctx.arg("hx")
    several = isinstance(states, list | tuple)
    states = list(states) if several else [states]
    hidden = ctx.types[states[0]][-1]
    for state in states:
        ctx.broadcast((*type_[:-1], hidden), ctx.types[state], shape=ctx.shape(state))
    weights = [ctx.arg(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    weights = [weight for weight in weights if weight is not None]
    rows = ctx.types[weights[0]][0]
    gates = ctx.fixed(rows.size // hidden.size, "gates")
    for weight in weights:
        ctx.unify(ctx.types[weight][0], ctx.axes.product(gates, hidden))
    for weight, source, node in zip(
        weights, (type_[-1], hidden), (ctx.arg("input"), states[0]), strict=False
    ):
        ctx.unify(ctx.types[weight][1], source)
        ctx.contract(ctx.types[weight][1], node, weight)
        ctx.use("linear", ctx.types[weight][1])
    ctx.zero_where(*((node,) for node in (*states, *weights)))
    out = (*type_[:-1], hidden)
    return [out, out] if several else out
