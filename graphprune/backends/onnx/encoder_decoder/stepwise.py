"""The decoder of an encoder-decoder with caches: it takes tokens as they come.

The graph of one call computes all tokens at once. Here it is made over for some new tokens after
others whose keys and values a cache holds:

- what depends on how many tokens there are, such as positions and masks, is computed for all of
  them, and cut to the new ones where it meets what is computed of those;
- keys and values of the attention to tokens are those of the cache and the new ones.

That is right where tokens are seen by later ones alone, and by nothing but attention; the package
is proven against the call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from graphprune.analysis.attention.attentions import FUSED
from graphprune.backends.onnx.encoder_decoder.anatomy import Anatomy, reads_size
from graphprune.backends.onnx.encoder_decoder.pieces import Named, Piece
from graphprune.errors import BackendError
from graphprune.ir.nodes import arguments_of, new_size, set_argument, valued
from graphprune.ir.program import Program
from graphprune.ir.provenance import operator_of

_ATEN = torch.ops.aten
_PAST = 5
"""The example of a past length: any number but those that torch.export treats apart."""

_RUNNING = (_ATEN.cumsum.default, _ATEN.cumprod.default, _ATEN.logcumsumexp.default)
"""What makes of each token something of it and all before it."""


def stepwise(
    program: Program,
    anatomy: Anatomy,
    given: Named,
    caches: Mapping[str, tuple[str, fx.Node]],
    order: Sequence[str] = (),
) -> Program:
    """Return the decoder as a program of new tokens and its caches.

    Parameters
    ----------
    program, anatomy
        The call, and what is what in it.
    given
        Names and nodes of what goes in beside the caches of its own tokens.
    caches
        For each cache of its own tokens that goes in, by name: that of what comes out, and the node
        that makes the keys or values of new tokens.
    order
        The names of all inputs in the order that they are to have; by default as they are given.

    Raises
    ------
    BackendError
        When an operator mixes tokens in another way than attention, or the decoder reads what is
        encoded past the caches.
    """
    return _Stepwise(program, anatomy, given, caches).made(order)


class _Stepwise:
    def __init__(
        self,
        program: Program,
        anatomy: Anatomy,
        given: Named,
        caches: Mapping[str, tuple[str, fx.Node]],
    ) -> None:
        self.anatomy = anatomy
        self.program = program
        self.logits = next(iter(self.program.output_nodes()))
        self.piece = Piece(self.program, given, [self.logits[1]])
        self.graph, self.copies = self.piece.graph, self.piece.copies
        self.longer: dict[fx.Node, fx.Node] = {}
        """Copies of sizes and of what is computed of them, for all tokens and not the new ones."""
        self.tokens = self.copies[anatomy.tokens[1]]
        self.mode = self.tokens.meta["val"].fake_mode
        self.length = new_size(self.mode, "past", _PAST)
        self.presents = dict(caches.values())
        self.pasts = {node: self._past(name, node) for name, (_, node) in caches.items()}
        self.cut: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        self.of_keys = self._of_keys()

    def made(self, order: Sequence[str]) -> Program:
        first = next(iter(self.pasts.values()))
        self.past = self._call(_ATEN.sym_size.int, first, 2)
        self.new = self._call(_ATEN.sym_size.int, self.tokens, 1)
        self.total = self._call(operator.add, self.past, self.new)
        for node in self.piece.body():
            self._copy(node)
        value, node = self.logits
        outputs = [(value.name, self.copies[node])]
        outputs += [(name, self.copies[node]) for name, node in self.presents.items()]
        symbol = self.length.node.expr
        if order:
            self.piece.arrange(order)
        return self.piece.program_of(outputs, {symbol: ValueRanges(0, int_oo)})

    # -- inputs --

    def _past(self, name: str, node: fx.Node) -> fx.Node:
        new = node.meta["val"]
        if not self._is_length(new.shape[2]):
            raise BackendError(f"{operator_of(node)} makes no keys of one place for each token")
        with self.mode:
            held = torch.empty(
                (*new.shape[:2], self.length, new.shape[3]), dtype=new.dtype, device=new.device
            )
        placeholder = self.piece.take(name, node)
        placeholder.meta["val"] = held
        self.piece.inputs.append((name, placeholder))
        return placeholder

    def _of_keys(self) -> set[fx.Node]:
        """Return what is made of cached keys and values before queries meet them."""
        ends = {node for cache in self.anatomy.own for node in cache.site.products}
        found = set(self.pasts)
        for node in self.program.graph.nodes:
            inside = node not in ends and not reads_size(node)
            if inside and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found - set(self.pasts)

    def _is_length(self, size: Any) -> bool:
        length = self.tokens.meta["val"].shape[1].node.expr
        return isinstance(size, torch.SymInt) and size.node.expr == length

    # -- nodes --

    def _copy(self, node: fx.Node) -> None:
        if node in self.anatomy.counted:
            if not isinstance(node.meta.get("val"), Tensor):
                self._copy_size(node)
            else:
                self.copies[node] = self._made(node, self._in_all)
        elif node in self.anatomy.decoded:
            self._refuse_counts(node)
            copy = self._made(node, self._in_all if node in self.of_keys else self._in_new)
            if node in self.pasts:
                copy = self._call(_ATEN.cat.default, [self.pasts[node], copy], 2)
            self.copies[node] = copy
        else:
            self.piece.copy(node)

    def _refuse_counts(self, node: fx.Node) -> None:
        """Refuse what sums up tokens from the first on: caches do not say what those were."""
        if node.target not in _RUNNING:
            return
        summed = node.all_input_nodes[0].meta["val"].shape[arguments_of(node)["dim"]]
        if self._is_length(summed):
            raise BackendError(
                f"{operator_of(node)} counts tokens by what they are, as positions are counted "
                "that leave padding out: it cannot be run token by token"
            )

    def _copy_size(self, node: fx.Node) -> None:
        if not reads_size(node):
            self.copies[node] = self._made(node, self._in_new)
            self.longer[node] = self._made(node, self._in_all)
            return
        if not self._is_length(node.meta["val"]):
            raise BackendError(f"{operator_of(node)} reads a size that depends on the tokens'")
        self.copies[node], self.longer[node] = self.new, self.total

    def _in_new(self, node: fx.Node) -> fx.Node:
        return self.copies[node]

    def _in_all(self, node: fx.Node) -> fx.Node:
        return self.longer.get(node, self.copies[node])

    def _made(self, node: fx.Node, copy_of: Callable[[fx.Node], fx.Node]) -> fx.Node:
        copy = self.graph.node_copy(node, copy_of)
        if node in self.anatomy.decoded:
            with self.graph.inserting_before(copy):
                self._cut_arguments(node, copy)
        return valued(copy, self.mode)

    def _cut_arguments(self, node: fx.Node, copy: fx.Node) -> None:
        """Cut what is computed for all tokens to the new ones, where `node` is of those."""
        if node.target is FUSED:
            self._spell_out_mask(copy)
        for other in dict.fromkeys(node.all_input_nodes):
            held = self.copies[other]
            if other not in self.anatomy.counted or not isinstance(held.meta["val"], Tensor):
                continue
            long = [d for d, s in enumerate(held.meta["val"].shape) if _same(s, self.total)]
            met = self._met(node, copy) if long else []
            behind = held.meta["val"].dim()
            new = [d for d in long if behind - d <= len(met) and _same(met[d - behind], self.new)]
            if new:
                copy.replace_input_with(held, self._cut(held, tuple(new)))

    def _met(self, node: fx.Node, copy: fx.Node) -> list[Any]:
        """Return the sizes of that which `copy` brings together with positions or masks."""
        if node.target is FUSED:
            given = arguments_of(copy)
            query, key = (given[name].meta["val"].shape for name in ("query", "key"))
            return [*query[:-1], key[2]]
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            raise BackendError(
                f"{operator_of(node)} brings tokens together with positions in another way than "
                "one by one: it cannot be run token by token"
            )
        of_tokens = [n for n in node.all_input_nodes if n in self.anatomy.decoded]
        shapes = [list(self.copies[n].meta["val"].shape) for n in of_tokens]
        return max(shapes, key=len)

    def _cut(self, node: fx.Node, dims: tuple[int, ...]) -> fx.Node:
        key = (node, dims)
        if key not in self.cut:
            cut = node
            for dim in dims:
                cut = self._call(_ATEN.narrow.default, cut, dim, self.past, self.new)
            self.cut[key] = cut
        return self.cut[key]

    def _spell_out_mask(self, copy: fx.Node) -> None:
        """Spell out which keys come before which queries, which the operator would count anew."""
        if not arguments_of(copy)["is_causal"]:
            return
        at = self._call(_ATEN.arange.default, self.total)
        rows = self._call(_ATEN.unsqueeze.default, self._cut(at, (0,)), 1)
        mask = self._call(_ATEN.le.Tensor, at, rows)
        set_argument(copy, "is_causal", None, False)
        set_argument(copy, "attn_mask", None, mask)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return valued(self.graph.call_function(target, args), self.mode)


def _same(size: Any, node: fx.Node) -> bool:
    """Return whether a size is the dynamic one that `node` computes."""
    return isinstance(size, torch.SymInt) and size.node.expr == node.meta["val"].node.expr
