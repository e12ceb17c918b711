"""Two programs that should compute the same, walked side by side, a segment at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from graphprune.calibration.layerwise import BatchExecution
from graphprune.calibration.segments import segments
from graphprune.errors import VerificationError, first_line
from graphprune.ir.compare import relative_error
from graphprune.ir.interpreter import Compute, call
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of, module_path


@dataclass
class Walk:
    """One run of a program, a segment at a time: no more is held than a segment's weights.

    Iterating over it runs it, and yields after each segment what layers that end there give, by the
    names of nodes.

    Parameters
    ----------
    program
        The program.
    inputs
        By name.
    weights
        What it is run on; its own by default.
    compute
        Makes the values of nodes.

    Attributes
    ----------
    outputs
        The outputs by name, at the end of the run.
    """

    program: Program
    inputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] | None = None
    compute: Compute = call
    outputs: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        ends = set(layer_ends(self.program))
        seen: dict[str, Tensor] = {}

        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = self.compute(node, args, kwargs)
            if node.name in ends and isinstance(value, Tensor):
                seen[node.name] = value
            return value

        given = {node for _, node in self.program.output_nodes()}
        parts = [part.nodes for part in segments(self.program)]
        (execution,) = BatchExecution.of_all(
            self.program,
            [self.inputs],
            parts,
            goals=given,
            weights=self.weights,
            computes=[compute],
        )
        for part in parts:
            execution.advance(part)
            yield dict(seen)
            seen.clear()
        weights = execution.weights.of(given)
        self.outputs = {
            value.name: weights[node] if node in weights else execution.values[node]
            for value, node in self.program.output_nodes()
        }

    def to_end(self) -> dict[str, Tensor]:
        """Run it, and return the outputs."""
        for _ in self:
            pass
        return self.outputs


def side_by_side(wide: Walk, narrow: Walk, allowed: float) -> str:
    """Run both; return the path of the first numbered layer whose result differs, or "".

    What a layer gives can be compared where nothing of its size went: along the residual stream,
    most often.

    Parameters
    ----------
    wide
        What is expected.
    narrow
        What should compute the same.
    allowed
        The relative error up to which values are the same.

    Raises
    ------
    VerificationError
        When `narrow` does not run.
    """
    layers = layer_ends(narrow.program)
    first = ""
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    nothing: dict[str, Tensor] = {}
    for ours, theirs in itertools.zip_longest(wide, _running(narrow), fillvalue=nothing):
        expected |= ours
        found |= theirs
        for name in [name for name in found if name in expected]:
            pair = expected.pop(name), found.pop(name)
            same_shape = pair[0].shape == pair[1].shape
            if not first and same_shape and not relative_error(*pair) <= allowed:
                first = layers[name]
    return first


def _running(walk: Walk) -> Iterator[dict[str, Tensor]]:
    try:
        yield from walk
    except Exception as error:  # a wrong graph may fail in any way
        raise VerificationError(f"the program does not run: {first_line(error)}") from error


def layer_ends(program: Program) -> dict[str, str]:
    """Return the names of the nodes of numbered layers that are read after them -> the layer."""
    layers = {
        node: layer_of(module_path(node))
        for node in program.graph.nodes
        if node.op != "placeholder"
    }
    return {
        node.name: layer
        for node, layer in layers.items()
        if layer and any(layers[user] != layer for user in node.users)
    }
