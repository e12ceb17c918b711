"""The ONNX back end: one file for prompts and single tokens alike, checked, run and compared.

A program goes through `torch.onnx.export` as it is. Inputs and outputs keep their names, weights
their dotted ones (a tied weight is stored once), and dynamic sizes get names that people know.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.backends import ort
from graphprune.backends.onnx_convert import convert, simplify
from graphprune.backends.onnx_names import apply_names, dimension_names
from graphprune.errors import BackendError, UsageError
from graphprune.output import staged_file
from graphprune.program import Program
from graphprune.progress import Maker, counted, maker

if TYPE_CHECKING:
    import onnx_ir

_LARGEST = 2**31 - 2**27
"""Bytes of weights up to which one file holds the model: protobuf ends at 2 GB, nodes included."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how far it was from the program when it was run.

    Parameters
    ----------
    path
        The ONNX file.
    bytes
        Its size, external data included.
    opset
        The version of ONNX's operator set.
    nodes
        Operators in its graph.
    max_relative_error
        The largest difference that ONNX Runtime showed, over the largest absolute value of the
        output concerned; None when it was not run.
    seconds
        What conversion, checks and runs took together.
    onnxruntime
        The version of ONNX Runtime that ran it, if one is installed.
    notes
        What was left out, for people.
    """

    path: str
    bytes: int
    opset: int
    nodes: int
    max_relative_error: float | None
    seconds: float
    onnxruntime: str | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def export(
    program: Program,
    path: str | PathLike[str],
    *,
    opset: int = 20,
    check: bool = True,
    external_data: bool | None = None,
    overwrite: bool = False,
    progress: bool | Maker = False,
) -> OnnxReport:
    """Write `program` as an ONNX model.

    Parameters
    ----------
    program
        The program; its weights may be on any device but meta.
    path
        The file to write. External data goes beside it, as ``<name>.data``.
    opset
        The version of ONNX's operator set, 18 or later.
    check
        Whether to run the model in ONNX Runtime, if that is installed, and compare: a decoder on
        two prompts and ten decoded tokens, anything else on batches of three and one. The model
        goes through `onnx.checker` in any case.
    external_data
        Whether weights go to a file of their own; by default they do where one file cannot hold
        them (2 GB).
    overwrite
        Whether an existing file may be replaced.
    progress
        Whether to show a progress bar, or what makes one.

    Returns
    -------
    OnnxReport
        What was written and how exact it is.

    Raises
    ------
    BackendError
        When an operator has no ONNX counterpart, a check fails, or ONNX Runtime's outputs differ
        by more than 1e-4. No file is left then.
    OutputError
        When `path` exists or cannot be written.
    UsageError
        When `opset` is below 18.
    """
    if opset < 18:
        raise UsageError(f"opset {opset} is below 18, the first that can be written")
    if any(weight.is_meta for weight in program.weights.values()):
        raise BackendError(
            "the program's weights are on the meta device: there is nothing to write"
        )
    start = time.perf_counter()
    names = dimension_names(program)
    show = maker() if progress is True else (progress or None)
    stages = 3 if check else 2
    with staged_file(path, overwrite=overwrite) as staged, counted(show, "ONNX", stages) as advance:
        model = convert(program, opset)
        simplify(model, set(program.weights))
        apply_names(model, names)
        advance(1)
        _save(model, staged, external_data)
        _check(staged)
        advance(1)
        ran = ort.compare(program, staged, names) if check else ort.Comparison(None, None)
        size = sum(entry.stat().st_size for entry in staged.parent.iterdir())
    return OnnxReport(
        path=str(path),
        bytes=size,
        opset=model.opset_imports.get("", opset),
        nodes=sum(1 for _ in model.graph),
        max_relative_error=ran.max_relative_error,
        seconds=time.perf_counter() - start,
        onnxruntime=ran.version,
        notes=(*program.notes, *ran.notes),
    )


def _save(model: onnx_ir.Model, path: Path, external_data: bool | None) -> None:
    import onnx_ir

    held = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in held if tensor is not None)
    if external_data is False and size > _LARGEST:
        raise BackendError(f"{size / 1e9:.1f} GB of weights need external data: a file holds 2 GB")
    external = size > _LARGEST if external_data is None else external_data
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # its exceptions share no base but Exception
        raise BackendError(f"onnx.checker refuses the model: {ort.first_line(error)}") from error
