"""Record what passes did to values, so that the plan of a run can bring it along."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graphprune.plan.edits import Edit, Edits

if TYPE_CHECKING:
    from graphprune.ir.program import Program
    from graphprune.plan.plan import Plan


def edit_of(
    by: str,
    after: Program,
    bases: Sequence[Program],
    patterns: Mapping[str, str],
    *,
    resized: bool,
) -> Edit:
    """Return what a pass did to values: the weights that may have others, before any step of it.

    Parameters
    ----------
    by
        The pass, as a pipeline writes it.
    after
        The program with its edits.
    bases
        The programs that it may have edited, the likeliest first.
    patterns
        The zeros that it promises.
    resized
        Whether sizes have changed as well from the first of `bases` to `after`.
    """
    old = next((base for base in bases if base.graph_module is after.graph_module), None)
    known = (old or bases[0]).weights
    names = [name for name, weight in after.weights.items() if known.get(name) is not weight]
    return Edit(by, tuple(names), dict(patterns), old is None and not resized)


def with_edits(original: Program, plan: Plan, program: Program, made: Sequence[Edit]) -> Plan:
    """Return `plan` with those edits that `program` shows beside what its steps leave.

    Parameters
    ----------
    original
        The program that the plan starts from.
    plan
        The steps that led to `program`.
    program
        What came out.
    made
        What passes did to values on the way.
    """
    if not made:
        return plan
    if any(edit.graph for edit in made):
        return dataclasses.replace(plan, edits=Edits(tuple(made)))
    import torch

    from graphprune.verification.narrow_weights import NarrowWeights
    from graphprune.verification.patterns import broken_patterns

    names = {name for edit in made for name in edit.weights if name in program.weights}
    left = NarrowWeights(original.weights, plan, names).values
    values = {
        name: program.weights[name]
        for name in sorted(names)
        if not torch.equal(left[name].to(program.weights[name]), program.weights[name])
    }
    promised = {name: each for edit in made for name, each in edit.patterns.items()}
    broken = set(broken_patterns(program, promised))
    told = [
        dataclasses.replace(
            edit,
            weights=tuple(name for name in edit.weights if name in values),
            patterns={n: each for n, each in edit.patterns.items() if n in values.keys() - broken},
        )
        for edit in made
    ]
    told = [edit for edit in told if edit.weights]
    return dataclasses.replace(plan, edits=Edits(tuple(told), values=values)) if told else plan
