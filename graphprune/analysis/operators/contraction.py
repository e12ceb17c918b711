"""Operators that multiply and sum: linear, matrix products, einsum, attention, convolutions."""

from __future__ import annotations

from torch import fx

from graphprune.analysis.axes import UNIT, Axis
from graphprune.analysis.operators.rule import Attention, Op, Type, Zero, rule


@rule("linear.default", zero=Zero.ANY)
def linear(op: Op) -> Type:
    """The input's last axis is the weight's second; the weight's first comes out."""
    type_, weight = op.type("input"), op.type("weight")
    bias = op.arg("bias")
    op.unify(type_[-1], weight[-1])
    op.contract(type_[-1], op.arg("input"), op.arg("weight"))
    op.mark("linear", type_[-1])
    if len(weight) == 1:
        return type_[:-1]
    if bias is not None:
        op.unify(weight[0], op.types[bias][0])
    op.vanishes_as((op.arg("input"), op.arg("weight")), (bias,))
    return (*type_[:-1], weight[0])


@rule("matmul.default", "bmm.default", "mm.default", "mv.default", "dot.default", zero=Zero.ANY)
def matmul(op: Op) -> Type:
    """The left's last axis is the right's last but one; batch axes are one after broadcasting."""
    first, second = op.operands() if len(op.operands()) == 2 else op.operands() * 2
    return _product(op, op.types[first], op.types[second], (first, second))


def _product(op: Op, left: Type, right: Type, nodes: tuple[fx.Node, ...]) -> Type:
    contracted = right[-2] if len(right) > 1 else right[0]
    op.unify(left[-1], contracted)
    op.contract(left[-1], *nodes)
    op.mark("linear", left[-1])
    rows = left[-2:-1] if len(left) > 1 else ()
    columns = right[-1:] if len(right) > 1 else ()
    shape = op.shape()
    batch_rank = len(shape) - len(rows) - len(columns)
    sides = (left[:-2],) if op.apart else (left[:-2], right[:-2])
    batch = op.broadcast(*sides, shape=shape[:batch_rank])
    return (*batch, *rows, *columns)


@rule("addmm.default", "baddbmm.default", "addbmm.default", zero=Zero.ANY)
def add_matmul(op: Op) -> Type:
    """A matrix product plus a tensor that broadcasts."""
    names = ("mat1", "mat2") if op.arg("mat1") is not None else ("batch1", "batch2")
    left, right = (op.arg(name) for name in names)
    type_ = _product(op, op.types[left], op.types[right], (left, right))
    op.vanishes_as((left, right), (op.arg("self"),))
    return op.broadcast(type_, op.type("self"))


@rule("einsum.default", zero=Zero.ANY)
def einsum(op: Op) -> Type:
    """One axis for each letter; letters that do not come out are summed over."""
    nodes = op.arg("tensors")
    terms, output = letters_of(op.arg("equation"), [len(op.types[node]) for node in nodes])
    if any(len(set(term)) < len(term) for term in terms):
        return _all_frozen(op, f"einsum equation {op.arg('equation')!r} is not ruled")
    letters: dict[str, Axis] = {}
    holders: dict[str, list[fx.Node]] = {}
    for term, node in zip(terms, nodes, strict=True):
        for letter, axis in zip(term, op.types[node], strict=True):
            if axis is UNIT and letter in letters:
                continue
            if letters.get(letter, UNIT) is UNIT:
                letters[letter] = axis
            op.unify(letters[letter], axis)
            holders.setdefault(letter, []).append(node)
    for letter, axis in letters.items():
        if letter not in output:
            op.contract(axis, *holders.get(letter, []))
            op.mark("linear", axis)
    return tuple(letters[letter] for letter in output)


def letters_of(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of every operand and of the result; dots are numbers, counted from the last."""
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


def _all_frozen(op: Op, why: str) -> Type:
    for node in op.operands():
        for axis in op.types[node]:
            op.freeze(axis, why)
    op.zero = Zero.NEVER
    return tuple(op.fixed(size, why) for size in op.shape())


@rule("scaled_dot_product_attention.default", zero=Zero.ANY)
def attention(op: Op) -> Type:
    """softmax(q k^T) v: batch axes are heads; query and key share their last axis."""
    query, key, value = (op.arg(name) for name in ("query", "key", "value"))
    q, k, v = (op.types[node] for node in (query, key, value))
    op.unify(q[-1], k[-1])
    op.unify(k[-2], v[-2])
    op.contract(q[-1], query, key)
    op.freeze(k[-2], "softmax runs over it")
    for key_axis, value_axis in zip(k[:-2], v[:-2], strict=True):
        op.unify(key_axis, value_axis)
    sides = (q[:-2],) if op.apart else (q[:-2], v[:-2])
    heads = op.broadcast(*sides, shape=[axis.size for axis in q[:-2]])
    if op.arg("enable_gqa") and not op.apart and q[-3].size != k[-3].size:
        slots = op.fresh(q[-3].size // k[-3].size)
        op.mark("spread", slots)
        op.unify(q[-3], op.axes.product(k[-3], slots))
    if op.arg("attn_mask") is not None:
        scores = (*heads, q[-2], k[-2])
        op.broadcast(scores, op.type("attn_mask"), shape=[axis.size for axis in scores])
    products = (op.node, op.node)
    op.facts.attentions.append(Attention(products, heads, q[-1], v[-1], (query, key, value)))
    # The weights of a head sum to one, so the result vanishes where its values do.
    op.vanishes_as((value,))
    return (*heads, q[-2], v[-1])


@rule("conv1d.default", "conv2d.default", "conv3d.default", zero=Zero.ANY)
@rule("conv2d.padding", "conv1d.padding", zero=Zero.ANY)
def convolution(op: Op) -> Type:
    """Channels are contracted, in groups where there are some; places are fixed."""
    type_, weight, shape = op.type("input"), op.type("weight"), op.shape()
    spatial = len(weight) - 2
    at = len(type_) - spatial - 1
    groups = op.arg("groups") or 1
    if isinstance(groups, fx.Node):
        return _all_frozen(op, "it is convolved in a dynamic number of groups")
    kernel = weight[2:]
    for axis in kernel:
        op.freeze(axis, "places of a kernel")
    for axis in type_[at + 1 :]:
        op.freeze(axis, "places of an image")
    out = weight[0]
    if groups == 1:
        op.unify(type_[at], weight[1])
        op.contract(type_[at], op.arg("input"), op.arg("weight"))
        op.mark("convolved", type_[at])
    else:
        group = op.fresh(groups)
        op.unify(type_[at], op.axes.product(group, weight[1]))
        op.unify(out, op.axes.product(group, op.fresh(out.size // groups)))
        op.contract(weight[1], op.arg("input"), op.arg("weight"))
        op.mark("convolved", weight[1])
        op.mark("convolved", group)
        op.size_literal("groups", None, group)
    if op.arg("bias") is not None:
        op.unify(out, op.type("bias")[0])
    op.vanishes_as((op.arg("input"), op.arg("weight")), (op.arg("bias"),))
    places = [op.fixed(size, "places of an image") for size in shape[at + 1 :]]
    return (*type_[:at], out, *places)


@rule("conv_transpose1d.default", "conv_transpose2d.input", zero=Zero.ANY)
@rule("conv_transpose3d.input", zero=Zero.ANY)
def transposed_convolution(op: Op) -> Type:
    """As a convolution, with the weight's first two axes exchanged."""
    type_, weight, shape = op.type("input"), op.type("weight"), op.shape()
    at = len(type_) - (len(weight) - 2) - 1
    groups = op.arg("groups") or 1
    if isinstance(groups, fx.Node):
        return _all_frozen(op, "it is convolved in a dynamic number of groups")
    for axis in (*weight[2:], *type_[at + 1 :]):
        op.freeze(axis, "places of a kernel or an image")
    op.unify(type_[at], weight[0])
    if groups == 1:
        out = weight[1]
    else:
        (group, _) = op.factor(weight[0], (groups, weight[0].size // groups))
        out = op.axes.product(group, weight[1])
        op.size_literal("groups", None, group)
    op.contract(type_[at], op.arg("input"), op.arg("weight"))
    op.mark("convolved", type_[at])
    if op.arg("bias") is not None:
        op.unify(out, op.type("bias")[0])
    op.vanishes_as((op.arg("input"), op.arg("weight")), (op.arg("bias"),))
    places = [op.fixed(size, "places of an image") for size in shape[at + 1 :]]
    return (*type_[:at], out, *places)


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input", zero=Zero.NEVER)
def recurrent(op: Op) -> list[Type | None]:
    """Gates of (gate hidden) from the input and the hidden state; hidden units start from zero."""
    type_, result = op.type("input"), op.shapes(op.node)
    states, weights = op.arg("hx"), op.arg("params")
    states = states if isinstance(states, list | tuple) else [states]
    each = 4 if op.arg("has_biases") else 2
    sides = 2 if op.arg("bidirectional") else 1
    if len(weights) != each * sides * op.arg("num_layers"):
        why = f"{op.node.target} projects its hidden state"
        _all_frozen(op, why)
        return [tuple(op.fixed(size, why) for size in shape) for shape in result]
    time, batch = (1, 0) if op.arg("batch_first") else (0, 1)
    op.freeze(type_[time], "it is run over in time")
    hidden = op.types[states[0]][2]
    layers = op.fixed(result[1][0], "layers of a recurrent network")
    for state in states:
        for axis, other in zip(op.types[state], (layers, type_[batch], hidden), strict=True):
            op.unify(axis, other)
    out = op.axes.sum(*[hidden] * sides)
    for at in range(0, len(weights), each):
        source, node = (type_[2], op.arg("input")) if at < each * sides else (out, None)
        first, second, *biases = weights[at : at + each]
        (rows, columns), (again, back) = op.types[first], op.types[second]
        gates = op.fixed(rows.size // hidden.size, "gates")
        for axis in (rows, again, *(op.types[bias][0] for bias in biases)):
            op.unify(axis, op.axes.product(gates, hidden))
        op.unify(columns, source)
        op.unify(back, hidden)
        op.contract(columns, *(n for n in (node, first) if n is not None))
        op.contract(back, second)
        op.mark("linear", columns)
        op.mark("linear", back)
    # A unit whose weights are zero stays at what a part of its state is: zero, where it starts so.
    op.vanishes_as(*((node,) for node in (*states, *weights)))
    return [(*type_[:2], out), *((layers, type_[batch], hidden) for _ in states)]


@rule("lstm_cell.default", "gru_cell.default", zero=Zero.NEVER)
@rule("rnn_tanh_cell.default", "rnn_relu_cell.default", zero=Zero.NEVER)
def recurrent_cell(op: Op) -> Type | list[Type | None]:
    """One step of a recurrent layer: gates of (gate hidden) from the input and the state."""
    type_, states = op.type("input"), op.arg("hx")
    several = isinstance(states, list | tuple)
    states = list(states) if several else [states]
    hidden = op.types[states[0]][-1]
    for state in states:
        op.broadcast((*type_[:-1], hidden), op.types[state], shape=op.shape(state))
    weights = [op.arg(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    weights = [weight for weight in weights if weight is not None]
    rows = op.types[weights[0]][0]
    gates = op.fixed(rows.size // hidden.size, "gates")
    for weight in weights:
        op.unify(op.types[weight][0], op.axes.product(gates, hidden))
    for weight, source, node in zip(
        weights, (type_[-1], hidden), (op.arg("input"), states[0]), strict=False
    ):
        op.unify(op.types[weight][1], source)
        op.contract(op.types[weight][1], node, weight)
        op.mark("linear", op.types[weight][1])
    op.vanishes_as(*((node,) for node in (*states, *weights)))
    out = (*type_[:-1], hidden)
    return [out, out] if several else out
