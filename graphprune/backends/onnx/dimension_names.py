"""Names of dynamic sizes in ONNX models: ``batch`` and ``past_sequence``, never ``s26``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from graphprune.errors import BackendError
from graphprune.ir.program import PAST, Program, Value

if TYPE_CHECKING:
    import onnx_ir

_TOTAL = {"past_sequence + sequence", "sequence + past_sequence"}
"""What a decoder's total length is called by those who traced it."""


def dimension_names(program: Program) -> dict[str, str]:
    """Return a name for every symbol among the sizes of a program's inputs.

    Examples are ``batch``, ``sequence``, ``past_sequence`` and ``total_sequence``. The inputs of a
    transformers model agree in their batch, and its caches in their length, so their symbols may
    share that name.
    """
    names: dict[str, str] = {}
    for value in program.inputs:
        for dim, size in enumerate(value.shape):
            if isinstance(size, str) and size.isidentifier() and size not in names:
                name = _dimension(program, value, dim)
                shared = name in ("batch", "past_sequence") and program.source is not None
                if name in names.values() and not shared:
                    name = f"{_word(value.name)}_{name if dim == 0 else f'dim_{dim}'}"
                names[size] = name
    for value, node in program.input_nodes():
        for dim, size in enumerate(node.meta["val"].shape):
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            for symbol in expression.free_symbols if expression is not None else ():
                # No input is of this size: it stands for what one is a multiple of, say.
                names.setdefault(str(symbol), f"{_dimension(program, value, dim)}_unit")
    return names


def check_dimensions(model: onnx_ir.Model, program: Program) -> None:
    """Refuse a `model`, as it was exported, that takes fewer sizes than its `program`.

    Raises
    ------
    BackendError
        Naming the first input and dimension that are dynamic in the program and a number in the
        model, or that the model wants equal to another.
    """
    shapes = {value.name: value.shape for value in model.graph.inputs}
    names = dimension_names(program)
    for value in program.inputs:
        for dim, (size, given) in enumerate(
            zip(value.shape, shapes[value.name] or (), strict=False)
        ):
            written = str(given if isinstance(given, int) else given.value)
            if isinstance(size, int) or written == size:
                continue
            if written.isdigit():
                what = f"is fixed at {written}"
            elif size.isidentifier() and written.isidentifier():
                what = f"has to be {names.get(written, written)}"
            else:
                continue  # the same size in other words
            raise BackendError(
                f"no ONNX export: dimension {dim} of {value.name} ({names.get(size, size)}) {what} "
                "in what torch's exporter makes of the program, which takes other sizes too"
            )


def output_names(program: Program) -> list[str]:
    """Return the outputs' names in ONNX, where no input and no weight may have the same one."""
    taken = {value.name for value in program.inputs} | set(program.weights)
    return [f"{v.name}_output" if v.name in taken else v.name for v in program.outputs]


def _dimension(program: Program, value: Value, dim: int) -> str:
    if dim == 0:
        return "batch"
    if value.name.startswith(PAST) and dim == 2:
        return "encoder_sequence" if ".encoder." in value.name else "past_sequence"
    prefix, ids, _ = value.name.rpartition("input_ids")
    if ids and dim == 1:
        return f"{prefix}sequence"
    prefix, mask, _ = value.name.rpartition("attention_mask")
    if mask and dim == 1:
        return "total_sequence" if program.is_decoder and not prefix else f"{prefix}sequence"
    if len(value.shape) == 4 and value.name == "pixel_values":
        return ("batch", "channels", "height", "width")[dim]
    return f"{_word(value.name)}_dim_{dim}"


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


def apply_names(model: onnx_ir.Model, names: Mapping[str, str]) -> None:
    """Give the sizes of `model` their `names`, and drop what only tells of its export."""
    import onnx_ir

    from graphprune.io.version import __version__

    known = dict(names)

    def rename(size: Any) -> Any:
        if isinstance(size, int) or size.value is None:
            return size
        text = re.sub(
            # What is left depends on data, such as how many values are unique.
            r"\b[a-z]+\d+\b",
            lambda match: known.setdefault(match[0], f"data_dependent_{len(known) - len(names)}"),
            str(size.value),
        )
        if text.isdigit():
            return int(text)
        return onnx_ir.SymbolicDim("total_sequence" if text in _TOTAL else text)

    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = onnx_ir.Shape([rename(size) for size in value.shape])
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "graphprune", __version__
