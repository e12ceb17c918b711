"""Check that matrices have the zeros that an n:m pattern promises."""

from __future__ import annotations

from collections.abc import Mapping

from graphprune.analysis.matrices import contractions
from graphprune.ir.program import Program


def broken_patterns(program: Program, patterns: Mapping[str, str]) -> list[str]:
    """Return those weights of `patterns` (weight -> "n:m") of which more than n of m are not zero.

    What counts is every run of m neighbors along the axis that a matrix sums over.
    """
    if not patterns:
        return []
    found = dict.fromkeys(name for name in patterns if name not in program.weights)
    for matrix in contractions(program).matrices:
        if matrix.weight in patterns:
            kept, of = map(int, patterns[matrix.weight].split(":"))
            rows = matrix.read(program.weights[matrix.weight])
            if rows.shape[-1] % of or bool(
                ((rows.unflatten(-1, (-1, of)) != 0).sum(-1) > kept).any()
            ):
                found[matrix.weight] = None
    return list(found)
