"""Verification: a rewritten program must equal the original with its removed slices zeroed.

The change of shape must be exact, whatever edits of values did to quality. What the program is
compared with is in `graphprune.verification.masked_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.inference import infer
from graphprune.analysis.types import Types
from graphprune.errors import PROGRAMS, VerificationError, first_line, refuse_other
from graphprune.ir.aten import random_nodes
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.program import PRESENT, Program, caches_of
from graphprune.ir.provenance import whereabouts
from graphprune.ir.sample_inputs import continuation, random_inputs
from graphprune.plan.plan import Plan
from graphprune.verification.draws import Draws, is_repeatable
from graphprune.verification.kept_norms import narrow_weights
from graphprune.verification.masked_reference import MaskedReference
from graphprune.verification.narrow_weights import NarrowWeights
from graphprune.verification.patterns import broken_patterns
from graphprune.verification.walks import Walk, side_by_side
from graphprune.weights.deferred import later, made


@dataclass(frozen=True)
class VerifyReport:
    """The differences that a verification found, and what they prove.

    Parameters
    ----------
    max_relative_error
        Largest absolute difference of any output, over the largest absolute value of that output.
    max_weight_error
        The same over the weights of the program and those that the plan leaves.
    tolerance
        What was allowed.
    outputs
        Error of each output.
    runs
        What was run, for people.
    moved
        How far outputs move, relative, when what goes or merges has other values; at most 1.
    edited
        Each pass that gave weights other values on purpose -> how many. What is compared with has
        these values too, as the plan brings them along.
    patterns
        How many weights were found to have the zeros of the n:m pattern that a pass promised.
    """

    max_relative_error: float
    max_weight_error: float
    tolerance: float
    outputs: Mapping[str, float]
    runs: tuple[str, ...]
    moved: float = 1.0
    edited: Mapping[str, int] = field(default_factory=dict)
    patterns: int = 0

    @property
    def proves_sizes(self) -> bool:
        """Return whether outputs depend on what goes, so that their agreement says something."""
        return self.moved > self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self) | {"proves_sizes": self.proves_sizes}

    def __str__(self) -> str:
        text = (
            f"max relative error {self.max_relative_error:.1e} "
            f"(tolerance {self.tolerance:.0e}; {', '.join(self.runs)})"
        )
        return "\n".join([text, *self.remarks()])

    def remarks(self) -> list[str]:
        """Return what else there is to say, a line each."""
        lines = [
            f"{by} gave {count} weights other values; they are as the plan brings them along"
            for by, count in self.edited.items()
        ]
        if self.patterns:
            lines.append(f"{self.patterns} weights have the zeros that their pattern promises")
        if not self.proves_sizes:
            lines.append(
                "this proves nothing of the change of sizes: the outputs do not move when what "
                "goes or merges has other values"
            )
        return lines


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
        What was removed and merged, and which weights were given other values.
    program
        The rewritten program.
    tolerance
        Largest relative error allowed; by default 1e-4 in float32, and wider in half precision.
    seed
        Seed of the random inputs.

    Raises
    ------
    PlanError
        When the plan was made for another program, or the values of edited weights are not at
        hand.
    VerificationError
        Past tolerance, naming the output or weight and the error; also for other shapes, for
        values that are not finite, zeros that a pattern promised and that are not there, and draws
        that cannot be the same on both sides; and where there are no weights to run on.
    """
    for each in (original, program):
        refuse_other(each, than=Program, how=PROGRAMS)
    if original.lacks_values or program.lacks_values or original.stand_ins or program.stand_ins:
        raise VerificationError(
            "the program has no weights, or no dynamic sizes, so that nothing can be run: "
            "load them, and verify there"
        )
    plan.check(original)
    allowed = tolerance_of(_dtype(original)) if tolerance is None else tolerance
    types = infer(original)
    expected = _expected(original, plan, program, types)
    weights = {
        name: _error(weight, program.weights.get(name), name)
        for name, weight in expected.values.items()
    }
    unread = {n for n, node in program.weight_nodes() if not node.users}
    made = {n for n in unread if program.kinds[n] == "derived"}  # of a config, whatever is left
    if left := sorted(expected.gone.intersection(program.weights) - made):
        raise VerificationError(f"weight {left[0]} is still there, and should have gone")
    patterns = _check_patterns(plan, program)
    reference = MaskedReference(original, plan, types, expected)
    _check_draws(plan, original, program)
    outputs: dict[str, float] = {}
    runs: list[str] = []
    moved = 0.0
    layer = ""
    caches: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for run, tries in _runs(original, seed):
        draws, wide, narrow, differs = _first_finite(reference, program, tries, caches, allowed)
        layer = layer or differs
        if not runs:
            moved = _moved(reference, wide, draws, seed)
        runs.append(run)
        caches = caches_of(wide.outputs), caches_of(narrow.outputs)
        for name, output in wide.outputs.items():
            if not name.startswith(PRESENT):
                error = _error(output, narrow.outputs.get(name), name)
                outputs[name] = max(outputs.get(name, 0.0), error)
    for errors, kind in ((weights, "weight"), (outputs, "output")):
        worst = max(errors, key=errors.__getitem__, default=None)
        if worst is not None and not errors[worst] <= allowed:
            raise VerificationError(
                f"{kind} {worst} is {errors[worst]:.1e} (relative) away from the masked original, "
                f"past the tolerance of {allowed:.0e}"
                + (f"; the first layer that differs is {layer}" if layer else "")
            )
    return VerifyReport(
        max(outputs.values(), default=0.0),
        max(weights.values(), default=0.0),
        allowed,
        outputs,
        tuple(runs),
        moved,
        {edit.by: len(edit.weights) for edit in plan.edits.made} if plan.edits else {},
        patterns,
    )


def _expected(original: Program, plan: Plan, program: Program, types: Types) -> NarrowWeights:
    """Return the weights that `program` must hold, rounded as it was stored."""
    found = narrow_weights(original, plan, types)
    for name, value in (plan.edits.read() if plan.edits else {}).items():
        left = found.values.get(name)
        if left is None or left.shape != value.shape:
            raise VerificationError(f"the plan edits {name}, which its steps leave otherwise")
        found.values[name] = value.to(left)
    stored = program.source.stored_dtype if program.source else None
    for name, value in found.values.items() if stored else ():
        if name in program.weights and _is_rounded(program.weights[name], stored):
            found.values[name] = later(lambda old: old.to(stored).to(old.dtype), value)
    return found


def _is_rounded(weight: Tensor, stored: torch.dtype | None) -> bool:
    """Tell whether a weight was read from a file of the narrower type `stored`."""
    if stored is None or not weight.is_floating_point() or weight.dtype.itemsize <= stored.itemsize:
        return False
    return torch.equal(weight.to(stored).to(weight.dtype), weight)


def _check_patterns(plan: Plan, program: Program) -> int:
    patterns = (
        {n: p for edit in plan.edits.made for n, p in edit.patterns.items()} if plan.edits else {}
    )
    if broken := broken_patterns(program, patterns):
        name = broken[0]
        raise VerificationError(f"{name} has not the zeros of its pattern {patterns[name]}")
    return len(patterns)


def _check_draws(plan: Plan, original: Program, program: Program) -> None:
    """Refuse random draws that cannot be the same on both sides."""
    ours, theirs = random_nodes(original.graph), random_nodes(program.graph)
    reordered = any(step.permutations for step in plan.steps)
    if ours and (reordered or [n.target for n in ours] != [n.target for n in theirs]):
        raise VerificationError(
            f"not comparable: {whereabouts(ours[0])} draws at random, and the plan changes which "
            "draws there are or their order"
        )
    for ours_node, theirs_node in zip(ours, theirs, strict=True):
        if not is_repeatable(ours_node) and _sizes(ours_node) != _sizes(theirs_node):
            raise VerificationError(
                f"not comparable: {whereabouts(ours_node)} draws at random, and cannot draw the "
                "same for the units that stay"
            )


def _sizes(node: fx.Node) -> list[int]:
    """Return the sizes of a tensor that are numbers."""
    value = node.meta.get("val")
    return [s for s in value.shape if isinstance(s, int)] if isinstance(value, Tensor) else []


def _moved(reference: MaskedReference, wide: Walk, draws: Draws, seed: int) -> float:
    """Return how far outputs of a run move when what goes or merges is random instead."""
    original, weights = reference.original, dict(reference.weights)
    for number, (name, weight) in enumerate(original.operands.items()):
        if original.kinds[name] == "constant" or not weight.is_floating_point():
            continue
        if not reference.narrow.is_told(name):
            change = _redrawn(reference.narrow, name, weight, seed + number)
            weights[name] = later(change, weights[name])
    found = Walk(original, wide.inputs, weights, Draws(draws.again).compute).to_end()
    apart = (
        relative_error(output, found[name])
        for name, output in wide.outputs.items()
        if not name.startswith(PRESENT)
    )
    return min(max(apart, default=0.0), 1.0)


def _redrawn(
    narrow: NarrowWeights, name: str, weight: Tensor, seed: int
) -> Callable[[Tensor], Tensor]:
    """Return what puts numbers like those of `weight` where no later weight holds any."""

    def changed(zeroed: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        scale = float(weight.float().std(correction=0)) or 1.0
        noise = torch.randn(zeroed.shape, generator=generator) * scale
        return torch.where(narrow.untold(name).to(zeroed.device), noise.to(zeroed), zeroed)

    return changed


def _dtype(program: Program) -> torch.dtype:
    kinds = program.kinds
    return next(of for name, of in program.compute_types.items() if kinds[name] == "parameter")


def _runs(program: Program, seed: int) -> Iterator[tuple[str, Iterator[dict[str, Tensor]]]]:
    """Yield each run, with inputs to try in turn."""
    yield "full pass", _tries(program, seed)
    if program.is_decoder:
        inputs = random_inputs(program, seed=seed)
        yield "one more token on the cache", iter([continuation(program, inputs, seed=seed + 1)])


def _tries(program: Program, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield random inputs, then such as roots take, and lengths and offsets."""
    yield random_inputs(program, seed=seed)
    for integers in ("one", "zero"):
        inputs = random_inputs(program, seed=seed, integers=integers)
        yield {name: x.abs() if x.is_floating_point() else x for name, x in inputs.items()}


def _first_finite(
    reference: MaskedReference,
    program: Program,
    tries: Iterator[Mapping[str, Tensor]],
    caches: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    allowed: float,
) -> tuple[Draws, Walk, Walk, str]:
    """Return the runs on the first inputs that give numbers alone, else on the last that ran.

    Raises
    ------
    VerificationError
        When the original runs on none.
    """
    walked, refused = None, None
    for inputs in tries:
        try:
            walked = _walked(reference, program, inputs, caches, allowed)
        except Exception as error:  # operators refuse values in any way
            if not _refuses(reference.original, {**inputs, **caches[0]}):
                raise
            refused = error
            continue
        if all(map(_is_finite, walked[1].outputs.values())):
            break
    if walked is None:
        raise VerificationError(
            "the original takes no inputs drawn at random, so that there is nothing to compare on: "
            f"{first_line(refused, typed=True) if refused else ''}"
        ) from refused
    return walked


def _refuses(program: Program, inputs: Mapping[str, Tensor]) -> bool:
    try:
        Walk(program, inputs).to_end()
    except Exception:  # noqa: BLE001 - as above
        return True
    return False


def _walked(
    reference: MaskedReference,
    program: Program,
    inputs: Mapping[str, Tensor],
    caches: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    allowed: float,
) -> tuple[Draws, Walk, Walk, str]:
    """Run both, each on its cache; return what they drew, the runs, and which layer differs."""
    draws = Draws()
    narrowed = Draws(reference.narrowed(draws)).compute
    computing = reference.computing(draws)
    wide = Walk(reference.original, {**inputs, **caches[0]}, reference.weights, computing)
    narrow = Walk(program, {**inputs, **caches[1]}, compute=narrowed)
    return draws, wide, narrow, side_by_side(wide, narrow, allowed)


def _is_finite(output: Tensor) -> bool:
    return bool(torch.isfinite(output).all())


def _error(expected: Tensor, found: Tensor | None, name: str) -> float:
    """Return the largest absolute difference over the largest absolute value expected."""
    expected, found = made(expected), made(found)
    if found is None or found.shape != expected.shape:
        shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
        raise VerificationError(f"{name} is {shape}, not of shape {tuple(expected.shape)}")
    if not _is_finite(expected) or not _is_finite(found):
        raise VerificationError(f"{name} holds values that are not finite")
    return relative_error(expected, found)
