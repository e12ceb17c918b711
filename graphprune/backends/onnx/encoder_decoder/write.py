"""Write an encoder-decoder as one ONNX model for each part, and prove them again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.backends.onnx.dimension_names import dimension_names
from graphprune.backends.onnx.encoder_decoder.anatomy import TOKENS
from graphprune.backends.onnx.encoder_decoder.decoding import Decoding, part_of_model
from graphprune.backends.onnx.encoder_decoder.parts import FILES, Layout, Parts, Role, split
from graphprune.backends.onnx.encoder_decoder.proof import check_parts
from graphprune.backends.onnx.export import OnnxReport, export
from graphprune.backends.onnx.parity import Parity, compare
from graphprune.backends.onnx.quality import Batch, Run
from graphprune.backends.onnx.session import CPU
from graphprune.backends.onnx.weights.one_file import in_one_file
from graphprune.backends.onnx.weights.quantize import Bits, Quantization
from graphprune.backends.onnx.weights.widths import kinds_of
from graphprune.errors import UsageError
from graphprune.ir.program import Program

CACHED = "token by token"
"""The check of the parts against the call that they were cut from."""


def write_parts(
    program: Program,
    parts: Parts,
    folder: Path,
    proven: float,
    *,
    check: bool,
    quantization: Quantization | None = None,
    **options: Any,
) -> OnnxReport:
    """Write parts into `folder`; the report is of all of them together.

    Parameters
    ----------
    program
        The program of one call.
    parts
        Its parts.
    folder
        Where the models go, under the names of the layout.
    proven
        How far the parts are from the program: what `check_parts` found.
    check
        Whether each model is run beside its part.
    quantization
        How weights are quantized: each becomes the same in all parts.
    options
        As for `export`; weights always go to a file of their own, which the models share.

    Raises
    ------
    BackendError
        As `export` does.
    UsageError
        As `export` does, and for external_data=False.
    """
    if options.get("external_data") is False:
        raise UsageError(
            "external_data=False: the models of an encoder-decoder share their weights"
        )
    kinds = kinds_of(program, quantization) if quantization is not None else {}
    reports = {
        role: export(
            part,
            folder / FILES[parts.layout][role],
            check=check,
            quantization=_of_part(part, quantization, kinds),
            **{**options, "external_data": True},
        )
        for role, part in parts.programs.items()
    }
    in_one_file([folder / file for file in FILES[parts.layout].values()])
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
        quantized={k: v for each in reports.values() for k, v in each.quantized.items()},
    )


def _of_part(
    part: Program, chosen: Quantization | None, kinds: Mapping[str, Bits]
) -> Quantization | None:
    """Return how the weights of a part are quantized; None where none of them is."""
    if chosen is None or all(kinds[name] == "float" for name in part.weights):
        return None
    return dataclasses.replace(chosen, named=kinds)


def verify_parts(
    program: Program,
    layout: Layout,
    files: Mapping[Role, str],
    folder: Path,
    provider: str,
    *,
    quantized: bool,
) -> Parity:
    """Prove the models of a package's parts against its program, which has their values.

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
        role: compare(
            part,
            folder / files[role],
            dimension_names(part),
            provider=provider,
            quantized=quantized,
        )
        for role, part in parts.programs.items()
    }
    return dataclasses.replace(
        ran["next"],
        max_relative_error=_worst(proven, [each.max_relative_error for each in ran.values()]),
        notes=tuple(dict.fromkeys(note for each in ran.values() for note in each.notes)),
        errors={CACHED: proven} | _by_role({role: each.errors for role, each in ran.items()}),
    )


def parts_run(
    program: Program,
    layout: Layout,
    files: Mapping[Role, str],
    folder: Path,
    provider: str = CPU,
) -> Run:
    """Return what runs the models of parts as one call of `program`: the first token, then others.

    They are loaded when they are run.
    """
    made = cache(lambda: {r: part_of_model(folder / file, provider) for r, file in files.items()})

    def run(inputs: Batch) -> Tensor:
        decoding, tokens = Decoding.of_call(program, made(), layout, inputs), inputs[TOKENS]
        rest = [tokens[:, 1:]] if tokens.shape[1] > 1 else []
        return torch.cat([decoding.advance(each) for each in (tokens[:, :1], *rest)], 1)

    return run


def _worst(proven: float, errors: Sequence[float | None]) -> float | None:
    """Return the largest error of all; None where a model was not run."""
    ran = [error for error in errors if error is not None]
    return max(proven, *ran) if len(ran) == len(errors) else None


def _by_role(errors: Mapping[Role, Mapping[str, float]]) -> dict[str, float]:
    return {
        f"{role}: {check}": error for role, each in errors.items() for check, error in each.items()
    }
