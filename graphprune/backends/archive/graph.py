"""The graph of an archive: JSON as `torch.export` writes it, read without running what it says."""

from __future__ import annotations

import json
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.errors import BackendError, first_line
from graphprune.frontend.recurrences import operators  # noqa: F401 - so that torch knows them
from graphprune.ir.exported import to_exported_program
from graphprune.ir.program import Program

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# fmt: off
_ARITHMETIC = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod",
    "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv",
    "PowByNatural", "FloatPow", "ToFloat", "CeilToInt", "FloorToInt", "RoundToInt",
    "TruncToInt", "TruncToFloat", "LShift", "RShift", "ModularIndexing", "Where",
    "Identity", "Piecewise", "And", "Or", "Not", "Equality", "Unequality", "GreaterThan",
    "LessThan", "StrictGreaterThan", "StrictLessThan", "True", "False", "true", "false",
    "integer", "positive", "negative", "nonnegative", "precision",
}
# fmt: on
"""Every name that the sizes of a graph may use."""


def serialize_graph(program: Program) -> bytes:
    """Return the graph of `program` as JSON.

    Raises
    ------
    BackendError
        When it holds what `torch.export` cannot serialize.
    """
    from torch._export.serde.serialize import serialize

    try:
        with _quiet():
            artifact = serialize(
                to_exported_program(program),
                serialize_state_dict=False,
                serialize_constants=False,
                serialize_example_inputs=False,
            )
    except Exception as error:  # torch says in many ways what it cannot serialize
        raise BackendError(
            f"the graph cannot be serialized: {first_line(error, typed=True)}"
        ) from error
    return artifact.exported_program


def deserialize_graph(
    text: bytes, weights: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> ExportedProgram:
    """Return the graph that `text` holds, with the weights of a program, each of a kind.

    Whatever is wrong with `text` shows as an exception of any type.
    """
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    for expression in _expressions(json.loads(text)):
        # They are evaluated as Python, by sympy.
        used = re.findall(r"[^\W\d]\w*", re.sub(r"'\w*'", "", expression))
        if unknown := [name for name in used if name not in _ARITHMETIC]:
            raise ValueError(f"{unknown[0]!r} in the size {expression!r}")
    state: Any = {
        name: torch.nn.Parameter(weights[name], False) if kind == "parameter" else weights[name]
        for name, kind in kinds.items()
        if kind in ("parameter", "buffer")
    }
    constants: Any = {name: weights[name] for name in kinds if name not in state}
    with _quiet():
        exported = deserialize(SerializedArtifact(text, state, constants, b""))
    for node in list(exported.graph.nodes):
        # Added for results that nothing uses.
        if node.target is operator.getitem and "_unused_" in node.name and not node.users:
            exported.graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


def _expressions(tree: Any) -> Iterator[str]:
    """Every symbolic size in a serialized graph."""
    pending = [tree]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if isinstance(item.get("expr_str"), str):
                yield item["expr_str"]
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's remarks about its own format off the screen."""
    logger = logging.getLogger("torch._export.serde")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
