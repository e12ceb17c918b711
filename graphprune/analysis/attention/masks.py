"""Which keys each query may attend to, found by running the mask's part of the graph.

It is run on prompts, single tokens and chunks, with padding on either side and on lengths around
every number in it, and compared with what it may mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune.analysis.attention.probes import Prober, Sizes
from graphprune.ir.interpreter import ancestors, run_part

MaskKind = Literal["none", "causal", "window", "bias"]

_ATEN = torch.ops.aten
_LONGEST, _LONGEST_SQUARE = 2**20, 2**12
"""Lengths up to which a mask is tried on a cache, and where it is square."""

_MOST_NODES = 400
"""A mask of more nodes than this is computed from hidden states: it is not run."""

LEAST = -1e4
"""An addend from which on a score has no weight: its exponential vanishes beside any other's."""


@dataclass(frozen=True)
class Mask:
    """The keys that a query attends to.

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


@dataclass(frozen=True)
class _Meaning:
    """A meaning that a mask may have."""

    kind: MaskKind
    padded: bool
    window: int | None = None

    def allowed(self, queries: int, keys: int, padding: Tensor | None) -> Tensor:
        """Return who may attend to what, ``[batch or 1, queries, keys]``; the ends of both meet."""
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


def meaning_of(prober: Prober, mask: fx.Node) -> Mask:
    """Return what `mask` means, if it means anything but itself on all sizes that are tried."""
    part = ancestors([mask])
    if len(part) > _MOST_NODES or not _tells_sizes_only(prober, part):
        return Mask(mask, "bias")
    paddings = prober.paddings & part
    numbers = _numbers(prober, part)
    if not prober.program.is_decoder and any(number >= _LONGEST_SQUARE for number in numbers):
        return Mask(mask, "bias")
    windows = sorted({near for n in numbers for near in (n - 1, n, n + 1) if near > 0})
    left = [
        *(_Meaning(kind, padded) for padded in (False, True) for kind in ("none", "causal")),
        *(_Meaning("window", padded, w) for padded in (False, True) for w in windows),
    ]
    for sizes, pad, must in _scenarios(prober, numbers, bool(paddings)):
        try:
            given = prober.inputs(sizes, pad)
            (found,) = run_part(prober.program, (mask,), given)
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


def _tells_sizes_only(prober: Prober, part: Collection[fx.Node]) -> bool:
    """Return whether inputs other than the padding have a say by their sizes alone."""
    for _, node in prober.program.input_nodes():
        users = () if node in prober.paddings else (user for user in node.users if user in part)
        if node in part and any(user.target is not _ATEN.sym_size.int for user in users):
            return False
    return True


def _numbers(prober: Prober, part: Collection[fx.Node]) -> list[int]:
    """Whole numbers that stand in a part of the graph, or in constants of one element."""
    found: set[int] = set()
    for node in part:
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            if type(leaf) is int and 1 < abs(leaf) < _LONGEST:
                found.add(abs(leaf))
    for name, node in prober.program.weight_nodes():
        weight = prober.program.weights[name]
        if node in part and weight.numel() == 1 and not weight.is_meta:
            number = abs(float(weight))
            if number.is_integer() and 1 < number < _LONGEST:
                found.add(int(number))
    return sorted(found)


def _scenarios(
    prober: Prober, numbers: Sequence[int], padded: bool
) -> Iterator[tuple[Sizes, str, bool]]:
    """Sizes, the side that is padded, and whether the graph must hold for them."""
    cached = prober.program.is_decoder
    pads = ("", "right", "left") if padded else ("",)
    for past, new in ((0, 5), (6, 1), (6, 3)) if cached else ((0, 5), (0, 9)):
        for pad in pads:
            yield Sizes(2, new, past), pad, True
    for number in numbers:
        long = Sizes(1, 3, number + 2) if cached else Sizes(1, number + 3, 0)
        yield long, "", False


def _agrees(meaning: _Meaning, found: Tensor, padding: Tensor | None, new: int) -> bool:
    """Return whether a mask's values are what `meaning` says, wherever the query is no padding."""
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
