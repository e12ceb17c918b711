"""Which nodes of an encoder-decoder's graph are whose, and where its decoder attends.

The graph is that of one call: what goes into the encoder and the decoder's tokens go in, logits
come out. All follows from what depends on what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from graphprune.analysis.attention.recognize import (
    Recognition,
    RecognizedAttention,
    UnrecognizedAttention,
    recognize_attentions,
)
from graphprune.errors import BackendError
from graphprune.ir.aten import uncopied
from graphprune.ir.interpreter import ancestors
from graphprune.ir.program import Program, Value

TOKENS = "decoder_input_ids"
"""The input with the tokens of a decoder that stands behind an encoder."""

_MASK = "attention_mask"

Kind = str


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of one attention of the decoder, each ``[batch, heads, length, size]``.

    Parameters
    ----------
    site
        The attention.
    key, value
        The nodes that make them, before KV heads are repeated for the queries of their group.
    """

    site: Recognition
    key: fx.Node
    value: fx.Node


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What is what in the graph of one call.

    Parameters
    ----------
    tokens
        The input with the decoder's tokens, ``[batch, length]``.
    masks
        Inputs that say which positions of the encoder count: the decoder reads them too.
    encoded
        What depends on what goes into the encoder, other than masks, and on nothing of the decoder.
    decoded
        What depends on the decoder's tokens.
    counted
        What depends on how many of these there are, and not on which.
    own, cross
        The caches of the decoder's attention to its own tokens, and to what the encoder made, in
        order.
    hidden
        The one node through which the encoder's inputs come to the cross caches.
    """

    tokens: tuple[Value, fx.Node]
    masks: tuple[tuple[Value, fx.Node], ...]
    encoded: frozenset[fx.Node]
    decoded: frozenset[fx.Node]
    counted: frozenset[fx.Node]
    own: tuple[Cache, ...]
    cross: tuple[Cache, ...]
    hidden: fx.Node


def is_encoder_decoder(program: Program) -> bool:
    """Return whether `program` is one call of an encoder and a decoder behind it."""
    return not program.is_decoder and any(value.name == TOKENS for value in program.inputs)


_known: WeakKeyDictionary[Program, Anatomy] = WeakKeyDictionary()


def anatomy_of(program: Program) -> Anatomy:
    """Say what is what in `program`, the call of an encoder-decoder.

    What is found is kept as long as the program is.

    Raises
    ------
    BackendError
        When there is no encoder or no tokens of a decoder, or the decoder attends in a way that
        leaves no keys and values to be kept.
    """
    if program not in _known:
        _known[program] = _found(program)
    return _known[program]


def _found(program: Program) -> Anatomy:
    inputs = {value.name: (value, node) for value, node in program.input_nodes()}
    if program.is_decoder or TOKENS not in inputs:
        raise BackendError(f"it is no call of an encoder and a decoder: it takes no {TOKENS}")
    tokens = inputs.pop(TOKENS)
    masks = tuple(each for name, each in inputs.items() if name.endswith(_MASK))
    others = [node for name, (_, node) in inputs.items() if not name.endswith(_MASK)]
    decoded, counted = _of_tokens(program, tokens[1])
    encoded = frozenset(_depending(program, others) - decoded - counted)
    own, cross = _caches(program, encoded, decoded)
    return Anatomy(
        tokens=tokens,
        masks=masks,
        encoded=encoded,
        decoded=frozenset(decoded),
        counted=frozenset(counted),
        own=own,
        cross=cross,
        hidden=_hidden(program, encoded, cross),
    )


def reads_size(node: fx.Node) -> bool:
    """Return whether `node` reads a size off a tensor."""
    return node.target is torch.ops.aten.sym_size.int


def _of_tokens(program: Program, tokens: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return what depends on the values of `tokens`, and what on their number alone."""
    length = tokens.meta["val"].shape[1]
    if not isinstance(length, torch.SymInt):
        raise BackendError(f"{TOKENS} are of one length in its graph: {length}")
    symbols = length.node.expr.free_symbols
    decoded, counted = {tokens}, set[fx.Node]()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        if reads_size(node):
            if isinstance(value, torch.SymInt) and value.node.expr.free_symbols & symbols:
                counted.add(node)
        elif not decoded.isdisjoint(node.all_input_nodes):
            decoded.add(node)
        elif not counted.isdisjoint(node.all_input_nodes):
            counted.add(node)
    return decoded, counted


def _depending(program: Program, roots: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for node in program.graph.nodes:
        if not reads_size(node) and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _caches(
    program: Program, encoded: frozenset[fx.Node], decoded: set[fx.Node]
) -> tuple[tuple[Cache, ...], tuple[Cache, ...]]:
    own, cross = list[Cache](), list[Cache]()
    for site in recognize_attentions(program):
        if site.node not in decoded:
            continue  # it is the encoder's
        cache = Cache(site, *map(uncopied, _keys_and_values(site)))
        for part in (cache.key, cache.value):
            value = part.meta["val"]
            if not isinstance(value, Tensor) or value.dim() != 4:
                raise BackendError(f"{site.module} keeps no keys and values of four dimensions")
        if {cache.key, cache.value} <= decoded:
            own.append(cache)
        elif {cache.key, cache.value} <= encoded:
            cross.append(cache)
        else:
            raise BackendError(f"{site.module} attends neither to tokens nor to what is encoded")
    if not own or not cross:
        raise BackendError("its decoder does not attend to its tokens and to what is encoded")
    return tuple(own), tuple(cross)


def _keys_and_values(site: Recognition) -> tuple[fx.Node, fx.Node]:
    if isinstance(site, RecognizedAttention):
        return site.key, site.value
    assert isinstance(site, UnrecognizedAttention)
    return site.operands[1], site.operands[2]


def _hidden(program: Program, encoded: frozenset[fx.Node], cross: tuple[Cache, ...]) -> fx.Node:
    """Return the last node that everything passes that goes from the encoder into `cross`."""
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    front = {node for cache in cross for node in (cache.key, cache.value)}
    while len(front) > 1:
        last = max(front, key=order.__getitem__)
        front.remove(last)
        front.update(node for node in last.all_input_nodes if node in encoded)
    (hidden,) = front
    if hidden.op == "placeholder" or not ancestors([hidden]) & encoded:
        raise BackendError("nothing is encoded before its decoder attends to it")
    return hidden
