"""Pieces of a program: from some of its nodes to others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.backends.onnx.encoder_decoder.anatomy import reads_size
from graphprune.errors import BackendError
from graphprune.ir.interpreter import ancestors
from graphprune.ir.nodes import made_from, valued
from graphprune.ir.program import Program, value_of
from graphprune.ir.provenance import whereabouts

Named = Sequence[tuple[str, fx.Node]]


class Piece:
    """A graph under construction that computes some nodes of a program from others.

    Its placeholders are the weights that it reads, then what is given, under names of their own.
    Sizes are read off what is given wherever that has them.

    Parameters
    ----------
    program
        The program.
    given
        Names and nodes of what goes in.
    wanted
        The nodes that are to be computed.

    Raises
    ------
    BackendError
        When `wanted` depends on an input of the program that is not given.
    """

    def __init__(self, program: Program, given: Named, wanted: Sequence[fx.Node]) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        nodes = [node for _, node in given]
        self.sizes = _sizes_of(nodes)
        homes = [node for node in program.graph.nodes if self._home(node)]
        self.needed = ancestors(wanted, stop={*nodes, *homes}) - set(nodes)
        weights = {node: name for name, node in program.weight_nodes()}
        for node in program.graph.find_nodes(op="placeholder"):
            if node not in self.needed:
                continue
            if node not in weights:
                value = next(v for v, other in program.input_nodes() if other is node)
                raise BackendError(f"the decoder reads {value.name} past keys and values of it")
            self.copies[node] = self.graph.node_copy(node)
        self.weights = [weights[node] for node in self.copies]
        self.inputs = [(name, self.take(name, node)) for name, node in given]
        self.copies.update({node: copy for node, (_, copy) in zip(nodes, self.inputs, strict=True)})

    def take(self, name: str, node: fx.Node) -> fx.Node:
        """Make an input of what `node` is."""
        placeholder = self.graph.placeholder(f"in_{name.replace('.', '_')}")
        placeholder.meta = {"val": node.meta["val"]}
        return placeholder

    def arrange(self, names: Sequence[str]) -> None:
        """Let the inputs come in the order of `names`, which are theirs."""
        held = dict(self.inputs)
        self.inputs = [(name, held[name]) for name in names]
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        for _, node in self.inputs:
            first.prepend(node)

    def body(self) -> list[fx.Node]:
        """Return the calls that are needed, in order."""
        return [n for n in self.program.graph.nodes if n in self.needed and n.op != "placeholder"]

    def copy(self, node: fx.Node) -> None:
        """Copy a call, whose size is read off what is given where that has it."""
        home = self._home(node)
        if home is None:
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
            return
        source, dim = home
        self.copies[node] = self.graph.node_copy(node, self.copies.get)
        self.copies[node].args = (self.copies[source], dim)

    def program_of(self, outputs: Named, ranges: dict[Any, Any] | None = None) -> Program:
        """Return the piece with its `outputs`, nodes of the piece, as a program."""
        self.graph.output(tuple(node for _, node in outputs))
        self.graph.lint()
        program = self.program
        return dataclasses.replace(
            program,
            graph_module=fx.GraphModule(torch.nn.Module(), self.graph),
            weights={name: program.weights[name] for name in self.weights},
            kinds={name: program.kinds[name] for name in self.weights},
            aliases={k: name for k, name in program.aliases.items() if name in self.weights},
            inputs=tuple(value_of(name, node) for name, node in self.inputs),
            outputs=tuple(value_of(name, node) for name, node in outputs),
            ranges={**program.ranges, **(ranges or {})},
            notes=(),
        )

    def _home(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Return what is given and has the size that `node` reads off a tensor, and where."""
        size = node.meta.get("val")
        if not reads_size(node) or not isinstance(size, torch.SymInt):
            return None
        return self.sizes.get(size.node.expr)


def piece(program: Program, given: Named, outputs: Named) -> Program:
    """Return the part of `program` that computes `outputs` from what is `given`, by their names."""
    made = Piece(program, given, [node for _, node in outputs])
    for node in made.body():
        made.copy(node)
    results: list[tuple[str, fx.Node]] = []
    for name, node in outputs:
        copy = made.copies[node]
        if copy.op == "placeholder" or any(copy is other for _, other in results):
            copy = valued(made_from(copy, torch.ops.aten.clone.default, copy))
        results.append((name, copy))
    return made.program_of(results)


def _sizes_of(nodes: Sequence[fx.Node]) -> dict[Any, tuple[fx.Node, int]]:
    """Map each dynamic size to the first of `nodes` that has it, and the dimension."""
    found: dict[Any, tuple[fx.Node, int]] = {}
    for node in nodes:
        value = node.meta["val"]
        assert isinstance(value, Tensor), whereabouts(node)
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (node, dim))
    return found
