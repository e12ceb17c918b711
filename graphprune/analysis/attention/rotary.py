"""Rotary position embedding in a program's graph: what is rotated, and by which angles.

However it is spelled, it is a rotation of pairs of a head's dimensions by angles that depend on the
position alone. So the part of the graph between queries or keys and what they come from is run on
inputs that show the angles, and then on random ones, on prompts, tokens and chunks, with padding:
what equals the rotation everywhere is one.

Reference: Su et al., RoFormer, 2104.09864, equation 34.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.analysis.attention.probes import Prober, Sizes
from graphprune.ir.interpreter import run_part
from graphprune.ir.program import Program

_ATEN = torch.ops.aten
_MOST_NODES = 80
"""A rotation has fewer nodes than this."""

_AT_ONCE = 2**24
"""Elements that one run may hold while angles are read off."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotation of the first dimensions of every head by its position.

    Parameters
    ----------
    source
        What is rotated.
    heads_first
        Whether `source` is ``[batch, heads, length, size]``; else ``[batch, length, heads, size]``.
    interleaved
        Whether neighbors form a pair; else a dimension and that half the rotated width further on.
    cos, sin
        Of each position and pair, ``[positions, rotated width / 2]``.
    """

    source: fx.Node
    heads_first: bool
    interleaved: bool
    cos: Tensor
    sin: Tensor

    @property
    def width(self) -> int:
        """The number of dimensions that are rotated."""
        return 2 * int(self.cos.shape[1])

    @property
    def positions(self) -> int:
        """The number of positions whose angles are known."""
        return int(self.cos.shape[0])

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x`, ``[batch, heads, length, size]``, at `positions`, ``[batch, length]``."""
        cos, sin = (table[positions][:, None] for table in (self.cos, self.sin))
        first, second = self._halves(x[..., : self.width])
        turned = first * cos - second * sin, second * cos + first * sin
        joined = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat((joined, x[..., self.width :]), -1)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        half = self.width // 2
        return x[..., :half], x[..., half:]


class RotaryReader:
    """Reads rotations of queries and keys in a program, up to a number of positions."""

    def __init__(self, program: Program, positions: int) -> None:
        self.program = program
        self.positions = positions
        self.prober = Prober(program)
        self.order = {node: at for at, node in enumerate(program.graph.nodes)}
        self.hidden = self._hidden()
        self.tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def read(self, node: fx.Node) -> Rotary | None:
        """Return the rotation whose result is `node`, ``[batch, heads, length, size]``, or None."""
        for source, boundary in self._sources(node):
            heads_first = _shape(source) == _shape(node)
            batch, heads, length, size = _shape(node)
            if not heads_first and _shape(source) != (batch, length, heads, size):
                continue
            if source.meta["val"].dtype != node.meta["val"].dtype:
                continue
            try:
                rotary = self._rotation(node, source, heads_first, boundary)
            except Exception:  # noqa: BLE001 - a part of a graph fails in any way
                return None
            if rotary is not None:
                return rotary
        return None

    def _hidden(self) -> set[fx.Node]:
        """Return what depends on parameters or inputs by more than sizes, as angles do not.

        Masks are no such inputs: positions are counted on them.
        """
        kinds = self.program.kinds
        found = {node for name, node in self.program.weight_nodes() if kinds[name] == "parameter"}
        found |= {node for _, node in self.program.input_nodes()} - self.prober.paddings
        for node in self.program.graph.nodes:
            if node.target is not _ATEN.sym_size.int and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def _sources(self, node: fx.Node) -> Iterator[tuple[fx.Node, frozenset[fx.Node]]]:
        """Return what all hidden in `node` comes through, nearest first, and what else comes in."""
        frontier, boundary = {node}, set[fx.Node]()
        for _ in range(_MOST_NODES):
            latest = max(frontier, key=self.order.__getitem__)
            frontier.remove(latest)
            for other in latest.all_input_nodes:
                if other in self.hidden:
                    frontier.add(other)
                elif isinstance(other.meta.get("val"), Tensor):
                    boundary.add(self._root(other))
            if not frontier:
                return
            if len(frontier) == 1:
                (source,) = frontier
                value = source.meta.get("val")
                if isinstance(value, Tensor) and value.dim() == 4:
                    yield source, frozenset(boundary)

    def _root(self, node: fx.Node) -> fx.Node:
        """Return what `node` is computed from alone: layers share it."""
        while len(node.all_input_nodes) == 1 and node.all_input_nodes[0] not in self.hidden:
            node = node.all_input_nodes[0]
        return node

    def _rotation(
        self, node: fx.Node, source: fx.Node, heads_first: bool, boundary: frozenset[fx.Node]
    ) -> Rotary | None:
        size = int(node.meta["val"].shape[-1])
        sample = Sizes(1, 5, 0)
        x = self._random(node, sample)
        y = self._run(node, source, heads_first, x, sample)
        moved = (x != y).flatten(0, -2).any(0).nonzero()
        if not len(moved):
            return None
        width = int(moved.max()) + 1
        first = torch.zeros(size, dtype=x.dtype, device=x.device)
        first[0] = 1
        y = self._run(node, source, heads_first, first.expand_as(x), sample)
        partners = y[..., 1:, :].flatten(0, -2).any(0).nonzero().flatten().tolist()
        layouts = {(0, width // 2): False, (0, 1): True}
        interleaved = layouts.get(tuple(partners))
        if width % 2 or interleaved is None:
            return None
        key = (boundary, size, width, interleaved)
        if key not in self.tables:
            self.tables[key] = self._angles(node, source, heads_first, width, interleaved)
        rotary = Rotary(source, heads_first, interleaved, *self.tables[key])
        return rotary if self._holds(rotary, node) else None

    def _angles(
        self, node: fx.Node, source: fx.Node, heads_first: bool, width: int, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position: where the first of each pair goes."""
        heads, size = int(node.meta["val"].shape[1]), int(node.meta["val"].shape[-1])
        pairs = torch.arange(width // 2)
        first = 2 * pairs if interleaved else pairs
        second = first + (1 if interleaved else width // 2)
        ones = torch.zeros(size, dtype=node.meta["val"].dtype, device=self.prober.device)
        ones[first] = 1
        length = max(1, min(self.positions, _AT_ONCE // (heads * size)))
        found = []
        for start in range(0, self.positions, length):
            new = min(length, self.positions - start)
            x = ones.expand(1, heads, new, size)
            y = self._run(node, source, heads_first, x, Sizes(1, new, start))[0, 0]
            found.append((y[:, first], y[:, second]))
        cos, sin = (torch.cat(part).cpu() for part in zip(*found, strict=True))
        return cos, sin

    def _holds(self, rotary: Rotary, node: fx.Node) -> bool:
        """Return whether the graph rotates so, at the positions that a mask's ones count."""
        last = self.positions - 1
        sizes = [Sizes(2, 5, 0), Sizes(2, 1, 6), Sizes(2, 3, 6)]
        if self.program.is_decoder:
            sizes += [Sizes(1, 1, last), Sizes(1, 1, last // 2)]
        pads = ("", "right") if self.prober.paddings else ("",)
        for each in sizes if self.program.is_decoder else sizes[:1]:
            for pad in pads if each.batch > 1 else pads[:1]:
                x = self._random(node, each)
                y = self._run(node, rotary.source, rotary.heads_first, x, each, pad).cpu()
                mask = self._mask(each, pad)
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -each.new :]
                expected = rotary.rotate(x.cpu(), positions)
                real = mask[:, -each.new :].bool()[:, None, :, None]
                near = (y - expected).abs() <= 8 * torch.finfo(x.dtype).eps * x.abs().max().cpu()
                if not (near | ~real).all():
                    return False
        return True

    def _mask(self, sizes: Sizes, pad: str) -> Tensor:
        if not self.prober.paddings:
            return torch.ones(sizes.batch, sizes.past + sizes.new, dtype=torch.int64)
        (padding,) = self.prober.paddings
        return self.prober.inputs(sizes, pad)[padding].cpu()

    def _random(self, node: fx.Node, sizes: Sizes) -> Tensor:
        shape = sizes.batch, int(node.meta["val"].shape[1]), sizes.new, node.meta["val"].shape[3]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(shape, generator=generator)
        return drawn.to(self.prober.device, node.meta["val"].dtype)

    def _run(
        self,
        node: fx.Node,
        source: fx.Node,
        heads_first: bool,
        x: Tensor,
        sizes: Sizes,
        pad: str = "",
    ) -> Tensor:
        """`node` where `source` is `x`, ``[batch, heads, length, size]``."""
        given = self.prober.inputs(sizes, pad)
        given[source] = x if heads_first else x.transpose(1, 2)
        (y,) = run_part(self.program, (node,), given)
        return y


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].shape))
