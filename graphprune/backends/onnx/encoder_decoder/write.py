"""Write an encoder-decoder as one ONNX model for each part, and prove them again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
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
    program: Program, parts: Parts, folder: Path, *, check: bool, **options: Any
) -> OnnxReport:
    """Write the parts of `program` into `folder`; the report is of all of them together.

    Parameters
    ----------
    program
        The program.
    parts
        Its parts.
    folder
        Where the models go, under the names of the layout.
    check
        Whether the parts are run beside the program, and each model beside its part.
    options
        As for `export`.

    Raises
    ------
    BackendError
        As `export` does, and when the parts give something else than the program.
    """
    parity = {CACHED: check_parts(program, parts)} if check else {}
    reports = {
        role: export(part, folder / FILES[parts.layout][role], check=check, **options)
        for role, part in parts.programs.items()
    }
    errors = [*parity.values(), *(each.max_relative_error for each in reports.values())]
    last = reports["next"]
    counted = sum((Counter(each.operators) for each in reports.values()), Counter[str]())
    return dataclasses.replace(
        last,
        path=str(folder),
        bytes=sum(each.bytes for each in reports.values()),
        nodes=sum(each.nodes for each in reports.values()),
        max_relative_error=max((each for each in errors if each is not None), default=None),
        seconds=sum(each.seconds for each in reports.values()),
        notes=tuple(dict.fromkeys(note for each in reports.values() for note in each.notes)),
        attention={k: v for each in reports.values() for k, v in each.attention.items()},
        operators=dict(sorted(counted.items())),
        parity=parity | _by_role({role: each.parity for role, each in reports.items()}),
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
    errors = {CACHED: check_parts(program, parts)}
    ran = {
        role: compare(part, folder / files[role], dimension_names(part), provider=provider)
        for role, part in parts.programs.items()
    }
    found = [each.max_relative_error for each in ran.values()]
    run = [error for error in found if error is not None]
    worst = max(*errors.values(), *run) if len(run) == len(found) else None
    errors |= _by_role({role: each.errors for role, each in ran.items()})
    return dataclasses.replace(
        ran["next"],
        max_relative_error=worst,
        notes=tuple(dict.fromkeys(note for each in ran.values() for note in each.notes)),
        errors=errors,
    )


def _by_role(errors: Mapping[Role, Mapping[str, float]]) -> dict[str, float]:
    return {
        f"{role}: {check}": error for role, each in errors.items() for check, error in each.items()
    }
