"""Cosines and sines that operators rotate queries and keys by, for every position.

In most models they are those of the position times a buffer. Then the graph computes them from it,
as the model does: as they depend on no input, a runtime does so once, when it loads the model, and
the file holds the buffer alone. A table of 32768 positions and 128 pairs takes 34 MB. Other angles
are weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from graphprune.analysis.attention.rotary import Rotary
from graphprune.backends.onnx.attention.writer import Writer
from graphprune.ir.program import Program

_ATEN = torch.ops.aten
_NEAR = 4
"""How many times the precision of their type computed angles may differ from those read off."""


class Angles:
    """The angles that a graph reads, one pair of nodes for all layers that rotate alike.

    Parameters
    ----------
    writer
        Writes into the graph.
    program, copies
        What the graph is a copy of, and the copies of its nodes.
    """

    def __init__(self, writer: Writer, program: Program, copies: Mapping[fx.Node, fx.Node]) -> None:
        self.writer = writer
        self.program = program
        self.copies = copies
        self.weights: dict[str, Tensor] = {}
        self._made: list[tuple[Rotary, fx.Node, fx.Node]] = []
        calls = (node for node in writer.graph.nodes if node.op != "placeholder")
        self._first_call = next(calls)
        self._first_input = copies[next(node for _, node in program.input_nodes())]

    def of(self, rotary: Rotary) -> tuple[fx.Node, fx.Node]:
        """Return the nodes of its cosines and sines, ``[positions, rotated width / 2]`` each."""
        for known, *nodes in self._made:
            same = known.cos is rotary.cos or torch.equal(known.cos, rotary.cos)
            if same and torch.equal(known.sin, rotary.sin):
                return nodes[0], nodes[1]
        source = _frequencies(self.program, rotary)
        cos, sin = self._weights(rotary) if source is None else self._computed(rotary, source)
        self._made.append((rotary, cos, sin))
        return cos, sin

    def _computed(self, rotary: Rotary, source: fx.Node) -> tuple[fx.Node, fx.Node]:
        call, found = self.writer.call, []
        scale, dtype = float(rotary.cos[0, 0]), rotary.cos.dtype
        frequencies = self.copies[source]
        with self.writer.graph.inserting_before(self._first_call):
            device = frequencies.meta["val"].device
            given = {"dtype": torch.float32, "device": device}
            positions = call(_ATEN.arange.default, rotary.positions, **given)
            angles = call(_ATEN.unsqueeze.default, positions, 1)
            angles = call(_ATEN.mul.Tensor, angles, frequencies)
            for function in (_ATEN.cos.default, _ATEN.sin.default):
                made = call(function, angles)
                made = call(_ATEN.mul.Scalar, made, scale) if scale != 1 else made
                typed = dtype == torch.float32
                found.append(made if typed else call(_ATEN._to_copy.default, made, dtype=dtype))
        return found[0], found[1]

    def _weights(self, rotary: Rotary) -> tuple[fx.Node, fx.Node]:
        number, made = len(self.weights) // 2, []
        graph, mode = self.writer.graph, self.writer.at.meta["val"].fake_mode
        with graph.inserting_before(self._first_input):  # weights come before inputs
            for name, table in (("cos", rotary.cos), ("sin", rotary.sin)):
                node = graph.placeholder(f"rotary_{number}_{name}")
                node.meta["val"] = mode.from_tensor(table)
                self.weights[f"rotary.{number}.{name}"] = table
                made.append(node)
        return made[0], made[1]


def _frequencies(program: Program, rotary: Rotary) -> fx.Node | None:
    """Return the buffer whose products with positions are the angles; None where there is none."""
    positions = torch.arange(rotary.positions, dtype=torch.float32)[:, None]
    scale, dtype = rotary.cos[0, 0].float(), rotary.cos.dtype
    limit = _NEAR * torch.finfo(dtype).eps * abs(float(scale))
    for name, node in program.weight_nodes():
        value = node.meta["val"]
        if program.kinds[name] == "parameter" or value.dtype != torch.float32:
            continue
        if tuple(value.shape) != rotary.cos.shape[1:]:
            continue
        angles = positions * program.weight(name).cpu()
        if all(
            (wanted.float() - made.mul_(scale).to(dtype)).abs().max() <= limit
            for wanted, made in ((rotary.cos, angles.cos()), (rotary.sin, angles.sin()))
        ):
            return node
    return None
