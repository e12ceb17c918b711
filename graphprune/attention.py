"""Attention in a program's graph, read as one thing with its meaning.

Fused and spelled-out attention are read alike: queries, keys and values before KV heads are
repeated, the cache that is joined with them, scale, soft cap, and the mask. What a mask means is
tried, not guessed: its part of the graph is run on prompts, single tokens and chunks, with padding
on either side and on lengths around every number in it, and compared with what it may mean.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.nodes import arguments_of, size_of
from graphprune.program import PAST, PRESENT, Program, module_path

MaskKind = Literal["none", "causal", "window", "bias"]

_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.matmul.default, _ATEN.bmm.default)
_LONGEST, _LONGEST_SQUARE = 2**20, 2**12
"""Lengths up to which a mask is tried on a cache, and where it is square."""

_MOST_NODES = 400
"""A mask of more nodes than this is computed from hidden states: it is not run."""

LEAST = -1e4
"""An addend from which on a score has no weight: its exponential vanishes beside any other's."""

# fmt: off
_CARRYING = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "slice",
    "expand", "repeat", "repeat_interleave", "clone", "contiguous", "alias", "detach", "dropout",
    "to", "_to_copy",
}
# fmt: on


@dataclass(frozen=True)
class Mask:
    """Which keys a query attends to.

    Parameters
    ----------
    node
        The tensor that goes into the attention: where it is true, or what is added; None for none.
    kind
        All keys ("none"), those up to the query's own ("causal"), the last `window` of those
        ("window"), or what only the tensor tells ("bias").
    padded
        Whether keys are left out where the input `padding` is zero.
    window
        The number of keys of a window, the query's own among them.
    padding
        The node of the input that says what is padding, where `padded`.
    """

    node: fx.Node | None
    kind: MaskKind
    padded: bool = False
    window: int | None = None
    padding: fx.Node | None = None

    def __str__(self) -> str:
        kind = f"window {self.window}" if self.window else self.kind
        return f"{kind} and padding" if self.padded else kind


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


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention: ``softmax(cap(scale * q k^T) + mask) v``.

    Parameters
    ----------
    node
        The node that returns the attended values, ``[batch, heads, queries, value size]``.
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

    node: fx.Node
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

    @property
    def module(self) -> str:
        """The dotted path of the module that attends."""
        return module_path(self.node)


@dataclass(frozen=True, eq=False)
class Unread:
    """A softmax that could not be read as attention, and why."""

    node: fx.Node
    why: str

    @property
    def module(self) -> str:
        """The dotted path of the module that attends."""
        return module_path(self.node)


def read_attention(program: Program) -> tuple[AttentionSite | Unread, ...]:
    """Every attention of `program`, in the order of the graph; weights must be there.

    A softmax that is no attention, such as that of a router, is not among them where no product
    of it follows.
    """
    reader = _Reader(program)
    found = (reader.read(node) for node in program.graph.nodes if node.op == "call_function")
    return tuple(site for site in found if site is not None)


class _Refused(Exception):
    """Why a softmax is not read as attention."""


@dataclass(frozen=True)
class _Parts:
    """Attention as it is written: heads are repeated, and the mask is a tensor."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node, fx.Node]
    mask: fx.Node | None
    scale: float
    softcap: float | None = None
    causal: bool = False
    grouped: bool = False
    sink: fx.Node | None = None


class _Reader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.masks: dict[fx.Node, Mask] = {}
        self.trials = _Trials(program)
        self.given = self.trials.inputs(_SAMPLE)
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

    def read(self, node: fx.Node) -> AttentionSite | Unread | None:
        """What is attention at `node`, a fused one or a softmax; None for anything else."""
        try:
            if node.target is _ATEN.scaled_dot_product_attention.default:
                return self._site(_fused(node))
            if node.target in (_ATEN.softmax.int, _ATEN._softmax.default):
                parts = _spelled_out(node)
                return None if parts is None else self._site(parts)
        except _Refused as refusal:
            return Unread(node, str(refusal))
        return None

    def _site(self, parts: _Parts) -> AttentionSite:
        query, key, value = parts.operands
        if any(operand.meta["val"].dim() != 4 for operand in parts.operands):
            raise _Refused("its queries, keys or values have other than four dimensions")
        heads = query.meta["val"].shape[1]
        if not all(type(operand.meta["val"].shape[1]) is int for operand in parts.operands):
            raise _Refused("its number of heads is dynamic")
        key, value = (
            plain(operand) if parts.grouped else self._before_repeat(operand, heads)
            for operand in (key, value)
        )
        kv_heads = key.meta["val"].shape[1]
        if kv_heads != value.meta["val"].shape[1] or heads % kv_heads:
            raise _Refused("keys and values have different numbers of heads")
        caches = self._cached(key, "key"), self._cached(value, "value")
        both = (caches[0], caches[1]) if caches[0] and caches[1] else None
        return AttentionSite(
            parts.node,
            query,
            key,
            value,
            parts.scale,
            self._mask(parts),
            parts.softcap,
            both,
            None if parts.sink is None else self._sink(parts.sink, heads),
        )

    def _sink(self, scores: fx.Node, heads: int) -> fx.Node:
        """The scores of each head that `scores`, ``[batch, heads, queries, 1]``, repeats."""
        node = scores
        while _name(node) in _CARRYING and node.meta["val"].dim() > 1:
            node = node.all_input_nodes[0]
        if node.meta["val"].shape != (heads,):
            raise _Refused("its softmax runs over more than keys")
        sample = torch.arange(heads).to(node.meta["val"].dtype)
        (spread,) = run_part(self.program, (scores,), {**self.given, node: sample})
        if not torch.equal(spread, sample[:, None, None].expand_as(spread)):
            raise _Refused("its softmax runs over more than keys")
        return node

    def _before_repeat(self, operand: fx.Node, heads: int) -> fx.Node:
        """What `operand` repeats for each query head of a group, or `operand` if nothing is."""
        found, node = plain(operand), operand
        length, width = (str(size) for size in operand.meta["val"].shape[2:])
        while _name(node) in _CARRYING:
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
        """Whether `operand` is `node` with every head as often as a group has query heads."""
        groups = node.meta["val"].shape[1]
        if heads % groups:
            return False
        shape = self.trials.shape(node, _SAMPLE)
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

    def _mask(self, parts: _Parts) -> Mask:
        if parts.mask is None:
            if not parts.causal:
                return Mask(None, "none")
            query, key = (node.meta["val"].shape[2] for node in parts.operands[:2])
            if str(query) != str(key):
                raise _Refused("its causal mask counts from the first key, not from the last")
            return Mask(None, "causal")
        if parts.mask not in self.masks:
            self.masks[parts.mask] = self.trials.meaning(parts.mask)
        return self.masks[parts.mask]


def _fused(node: fx.Node) -> _Parts:
    given = arguments_of(node)
    if given["dropout_p"]:
        raise _Refused("it drops probabilities")
    if given["is_causal"] and given["attn_mask"] is not None:
        raise _Refused("it is causal and masked at once")
    operands = (given["query"], given["key"], given["value"])
    scale = given["scale"]
    if scale is None:
        width = operands[0].meta["val"].shape[-1]
        if type(width) is not int:
            raise _Refused("its head size is dynamic")
        scale = width**-0.5
    if not isinstance(scale, int | float):
        raise _Refused("its scale is computed")
    return _Parts(
        node,
        operands,
        given["attn_mask"],
        float(scale),
        causal=bool(given["is_causal"]),
        grouped=bool(given["enable_gqa"]),
    )


def _spelled_out(softmax: fx.Node) -> _Parts | None:
    """Attention around a softmax: a product before it and one after it; None where none follows.

    Between the first product and the softmax scores are scaled, capped and masked, in this order.
    """
    rank = softmax.meta["val"].dim()
    context, parted = _product_after(softmax)
    if context is None:
        return None
    if softmax.args[1] not in (-1, rank - 1):
        raise _Refused("its softmax does not run over the keys")
    mask, softcap, scale, sink = None, None, 1.0, None
    node = _uncast(softmax.all_input_nodes[0])
    if parted:
        node, sink = _joined_scores(node)
    if _name(node) == "add":
        mask, node = _added(node)
    if (capped := _capped(node)) is not None:
        softcap, node = capped
    while (scaled := _scaled(node)) is not None:
        factor, node = scaled
        scale *= factor
    if node.target not in _PRODUCTS:
        raise _Refused(f"{node.target} lies between its product and its softmax")
    query, turned = (operand for operand in node.args[:2] if isinstance(operand, fx.Node))
    turned = plain(turned)
    dims = turned.args[1:3] if turned.target is _ATEN.transpose.int else ()
    if {int(dim) % rank for dim in dims if isinstance(dim, int)} != {rank - 2, rank - 1}:
        raise _Refused("its keys are not a transpose of keys")
    key = turned.all_input_nodes[0]
    value = context.args[1]
    assert isinstance(value, fx.Node)
    return _Parts(context, (query, key, value), mask, scale, softcap, sink=sink)


def _product_after(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The product that probabilities go into, casts aside, and whether the last one goes nowhere.

    None where they go into no product, or are no probabilities of keys.
    """
    parted = False
    while True:
        users = list(node.users)
        into = [user for user in users if user.target in _PRODUCTS]
        if len(users) != 1:
            if into:
                raise _Refused("its probabilities are read elsewhere too")
            return None, parted
        if into:
            if into[0].args[0] is not node or into[0].args[1] is node:
                raise _Refused("its probabilities are not the left side of a product")
            return into[0], parted
        (user,) = users
        if user.target is _ATEN.slice.Tensor and not parted:
            given = arguments_of(user)
            last = given["dim"] in (-1, user.meta["val"].dim() - 1)
            if not last or given["start"] not in (None, 0) or given["end"] != -1:
                return None, parted
            parted = True
        elif _name(user) in ("view", "reshape") and any(u.target in _PRODUCTS for u in user.users):
            raise _Refused("its products have batch and heads in one dimension")
        elif _uncast(user) is not _uncast(node):
            return None, parted
        node = user


def _joined_scores(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(scores, those of a sink) that are joined, maybe less the largest of them."""
    if _name(node) == "sub" and isinstance(node.args[1], fx.Node):
        most = node.args[1]
        source = most.all_input_nodes[0] if most.target is operator.getitem else most
        if _name(source) in ("max", "amax") and source.args[0] is node.args[0]:
            node = _uncast(node.all_input_nodes[0])
    if node.target is not _ATEN.cat.default or len(node.all_input_nodes) != 2:
        raise _Refused("its softmax runs over more than keys")
    scores, sink = node.all_input_nodes
    if sink.meta["val"].shape[-1] != 1:
        raise _Refused("its softmax runs over more than keys")
    return _uncast(scores), sink


def _added(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(mask, scores) of a sum: the scores lead to a product."""
    operands = [other for other in node.args if isinstance(other, fx.Node)]
    if node.kwargs.get("alpha", 1) != 1 or len(operands) != 2:
        raise _Refused("its scores are added to in a way that is not read")
    leading = [other for other in operands if _to_product(_uncast(other))]
    if len(leading) != 1:
        raise _Refused("it is not told which addend its scores are")
    (scores,) = leading
    mask = operands[1 - operands.index(scores)]
    return mask, _uncast(scores)


def _to_product(node: fx.Node) -> bool:
    for _ in range(8):
        if node.target in _PRODUCTS:
            return True
        if _name(node) not in ("mul", "div", "tanh", "to", "_to_copy") or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _capped(node: fx.Node) -> tuple[float, fx.Node] | None:
    """(c, scores) where `node` is ``c * tanh(scores / c)``."""
    outer = _scaled(node)
    if outer is None or _name(outer[1]) != "tanh":
        return None
    inner = _scaled(outer[1].all_input_nodes[0])
    if inner is None or not math.isclose(inner[0] * outer[0], 1.0, rel_tol=1e-6):
        raise _Refused("its scores are capped in a way that is not read")
    return outer[0], inner[1]


def _scaled(node: fx.Node) -> tuple[float, fx.Node] | None:
    """(factor, scores) where `node` multiplies or divides by a number."""
    if _name(node) not in ("mul", "div") or len(node.args) != 2:
        return None
    scores, number = node.args
    if not isinstance(scores, fx.Node) or not isinstance(number, int | float):
        return None
    factor = float(number) if _name(node) == "mul" else 1.0 / float(number)
    return factor, _uncast(scores)


def _name(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.partition("::")[2]


def _uncast(node: fx.Node) -> fx.Node:
    """The value that `node` is a copy of, in another type maybe."""
    names = ("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach")
    while _name(node) in names or _is_no_dropout(node):
        node = node.all_input_nodes[0]
    return node


def _is_no_dropout(node: fx.Node) -> bool:
    return _name(node) == "dropout" and (not node.args[1] or not node.args[2])


def plain(node: fx.Node) -> fx.Node:
    """The node whose values `node` has at the same places, in the same type."""
    while _name(node) in _CARRYING and (_name(node) != "dropout" or _is_no_dropout(node)):
        inner = node.all_input_nodes[0]
        ours, theirs = node.meta["val"], inner.meta["val"]
        if str(tuple(ours.shape)) != str(tuple(theirs.shape)) or ours.dtype != theirs.dtype:
            break
        node = inner
    return node


# -- trying parts of a graph ----------------------------------------------------------------------


def run_part(
    program: Program, wanted: Sequence[fx.Node], given: Mapping[fx.Node, Any]
) -> tuple[Any, ...]:
    """The values of the nodes `wanted`, from weights and the `given` values of other nodes."""
    needed = ancestors(wanted, given)
    weights = {node: name for name, node in program.weight_nodes() if node in needed}
    held: dict[fx.Node, Any] = dict(given)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node not in needed or node in held:
                continue
            if node.op == "placeholder":
                held[node] = program.weights[weights[node]]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
                held[node] = node.target(*args, **kwargs)
    return tuple(held[node] for node in wanted)


def ancestors(nodes: Sequence[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """`nodes` and all that they are computed from, up to the nodes `stop`."""
    pending, found = list(nodes), set(nodes)
    while pending:
        node = pending.pop()
        for other in () if node in stop else node.all_input_nodes:
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


@dataclass(frozen=True)
class _Sizes:
    """Sizes to try a graph on."""

    batch: int
    new: int
    past: int


_SAMPLE = _Sizes(2, 3, 4)


@dataclass(frozen=True)
class _Meaning:
    """What a mask may mean."""

    kind: MaskKind
    padded: bool
    window: int | None = None

    def allowed(self, queries: int, keys: int, padding: Tensor | None) -> Tensor:
        """Where it lets attend, ``[batch or 1, queries, keys]``; the last query is the last key."""
        at = torch.arange(keys - queries, keys)[:, None]
        key = torch.arange(keys)[None]
        found = torch.ones(queries, keys, dtype=torch.bool)
        if self.kind != "none":
            found = key <= at
        if self.window is not None:
            found = found & (key > at - self.window)
        if self.padded and padding is not None:
            return found[None] & padding.bool()[:, None]
        return found[None]


class _Trials:
    """Runs parts of a program on sizes of its inputs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._symbols: dict[_Sizes, dict[str, int]] = {}
        self.device = next((w.device for w in program.weights.values()), torch.device("cpu"))
        self.paddings = {
            node for value, node in program.input_nodes() if value.name.endswith("attention_mask")
        }

    def symbols(self, sizes: _Sizes) -> dict[str, int]:
        """Every dynamic size of the inputs."""
        if sizes not in self._symbols:
            self._symbols[sizes] = self._symbols_of(sizes)
        return self._symbols[sizes]

    def _symbols_of(self, sizes: _Sizes) -> dict[str, int]:
        found: dict[str, int] = {}
        for value in self.program.inputs:
            for dim, symbol in enumerate(value.shape):
                if not isinstance(symbol, str) or symbol in found:
                    continue
                if dim == 0:
                    found[symbol] = sizes.batch
                elif value.name.startswith(PAST):
                    found[symbol] = sizes.past
                elif value.name.endswith("attention_mask") and self.program.is_decoder:
                    found[symbol] = sizes.new + sizes.past
                else:
                    found[symbol] = sizes.new + 2 * value.name.startswith("decoder")
        return found

    def shape(self, node: fx.Node, sizes: _Sizes) -> list[int]:
        """The sizes of `node`."""
        symbols = self.symbols(sizes)
        return [size_of(size, symbols) for size in node.meta["val"].shape]

    def inputs(self, sizes: _Sizes, pad: str = "") -> dict[fx.Node, Tensor]:
        """Inputs of these sizes: zeros, and masks that pad the first row on the side of `pad`."""
        found = {}
        for value, node in self.program.input_nodes():
            shape = self.shape(node, sizes)
            if node not in self.paddings:
                zero = torch.zeros((), dtype=value.dtype, device=self.device)
                found[node] = zero.expand(shape)
                continue
            found[node] = torch.ones(shape, dtype=value.dtype, device=self.device)
            if pad == "left":
                found[node][0, :2] = 0
            elif pad == "right":  # of the prompt: what was decoded since stands after its padding
                end = sizes.past or shape[1]
                found[node][0, end - 2 : end] = 0
        return found

    def meaning(self, mask: fx.Node) -> Mask:
        """What `mask` means, if it means anything but itself on all sizes that are tried."""
        part = ancestors([mask])
        if len(part) > _MOST_NODES or not self._tells_sizes_only(part):
            return Mask(mask, "bias")
        paddings = self.paddings & part
        numbers = self._numbers(part)
        if not self.program.is_decoder and any(number >= _LONGEST_SQUARE for number in numbers):
            return Mask(mask, "bias")
        windows = sorted({near for n in numbers for near in (n - 1, n, n + 1) if near > 0})
        left = [
            *(_Meaning(kind, padded) for padded in (False, True) for kind in ("none", "causal")),
            *(_Meaning("window", padded, w) for padded in (False, True) for w in windows),
        ]
        for sizes, pad, must in self._scenarios(numbers, bool(paddings)):
            try:
                given = self.inputs(sizes, pad)
                (found,) = run_part(self.program, (mask,), given)
                padding = given[next(iter(paddings))].cpu() if paddings else None
                found = found.cpu()
                left = [each for each in left if _agrees(each, found, padding, sizes.new)]
            except Exception:  # noqa: BLE001 - a part of a graph fails in any way
                if must:
                    return Mask(mask, "bias")
        if not left or len(paddings) > 1:
            return Mask(mask, "bias")
        best = left[0]
        return Mask(
            mask, best.kind, best.padded, best.window, next(iter(paddings)) if best.padded else None
        )

    def _tells_sizes_only(self, part: Collection[fx.Node]) -> bool:
        """Whether inputs other than the padding have a say by their sizes alone."""
        for _, node in self.program.input_nodes():
            users = () if node in self.paddings else (user for user in node.users if user in part)
            if node in part and any(user.target is not _ATEN.sym_size.int for user in users):
                return False
        return True

    def _numbers(self, part: Collection[fx.Node]) -> list[int]:
        """Whole numbers that stand in a part of the graph, or in constants of one element."""
        found: set[int] = set()
        for node in part:
            for leaf in pytree.tree_leaves((node.args, node.kwargs)):
                if type(leaf) is int and 1 < abs(leaf) < _LONGEST:
                    found.add(abs(leaf))
        for name, node in self.program.weight_nodes():
            weight = self.program.weights[name]
            if node in part and weight.numel() == 1 and not weight.is_meta:
                number = abs(float(weight))
                if number.is_integer() and 1 < number < _LONGEST:
                    found.add(int(number))
        return sorted(found)

    def _scenarios(
        self, numbers: Sequence[int], padded: bool
    ) -> Iterator[tuple[_Sizes, str, bool]]:
        """Sizes, the side that is padded, and whether the graph must hold for them."""
        cached = self.program.is_decoder
        pads = ("", "right", "left") if padded else ("",)
        for past, new in ((0, 5), (6, 1), (6, 3)) if cached else ((0, 5), (0, 9)):
            for pad in pads:
                yield _Sizes(2, new, past), pad, True
        for number in numbers:
            long = _Sizes(1, 3, number + 2) if cached else _Sizes(1, number + 3, 0)
            yield long, "", False


def _agrees(meaning: _Meaning, found: Tensor, padding: Tensor | None, new: int) -> bool:
    """Whether a mask's values are what `meaning` says, wherever the query is no padding."""
    if found.dtype != torch.bool:
        if not ((found == 0) | (found <= LEAST)).all():
            return False
        found = found == 0
    while found.dim() < 4:
        found = found[None]
    queries, keys = found.shape[-2:]
    if queries == 1 and keys > 1:
        queries = new
    aside = padding is None or padding.shape[1] != keys
    expected = meaning.allowed(queries, keys, None if aside else padding)
    if meaning.padded and aside:
        return False
    found, expected = torch.broadcast_tensors(found, expected[:, None])
    valid = torch.ones(found.shape[0], queries, dtype=torch.bool)
    if not aside and keys >= queries:
        assert padding is not None
        valid = padding[:, keys - queries :].bool().expand_as(valid)
    return bool(((found == expected) | ~valid[:, None, :, None]).all())
