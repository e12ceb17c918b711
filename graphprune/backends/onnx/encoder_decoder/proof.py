"""The parts of an encoder-decoder, proven against the call that they were cut from."""

from __future__ import annotations

import torch

from graphprune.backends.onnx.dimension_names import dimension_names
from graphprune.backends.onnx.encoder_decoder.anatomy import TOKENS
from graphprune.backends.onnx.encoder_decoder.decoding import Decoding, part_of_program
from graphprune.backends.onnx.encoder_decoder.parts import Layout, Parts, has_parts, split
from graphprune.errors import BackendError, ParityError
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.program import Program
from graphprune.ir.sample_inputs import random_inputs

_STEPS = (2, 1, 3, 1)
"""Tokens that are taken at once, one time after the other."""


def proven_parts(
    program: Program, layout: Layout | None
) -> tuple[Parts | None, float, tuple[str, ...]]:
    """Return the parts of an encoder-decoder and what `check_parts` finds of them.

    They are run beside the call whether models are to be checked or not: a decoder that counts
    places by what tokens are can be cut, and gives something else then. Where there are no parts,
    or they are not right, there is None, and what is to be said of that.

    Parameters
    ----------
    program
        Any program.
    layout
        The layout that they are to have.

    Raises
    ------
    BackendError
        When a layout was asked for and there are no parts, or they are not right.
    """
    if not has_parts(program, layout):
        return None, 0.0, ()
    try:
        parts = split(program, layout)
        return parts, check_parts(program, parts), ()
    except BackendError as error:
        if layout is not None:
            raise
        return None, 0.0, (f"one model that computes all tokens at once: {error}",)


def check_parts(program: Program, parts: Parts) -> float:
    """Run `parts` token by token and `program` at once; returns the largest relative error.

    Raises
    ------
    ParityError
        When they differ by more than the tolerance of their type, naming the token.
    """
    worst, length = 0.0, sum(_STEPS)
    names = dimension_names(program)
    tokens = next(value for value in program.inputs if value.name == TOKENS)
    symbol = str(tokens.shape[1])
    for rows in (3, 1):
        sizes = {s: rows for s, name in names.items() if name == "batch"} | {symbol: length}
        inputs = random_inputs(program, sizes, seed=rows, complete=True)
        for name, mask in inputs.items():
            if name.endswith("attention_mask") and rows > 1:
                mask[1, mask.shape[1] // 2 :] = 0
        whole = program(**inputs)[program.outputs[0].name]
        made = {role: part_of_program(part) for role, part in parts.programs.items()}
        decoding = Decoding.of_call(program, made, parts.layout, inputs)
        for start, end in _ranges():
            found = decoding.advance(inputs[TOKENS][:, start:end])
            error = relative_error(whole[:, start:end], found)
            worst = max(worst, error)
            if not error <= tolerance_of(found.dtype):
                raise ParityError(
                    f"its decoder gives other logits token by token than at once: token {start} "
                    f"differs by {error:.1e}"
                )
    return worst


def _ranges() -> list[tuple[int, int]]:
    ends = torch.tensor(_STEPS).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
