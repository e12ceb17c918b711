"""Refit what consumed the units that were pruned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune.errors import UsageError
from graphprune.pipeline.pass_base import COUPLING, Baseline, Context, Outcome, Pass
from graphprune.transforms.apply import apply_plan, apply_step

if TYPE_CHECKING:
    from graphprune.ir.program import Program
    from graphprune.plan.plan import Plan
    from graphprune.transforms.joint.refit import Fitted
    from graphprune.transforms.refit import Refitted

ROUNDS = 2
"""How often what is behind merged heads is refitted, from the first layer to the last."""


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

    What the units that went reach, in this layer and in those behind it, is then fitted again:
    matrices within a layer towards what they gave, and the consumers that add to the residual
    stream half the way to the stream as it was, which makes up for earlier layers too.

    Where experts went, tokens are sent to others: the last matrices of those that stay are fitted
    together, so that the stream behind them comes near to what it was. Behind KV heads that were
    merged, all matrices that add to the stream are refitted so, and those within an MLP to give
    what they gave, twice from the first layer to the last.

    With ``method=gradient`` every residual branch (an attention or an MLP, with its norms and its
    nonlinearity) that lost something is then trained as a whole, one after the other, so that the
    stream after it comes near to what the original has there. That serves zeros of `sparsify`,
    which stay zero, and merged KV heads too.

    Options
    -------
    method
        What finds the weights: least-squares in closed form, matrix by matrix; gradient trains
        from there, and keeps of a branch what is better on calibration data held out from it.
    steps
        Of gradient: steps of the optimizer for each branch.
    lr
        Of gradient: the highest learning rate, as a part of each weight's root mean square.
    damp
        What is added to the diagonal of the inputs' second moments, as a part of its mean. None:
        of 0.01 to 1 what predicts best on calibration data that a fit did not see; of what is
        fitted again, six times its inputs over its tokens.
    onwards
        Whether what units that went reach is fitted again. It takes twice to three times as long as
        without, and edits of nearly all matrices instead of some.
    memory
        The most MiB that second moments may take at once; a layer that takes more is run several
        times.

    Requires
    --------
    Calibration data; passes before it that pruned, since the last one that edited values; for
    gradient, passes before it that changed anything.

    Preserves
    ---------
    Nothing.

    Refuses
    -------
    Branches that went after units did, and units whose removal is no zeroing of weights: the
    residual width (`PlanError`); experts whose outputs cannot be followed, weights that are
    integers or not finite (`SelectionError`); a memory too small for one matrix
    (`CalibrationError`); for gradient a single sample (`TrainingError`).

    Reference
    ---------
    Least squares of a layer's output on what is left of its input, as in channel pruning (He et al.
    1707.06168, equation 2), in closed form on second moments, layer after layer; of FFN units that
    is the Nyström approximation of MoDeGPT (2408.09632, section 3.2, type I). A target between what
    a matrix gives on its own inputs and what it gave on the original's: GPTAQ (Li et al.
    2504.02692), of rounding. Training each attention and MLP to its dense output: 2510.14444.

    Example
    -------
    >>> str(Reconstruct(damp=0.05))
    'reconstruct{damp=0.05}'
    """

    name: ClassVar[str] = "reconstruct"
    resizes: ClassVar[bool] = False

    method: Literal["least-squares", "gradient"] = "least-squares"
    steps: int = 60
    lr: float = 0.01
    damp: float | None = None
    onwards: bool = True
    memory: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("damp", "memory", "steps", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"reconstruct: {name} {value:g} is not positive")
        given = [name for name in ("steps", "lr") if name in self.values()]
        if given and self.method != "gradient":
            raise UsageError(f"reconstruct: {given[0]} is of method=gradient")

    @property
    def requires_calibration(self) -> bool:
        """Always."""
        return True

    def calibration_tokens(self, program: Program) -> int:
        """Return what least squares need, and twice that to train on."""
        from graphprune.calibration.statistics import tokens_for_gram

        return tokens_for_gram(program) * (2 if self.method == "gradient" else 1)

    def run(self, program: Program, context: Context) -> Outcome:
        """Refit the program before the cuts, then cut it; train what came of it."""
        before, plan = context.since_baseline()
        steps = context.baseline.steps if context.baseline else 0
        while plan.steps and plan.steps[0].branches:  # what went whole leaves nothing to refit
            before, steps = apply_step(before, plan.steps[0]), steps + 1
            plan = dataclasses.replace(plan, steps=plan.steps[1:])
        trains = self.method == "gradient"
        if not plan and not (trains and program is not context.original):
            return Outcome(program, details={"note": "nothing was pruned before: nothing to refit"})
        if not trains:
            smaller, baseline, details = self._refitted(before, plan, context)
            if not details["refitted"]:
                note = "no matrix behind the merged heads stands alone: nothing to refit"
                return Outcome(program, details={"note": note})
            baseline = Baseline(baseline.program, steps + baseline.steps)
            return Outcome(smaller, None, details, edited=True, baseline=baseline)
        details, start = {}, program
        if plan and not any(step.branches for step in plan.steps):
            smaller, _, details = self._refitted(before, plan, context)
            start = program.with_weights(smaller.weights)
        return self._trained(program, start, context, details)

    def _refitted(
        self, before: Program, plan: Plan, context: Context
    ) -> tuple[Program, Baseline, dict[str, Any]]:
        """Return the cut and refitted program, what its last steps start from, and details.

        Cuts and merges are refitted by turns, in the order of the plan.
        """
        smaller, baseline, done = before, Baseline(before, 0), 0
        details: dict[str, Any] = {"refitted": [], "calibration bytes": 0}
        errors: dict[str, tuple[float, float]] = {}
        found: Fitted | Refitted
        for merges, steps in itertools.groupby(plan.steps, lambda step: bool(step.merges)):
            part = dataclasses.replace(plan, steps=tuple(steps))
            if merges and not any(step.cuts for step in part.steps):
                found, first = self._merges_refitted(smaller, part, context)
                smaller, after = found.program, done + len(part.steps)
                baseline = Baseline(first, done) if first else Baseline(smaller, after)
            else:
                found = cut = self._cuts_refitted(smaller, part, context)
                smaller, baseline = apply_plan(cut.program, part), Baseline(cut.program, done)
                most = max(details.get("statistics bytes", 0), cut.statistics_bytes)
                details["statistics bytes"] = most
            done += len(part.steps)
            details["refitted"] += found.names
            details["calibration bytes"] = max(details["calibration bytes"], found.peak_bytes)
            errors |= found.errors
        if errors:
            details["held-out error"] = _rounded(errors)
        return smaller, baseline, details

    def _cuts_refitted(self, before: Program, plan: Plan, context: Context) -> Refitted:
        """Refit what consumed units that go, and experts that stay, at their first sizes."""
        from graphprune.transforms.refit import refit

        assert context.calibration is not None, "the pass manager has asked for it"
        return refit(
            before,
            COUPLING.compute(before),
            plan,
            context.calibration,
            damp=self.damp,
            onwards=self.onwards,
            track=context.track,
            memory=None if self.memory is None else int(self.memory * 2**20),
        )

    def _merges_refitted(
        self, before: Program, plan: Plan, context: Context
    ) -> tuple[Fitted, Program | None]:
        """Refit what is behind merged heads; return the result, and what gives it by the plan.

        The latter is None where the plan itself changes what was refitted, as it does where it
        brings heads into another order.
        """
        import torch

        from graphprune.transforms.joint.addends import behind_merges
        from graphprune.transforms.joint.refit import Fitted, refit_together
        from graphprune.verification.narrow_weights import NarrowWeights
        from graphprune.weights.deferred import made

        assert context.calibration is not None, "the pass manager has asked for it"
        merged = apply_plan(before, plan)
        original = context.original  # `before` may hold heads that were made equal for the merge
        behind = behind_merges(merged, plan, original)
        found = Fitted(merged, [], {}, 0)
        for _ in range(ROUNDS):
            again = refit_together(
                found.program,
                original,
                behind,
                context.calibration,
                damp=self.damp,
                track=context.track,
            )
            found = again.after(found)
        new = {name: found.program.weights[name] for each in behind for name in each.weights}
        fitted = before.with_weights(new)
        left = NarrowWeights(fitted.weights, plan, new).values
        same = all(torch.equal(made(left[name]), made(weight)) for name, weight in new.items())
        return found, fitted if same else None

    def _trained(
        self, program: Program, start: Program, context: Context, details: dict[str, Any]
    ) -> Outcome:
        """Train every branch from what least squares gave."""
        from graphprune.training.local import train_locally

        assert context.calibration is not None, "the pass manager has asked for it"
        trained = train_locally(
            start,
            context.original,
            context.calibration,
            steps=self.steps,
            lr=self.lr,
            seed=context.seed,
            track=context.track,
        )
        peak = max(details.get("calibration bytes", 0), trained.account.peak)
        details |= {
            "held-out error": details.get("held-out error", {}) | _rounded(trained.errors),
            "calibration bytes": peak,
        }
        if trained.shared:
            details["shared with other branches"] = trained.shared
        if start is program and not trained.weights:
            return Outcome(program, details=details)
        return Outcome(start.with_weights(trained.weights), None, details, edited=True)


def _rounded(errors: Mapping[str, tuple[float, float]]) -> dict[str, list[float]]:
    """Return errors before and after as they are reported."""
    return {name: [float(f"{each:.4g}") for each in pair] for name, pair in errors.items()}
