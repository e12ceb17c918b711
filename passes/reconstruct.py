"""Refit what consumed the units that were pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphprune.errors import UsageError
from graphprune.pipeline.pass_base import COUPLING, Baseline, Context, Outcome, Pass
from graphprune.transforms.apply import apply_plan

if TYPE_CHECKING:
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Refit the weights that stay so that they make up for the units that went.

    Before
    ------
    ::

        down[64, 84]  the 84 columns that were left of 112, as they were

    After
    -----
    The same sizes; each output is the least squares estimate, from the 84 units that are left, of
    what it was with 112::

        down[64, 84]  refitted; its bias, where it has one, takes up the mean of what went

    Options
    -------
    damp
        What is added to the diagonal of the inputs' second moments, as a part of its mean. None:
        of 0.01 to 1 what predicts best on calibration data that a fit did not see.
    memory
        The most MiB that second moments may take at once; a layer that takes more is run several
        times.

    Requires
    --------
    Calibration data; passes before it that pruned, since the last one that edited values.

    Preserves
    ---------
    Nothing.

    Refuses
    -------
    Heads that were merged, and units whose removal is no zeroing of weights: the residual width,
    experts (`PlanError`); weights that are integers or not finite (`SelectionError`); a memory
    too small for one matrix (`CalibrationError`).

    Reference
    ---------
    Least squares of a layer's output on what is left of its input, as in channel pruning (He et al.
    1707.06168, equation 2), in closed form on second moments, layer after layer.

    Example
    -------
    >>> str(Reconstruct(damp=0.05))
    'reconstruct{damp=0.05}'
    """

    name: ClassVar[str] = "reconstruct"
    resizes: ClassVar[bool] = False

    damp: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp is not None and not self.damp > 0:
            raise UsageError(f"reconstruct: damp {self.damp:g} is not positive")
        if self.memory is not None and not self.memory > 0:
            raise UsageError(f"reconstruct: memory {self.memory:g} is not positive")

    @property
    def requires_calibration(self) -> bool:
        """Always."""
        return True

    def calibration_tokens(self, program: Program) -> int:
        """Return what least squares need."""
        from graphprune.calibration.statistics import tokens_for_gram

        return tokens_for_gram(program)

    def run(self, program: Program, context: Context) -> Outcome:
        """Refit the program before the cuts, then cut it."""
        from graphprune.transforms.refit import refit

        before, plan = context.since_baseline()
        if not plan:
            return Outcome(program, details={"note": "nothing was pruned before: nothing to refit"})
        assert context.calibration is not None, "the pass manager has asked for it"
        coupling = COUPLING.compute(before)
        fitted, names, layerwise = refit(
            before,
            coupling,
            plan,
            context.calibration,
            damp=self.damp,
            track=context.track,
            memory=None if self.memory is None else int(self.memory * 2**20),
        )
        details = {
            "refitted": names,
            "calibration bytes": layerwise.peak_bytes,
            "statistics bytes": layerwise.statistics_bytes,
        }
        steps = context.baseline.steps if context.baseline else 0
        smaller, baseline = apply_plan(fitted, plan), Baseline(fitted, steps)
        return Outcome(smaller, None, details, edited=True, baseline=baseline)
