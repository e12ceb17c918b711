"""Verification: a rewritten program must equal the original with its removed slices zeroed.

The change of shape must be exact, whatever the edit before it did to quality. What the program is
compared with is in `graphprune.verification.masked_reference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import VerificationError
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.program import PRESENT, Program, caches_of
from graphprune.ir.sample_inputs import continuation, random_inputs
from graphprune.plan.plan import Plan
from graphprune.verification.masked_reference import MaskedReference


@dataclass(frozen=True)
class VerifyReport:
    """How far apart was what was compared.

    Parameters
    ----------
    max_relative_error
        Largest absolute difference of any output, over the largest absolute value of that output.
    max_weight_error
        The same over the weights of the program and those that the plan's index maps leave.
    tolerance
        What was allowed.
    outputs
        Error of each output.
    runs
        What was run, for people.
    """

    max_relative_error: float
    max_weight_error: float
    tolerance: float
    outputs: Mapping[str, float]
    runs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"max relative error {self.max_relative_error:.1e} "
            f"(tolerance {self.tolerance:.0e}; {', '.join(self.runs)})"
        )


def verify(
    original: Program,
    plan: Plan,
    program: Program,
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> VerifyReport:
    """Check that `program` is what `plan` makes of `original`.

    Parameters
    ----------
    original
        The program that the plan was made for, with its weights.
    plan
        What was removed and merged.
    program
        The rewritten program.
    tolerance
        Largest relative error allowed; by default 1e-4 in float32, and wider in half precision.
    seed
        Seed of the random inputs.

    Raises
    ------
    PlanError
        When the plan was made for another program.
    VerificationError
        Past tolerance, naming the output or weight and the error; also for other shapes, and for
        values that are not finite.
    """
    plan.check(original)
    allowed = tolerance_of(_dtype(original)) if tolerance is None else tolerance
    reference = MaskedReference(original, plan)
    weights = {
        name: _error(weight, program.weights.get(name), name)
        for name, weight in reference.narrow.items()
    }
    if left := sorted(reference.gone.intersection(program.weights)):
        raise VerificationError(f"weight {left[0]} is still there, and should have gone")
    outputs: dict[str, float] = {}
    runs = []
    wide, narrow = _Session(reference), _Session(program)
    for run, inputs in _runs(original, seed):
        runs.append(run)
        try:
            got = narrow(inputs)
        except Exception as error:  # a wrong graph may fail in any way
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise VerificationError(f"the program does not run: {first}") from error
        for name, expected in wide(inputs).items():
            outputs[name] = max(outputs.get(name, 0.0), _error(expected, got.get(name), name))
    for errors, kind in ((weights, "weight"), (outputs, "output")):
        worst = max(errors, key=errors.__getitem__, default=None)
        if worst is not None and not errors[worst] <= allowed:
            raise VerificationError(
                f"{kind} {worst} is {errors[worst]:.1e} (relative) away from the masked original, "
                f"past the tolerance of {allowed:.0e}"
            )
    return VerifyReport(
        max(outputs.values(), default=0.0),
        max(weights.values(), default=0.0),
        allowed,
        outputs,
        tuple(runs),
    )


def _dtype(program: Program) -> torch.dtype:
    kinds = program.kinds
    return next(w.dtype for name, w in program.weights.items() if kinds[name] == "parameter")


def _runs(program: Program, seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    inputs = random_inputs(program, seed=seed)
    yield "full pass", inputs
    if program.is_decoder:
        yield "one more token on the cache", continuation(program, inputs, seed=seed + 1)


@dataclass
class _Session:
    """Runs a program step by step on its own KV cache; returns the other outputs."""

    call: Any
    cache: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.call(**inputs, **self.cache)
        self.cache = caches_of(outputs)
        return {k: v for k, v in outputs.items() if not k.startswith(PRESENT)}


def _error(expected: Tensor, found: Tensor | None, name: str) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    if found is None or found.shape != expected.shape:
        shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
        raise VerificationError(f"{name} is {shape}, not of shape {tuple(expected.shape)}")
    if not bool(torch.isfinite(expected).all()) or not bool(torch.isfinite(found).all()):
        raise VerificationError(f"{name} holds values that are not finite")
    return relative_error(expected, found)
