"""Write an encoder-decoder as one ONNX model for each part, and prove them again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphprune.backends.onnx.dimension_names import dimension_names
from graphprune.backends.onnx.encoder_decoder.parts import FILES, Layout, Parts, Role, split
from graphprune.backends.onnx.encoder_decoder.proof import check_parts
from graphprune.backends.onnx.export import OnnxReport, export
from graphprune.backends.onnx.parity import Parity, compare
from graphprune.ir.program import Program

CACHED = "token by token"
"""The check of the parts against the call that they were cut from."""


def write_parts(
    parts: Parts, folder: Path, proven: float, *, check: bool, **options: Any
) -> OnnxReport:
    """Write parts into `folder`; the report is of all of them together.

    Parameters
    ----------
    parts
        The parts of a program.
    folder
        Where the models go, under the names of the layout.
    proven
        How far the parts are from the program: what `check_parts` found.
    check
        Whether each model is run beside its part.
    options
        As for `export`.

    Raises
    ------
    BackendError
        As `export` does.
    """
    reports = {
        role: export(part, folder / FILES[parts.layout][role], check=check, **options)
        for role, part in parts.programs.items()
    }
    last = reports["next"]
    counted = sum((Counter(each.operators) for each in reports.values()), Counter[str]())
    return dataclasses.replace(
        last,
        path=str(folder),
        bytes=sum(each.bytes for each in reports.values()),
        nodes=sum(each.nodes for each in reports.values()),
        max_relative_error=_worst(proven, [each.max_relative_error for each in reports.values()]),
        seconds=sum(each.seconds for each in reports.values()),
        notes=tuple(dict.fromkeys(note for each in reports.values() for note in each.notes)),
        attention={k: v for each in reports.values() for k, v in each.attention.items()},
        operators=dict(sorted(counted.items())),
        parity={CACHED: proven} | _by_role({role: each.parity for role, each in reports.items()}),
    )


def verify_parts(
    program: Program, layout: Layout, files: Mapping[Role, str], folder: Path, provider: str
) -> Parity:
    """Prove the models of a package's parts against its program.

    Raises
    ------
    BackendError
        When ONNX Runtime cannot load a model, or does not run it on `provider`.
    ParityError
        Past tolerance, naming the check and the output.
    """
    parts = split(program, layout)
    proven = check_parts(program, parts)
    ran = {
        role: compare(part, folder / files[role], dimension_names(part), provider=provider)
        for role, part in parts.programs.items()
    }
    return dataclasses.replace(
        ran["next"],
        max_relative_error=_worst(proven, [each.max_relative_error for each in ran.values()]),
        notes=tuple(dict.fromkeys(note for each in ran.values() for note in each.notes)),
        errors={CACHED: proven} | _by_role({role: each.errors for role, each in ran.items()}),
    )


def _worst(proven: float, errors: Sequence[float | None]) -> float | None:
    """Return the largest error of all; None where a model was not run."""
    ran = [error for error in errors if error is not None]
    return max(proven, *ran) if len(ran) == len(errors) else None


def _by_role(errors: Mapping[Role, Mapping[str, float]]) -> dict[str, float]:
    return {
        f"{role}: {check}": error for role, each in errors.items() for check, error in each.items()
    }
