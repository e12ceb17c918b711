"""What each attention of a graph computes.

Fused and spelled-out attention are read alike: queries, keys and values before KV heads are
repeated, the cache that is joined with them, scale, soft cap, and the mask.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.analysis.attention.attentions import Attention, attentions
from graphprune.analysis.attention.masks import Mask, meaning_of
from graphprune.analysis.attention.probes import SAMPLE, Prober
from graphprune.analysis.inference import infer
from graphprune.ir.aten import (
    MOVES,
    PERMUTES,
    PRODUCTS,
    RESHAPES,
    is_copy,
    is_idle_dropout,
    name_of,
    uncopied,
)
from graphprune.ir.interpreter import run_part
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import PAST, PRESENT, Program

_ATEN = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Cached:
    """Keys or values that a cache holds, joined with new ones.

    Parameters
    ----------
    joined
        The node that joins them; it is an output of the program.
    past, new
        What is joined, each ``[batch, KV heads, length, head size]``.
    name
        The name of the output.
    """

    joined: fx.Node
    past: fx.Node
    new: fx.Node
    name: str


@dataclass(frozen=True, eq=False, kw_only=True)
class RecognizedAttention(Attention):
    """An attention that computes ``softmax(cap(scale * q k^T) + mask) v``.

    Parameters
    ----------
    query
        Queries, ``[batch, heads, queries, head size]``.
    key, value
        Keys and values, ``[batch, KV heads, keys, size]``, before KV heads are repeated for the
        queries of their group, which lie next to one another.
    scale
        What scores are multiplied by.
    mask
        Which keys are attended to.
    softcap
        c where scores s become ``c tanh(s / c)`` before they are masked.
    caches
        The caches of keys and values, where both have one.
    sink
        One more score for each head, ``[heads]``, that takes part in the softmax and weighs
        nothing.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: Mask
    softcap: float | None = None
    caches: tuple[Cached, Cached] | None = None
    sink: fx.Node | None = None

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return int(self.query.meta["val"].shape[1])

    @property
    def kv_heads(self) -> int:
        """The number of KV heads."""
        return int(self.key.meta["val"].shape[1])

    @property
    def sizes(self) -> tuple[int, int]:
        """Head sizes of queries and keys, and of values."""
        return int(self.query.meta["val"].shape[-1]), int(self.value.meta["val"].shape[-1])


@dataclass(frozen=True, eq=False, kw_only=True)
class UnrecognizedAttention(Attention):
    """An attention of which something is not understood, and why."""

    why: str


Recognition = RecognizedAttention | UnrecognizedAttention


def recognize_attentions(program: Program) -> tuple[Recognition, ...]:
    """Say of every attention of `program` what it computes; weights must be there."""
    recognizer = _Recognizer(program)
    of_softmax: dict[fx.Node, list[Attention]] = {}
    for each in attentions(infer(program)):
        of_softmax.setdefault(each.softmax, []).append(each)
    return tuple(recognizer.recognize(*several) for several in of_softmax.values())


class _Refused(Exception):
    """The reason why it is not said what an attention computes."""


@dataclass(frozen=True)
class _Scores:
    """The way from queries and keys to scores, as it is written: the mask is a tensor."""

    mask: fx.Node | None
    scale: float
    softcap: float | None = None
    causal: bool = False
    grouped: bool = False
    sink: fx.Node | None = None


class _Recognizer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.masks: dict[fx.Node, Mask] = {}
        self.prober = Prober(program)
        self.given = self.prober.inputs(SAMPLE)
        self.pasts = {
            node: value.name.removeprefix(PAST)
            for value, node in program.input_nodes()
            if value.name.startswith(PAST)
        }
        self.presents = {
            value.name: node
            for value, node in program.output_nodes()
            if value.name.startswith(PRESENT)
        }

    def recognize(self, attention: Attention, *others: Attention) -> Recognition:
        """Say what `attention` computes, whose softmax `others` share, or why that is not known."""
        try:
            if others:
                raise _Refused("its softmax runs over the scores of several products")
            return self._recognized(attention)
        except _Refused as refusal:
            return UnrecognizedAttention(**vars(attention), why=str(refusal))

    def _recognized(self, attention: Attention) -> RecognizedAttention:
        is_fused = attention.node is attention.softmax
        scores = _fused(attention.node) if is_fused else _spelled_out(attention)
        query, key, value = attention.operands
        if not is_fused:
            key = _turned(attention)
        operands = (query, key, value)
        if any(operand.meta["val"].dim() != 4 for operand in operands):
            raise _Refused("its queries, keys or values have other than four dimensions")
        heads = query.meta["val"].shape[1]
        if not all(type(operand.meta["val"].shape[1]) is int for operand in operands):
            raise _Refused("its number of heads is dynamic")
        key, value = (
            plain(operand) if scores.grouped else self._before_repeat(operand, heads)
            for operand in (key, value)
        )
        kv_heads = key.meta["val"].shape[1]
        if kv_heads != value.meta["val"].shape[1] or heads % kv_heads:
            raise _Refused("keys and values have different numbers of heads")
        caches = self._cached(key, "key"), self._cached(value, "value")
        return RecognizedAttention(
            **vars(attention),
            query=query,
            key=key,
            value=value,
            scale=scores.scale,
            mask=self._mask(scores, query, key),
            softcap=scores.softcap,
            caches=(caches[0], caches[1]) if caches[0] and caches[1] else None,
            sink=None if scores.sink is None else self._sink(scores.sink, heads),
        )

    def _sink(self, scores: fx.Node, heads: int) -> fx.Node:
        """Return the scores of each head that `scores`, ``[batch, heads, queries, 1]``, repeats."""
        node = scores
        while _keeps_order(node) and node.meta["val"].dim() > 1:
            node = node.all_input_nodes[0]
        if node.meta["val"].shape != (heads,):
            raise _Refused("its softmax runs over more than keys")
        sample = torch.arange(heads).to(node.meta["val"].dtype)
        (spread,) = run_part(self.program, (scores,), {**self.given, node: sample})
        if not torch.equal(spread, sample[:, None, None].expand_as(spread)):
            raise _Refused("its softmax runs over more than keys")
        return node

    def _before_repeat(self, operand: fx.Node, heads: int) -> fx.Node:
        """Return what `operand` repeats for each query head of a group, or `operand` itself."""
        found, node = plain(operand), operand
        length, width = (str(size) for size in operand.meta["val"].shape[2:])
        while _keeps_order(node):
            node = node.all_input_nodes[0]
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dtype != operand.meta["val"].dtype:
                break
            if value.dim() != 4 or (str(value.shape[2]), str(value.shape[3])) != (length, width):
                continue
            groups = value.shape[1]
            if type(groups) is int and groups < heads and self._repeats(node, operand, heads):
                found = plain(node)
        return found

    def _repeats(self, node: fx.Node, operand: fx.Node, heads: int) -> bool:
        """Return whether `operand` is `node` with each head repeated for its query heads."""
        groups = node.meta["val"].shape[1]
        if heads % groups:
            return False
        shape = self.prober.shape(node, SAMPLE)
        sample = torch.arange(math.prod(shape)).reshape(shape).to(node.meta["val"].dtype)
        (repeated,) = run_part(self.program, (operand,), {**self.given, node: sample})
        return torch.equal(repeated, sample.repeat_interleave(heads // groups, 1))

    def _cached(self, node: fx.Node, kind: str) -> Cached | None:
        if node.target is not _ATEN.cat.default:
            return None
        given = arguments_of(node)
        parts, dim = given["tensors"], given["dim"]
        if len(parts) != 2 or dim not in (2, -2) or parts[0] not in self.pasts:
            return None
        name = self.pasts[parts[0]]
        output = self.presents.get(PRESENT + name)
        if output is None or plain(output) is not node or not name.endswith(kind):
            return None
        return Cached(node, parts[0], parts[1], PRESENT + name)

    def _mask(self, scores: _Scores, query: fx.Node, key: fx.Node) -> Mask:
        if scores.mask is None:
            if not scores.causal:
                return Mask(None, "none")
            if str(query.meta["val"].shape[2]) != str(key.meta["val"].shape[2]):
                raise _Refused("its causal mask counts from the first key, not from the last")
            return Mask(None, "causal")
        if scores.mask not in self.masks:
            self.masks[scores.mask] = meaning_of(self.prober, scores.mask)
        return self.masks[scores.mask]


def _fused(node: fx.Node) -> _Scores:
    given = arguments_of(node)
    if given["dropout_p"]:
        raise _Refused("it drops probabilities")
    if given["is_causal"] and given["attn_mask"] is not None:
        raise _Refused("it is causal and masked at once")
    scale = given["scale"]
    if scale is None:
        width = given["query"].meta["val"].shape[-1]
        if type(width) is not int:
            raise _Refused("its head size is dynamic")
        scale = width**-0.5
    if not isinstance(scale, int | float):
        raise _Refused("its scale is computed")
    return _Scores(
        given["attn_mask"],
        float(scale),
        causal=bool(given["is_causal"]),
        grouped=bool(given["enable_gqa"]),
    )


def _spelled_out(attention: Attention) -> _Scores:
    """Read what lies between the first product and the softmax, and between that and the second.

    Scores are scaled, capped and masked, in this order.
    """
    softmax, (product, context) = attention.softmax, attention.products
    has_sink = _drops_last(context, softmax)
    if softmax.args[1] not in (-1, softmax.meta["val"].dim() - 1):
        raise _Refused("its softmax does not run over the keys")
    mask, softcap, scale, sink = None, None, 1.0, None
    node = uncopied(softmax.all_input_nodes[0])
    if has_sink:
        node, sink = _joined_scores(node)
    if name_of(node) == "add":
        mask, node = _added(node)
    if (capped := _capped(node)) is not None:
        softcap, node = capped
    while (scaled := _scaled(node)) is not None:
        factor, node = scaled
        scale *= factor
    if node is not product or name_of(node) not in PRODUCTS:
        raise _Refused(f"{node.target} lies between its product and its softmax")
    return _Scores(mask, scale, softcap, sink=sink)


def _turned(attention: Attention) -> fx.Node:
    """Return the keys of which the first product takes the transpose."""
    taken = plain(attention.operands[1])
    rank = taken.meta["val"].dim()
    dims = taken.args[1:3] if taken.target is _ATEN.transpose.int else ()
    if {int(dim) % rank for dim in dims if isinstance(dim, int)} != {rank - 2, rank - 1}:
        raise _Refused("its keys are not a transpose of keys")
    return taken.all_input_nodes[0]


def _drops_last(context: fx.Node, softmax: fx.Node) -> bool:
    """Return whether the last probability, that of a sink, weighs nothing in `context`.

    All others must be the left side of that product, and be read by nothing else.
    """
    node, dropped = context.args[0], False
    if node is context.args[1] or not isinstance(node, fx.Node):
        raise _Refused("its probabilities are not the left side of a product")
    while True:
        if len(node.users) > 1:
            raise _Refused("its probabilities are read elsewhere too")
        if node is softmax:
            return dropped
        if name_of(node) in RESHAPES:
            raise _Refused("its products have batch and heads in one dimension")
        if node.target is _ATEN.slice.Tensor and not dropped:
            given = arguments_of(node)
            last = given["dim"] in (-1, node.meta["val"].dim() - 1)
            if not last or given["start"] not in (None, 0) or given["end"] != -1:
                raise _Refused("its softmax runs over more than keys")
            dropped = True
        elif not is_copy(node):
            raise _Refused(f"{node.target} lies between its softmax and its product")
        node = node.all_input_nodes[0]


def _joined_scores(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(scores, those of a sink) that are joined, maybe less the largest of them."""
    if name_of(node) == "sub" and isinstance(node.args[1], fx.Node):
        most = node.args[1]
        source = most.all_input_nodes[0] if most.target is operator.getitem else most
        if name_of(source) in ("max", "amax") and source.args[0] is node.args[0]:
            node = uncopied(node.all_input_nodes[0])
    if node.target is not _ATEN.cat.default or len(node.all_input_nodes) != 2:
        raise _Refused("its softmax runs over more than keys")
    scores, sink = node.all_input_nodes
    if sink.meta["val"].shape[-1] != 1:
        raise _Refused("its softmax runs over more than keys")
    return uncopied(scores), sink


def _added(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(mask, scores) of a sum: the scores lead to a product."""
    operands = [other for other in node.args if isinstance(other, fx.Node)]
    if node.kwargs.get("alpha", 1) != 1 or len(operands) != 2:
        raise _Refused("its scores are added to in a way that is not read")
    leading = [other for other in operands if _to_product(uncopied(other))]
    if len(leading) != 1:
        raise _Refused("it is not told which addend its scores are")
    (scores,) = leading
    mask = operands[1 - operands.index(scores)]
    return mask, uncopied(scores)


def _to_product(node: fx.Node) -> bool:
    for _ in range(8):
        if name_of(node) in PRODUCTS:
            return True
        if not is_copy(node) and name_of(node) not in ("mul", "div", "tanh"):
            return False
        node = node.all_input_nodes[0]
    return False


def _capped(node: fx.Node) -> tuple[float, fx.Node] | None:
    """(c, scores) where `node` is ``c * tanh(scores / c)``."""
    outer = _scaled(node)
    if outer is None or name_of(outer[1]) != "tanh":
        return None
    inner = _scaled(outer[1].all_input_nodes[0])
    if inner is None or not math.isclose(inner[0] * outer[0], 1.0, rel_tol=1e-6):
        raise _Refused("its scores are capped in a way that is not read")
    return outer[0], inner[1]


def _scaled(node: fx.Node) -> tuple[float, fx.Node] | None:
    """(factor, scores) where `node` multiplies or divides by a number."""
    if name_of(node) not in ("mul", "div") or len(node.args) != 2:
        return None
    scores, number = node.args
    if not isinstance(scores, fx.Node) or not isinstance(number, int | float):
        return None
    factor = float(number) if name_of(node) == "mul" else 1.0 / float(number)
    return factor, uncopied(scores)


def _keeps_order(node: fx.Node) -> bool:
    """Return whether what is left of the values of the first input stands in their order."""
    return is_idle_dropout(node) or name_of(node) in MOVES - PERMUTES - {"select"}


def plain(node: fx.Node) -> fx.Node:
    """Return the node whose values `node` has, element for element, in the same type."""
    while _keeps_order(node):
        inner = node.all_input_nodes[0]
        ours, theirs = node.meta["val"], inner.meta["val"]
        if str(tuple(ours.shape)) != str(tuple(theirs.shape)) or ours.dtype != theirs.dtype:
            break
        node = inner
    return node
