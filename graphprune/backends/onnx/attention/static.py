"""Caches that keep their length: new keys and values are written behind those that are held.

How much of a cache is held is told by the attention mask, which is as wide as past and new tokens
together.

Reference: ONNX's TensorScatter-24 and Attention-24.
"""

from __future__ import annotations

from operator import sub
from typing import Any

import torch
from torch import fx

from graphprune.backends.onnx.attention.forms import STATIC_OPSET
from graphprune.backends.onnx.attention.writer import Writer
from graphprune.ir.nodes import arguments_of, new_size

_ATEN = torch.ops.aten
_LENGTH = 4096
"""The example of a cache's length: more than any example holds."""


class StaticCaches:
    """The caches of a decoder, all of one length that does not change.

    Parameters
    ----------
    writer
        Writes nodes at the place at hand.
    tokens, mask
        The inputs with new tokens, ``[batch, new]``, and with the mask, ``[batch, past + new]``;
        a program without them has no caches.
    """

    def __init__(self, writer: Writer, tokens: fx.Node | None, mask: fx.Node | None) -> None:
        self.writer = writer
        self.tokens = tokens
        self.mask = mask
        self.caches: set[fx.Node] = set()
        self.length: Any = None

    def written(self, past: fx.Node, new: fx.Node) -> fx.Node:
        """Return the cache `past` with `new` behind all that it holds."""
        self._lengthen(past)
        write = self.writer
        rows = [write.size(new, 0)]
        place = write.call(_ATEN.full.default, rows, self.held(), dtype=torch.int64)
        (cache,) = write.operator(
            "::TensorScatter",
            [past, new, place],
            {"axis": 2},
            [[write.size(past, dim) for dim in range(4)]],
            version=STATIC_OPSET,
        )
        return cache

    def held(self) -> Any:
        """Return how many tokens caches hold before the new ones."""
        assert self.mask is not None and self.tokens is not None
        total, new = self.writer.size(self.mask, 1), self.writer.size(self.tokens, 1)
        return self.writer.call(sub, total, new)

    def wide(self, mask: fx.Node, cache: fx.Node) -> fx.Node:
        """Return a mask of scores as wide as `cache`, which hides what is not held.

        The operator may take a narrower one, and ONNX Runtime 1.31 does not.
        """
        write, value = self.writer, mask.meta["val"]
        last = value.dim() - 1
        more = write.call(sub, write.size(cache, 2), write.size(mask, last))
        sizes = [*(write.size(mask, dim) for dim in range(last)), more]
        hidden = False if value.dtype == torch.bool else torch.finfo(value.dtype).min
        rest = write.call(_ATEN.full.default, sizes, hidden, dtype=value.dtype)
        return write.call(_ATEN.cat.default, [mask, rest], last)

    def _lengthen(self, past: fx.Node) -> None:
        """Let a cache have a length of its own; who read it finds there what is held."""
        if past in self.caches:
            return
        self.caches.add(past)
        graph = past.graph
        first = next(node for node in graph.nodes if node.op == "call_function")
        for user in list(past.users):
            if user.target is _ATEN.sym_size.int and int(arguments_of(user)["dim"]) % 4 == 2:
                with graph.inserting_before(first):
                    held = self.held()
                user.replace_all_uses_with(held)
        old = past.meta["val"]
        if self.length is None:
            self.length = new_size(old.fake_mode, "length", _LENGTH)
        sizes = (*old.shape[:2], self.length, old.shape[3])
        with old.fake_mode:
            past.meta = {**past.meta, "val": torch.empty(sizes, dtype=old.dtype)}
