"""Runs passes in the order given, and checks what each of them claims."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphprune import ranks
from graphprune.errors import CalibrationError, GraphPruneError, PipelineError, add_context
from graphprune.pipeline.edits import edit_of
from graphprune.pipeline.instruments import Instrument, PassPosition
from graphprune.pipeline.pass_base import Baseline, Context, Outcome, Pass
from graphprune.pipeline.report import PassRecord, ProgramSize, Report

if TYPE_CHECKING:
    from graphprune.ir.program import Program
    from graphprune.plan.plan import Plan


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a pipeline: the last program, the whole plan, and the report."""

    program: Program
    plan: Plan
    report: Report

    def __repr__(self) -> str:
        return f"{self.program!r}\n{self.plan!r}\n{self.report!r}"

    def _repr_html_(self) -> str:
        """Show the passes as a table, in a notebook."""
        from html import escape

        from graphprune.report.notebook import html_table

        head, rows = self.report.rows()
        plan = f"<pre>{escape(repr(self.program))}\n{escape(repr(self.plan))}</pre>"
        return plan + html_table(head, rows)


@dataclass(frozen=True)
class PassManager:
    """A sequence of passes with the instruments that watch it.

    Parameters
    ----------
    passes
        Run in this order; none is added, moved or left out silently.
    instruments
        Told before and after each pass, in this order, and of an error.
    stop_after
        The bisect limit: run the first so many optional passes only. Passes that are `required`
        (those that check, print and write) run all the same, so that bisecting a pipeline still
        writes its result. None runs everything.
    audit
        Recompute every analysis that a pass says it preserves, and compare.
    """

    passes: tuple[Pass, ...]
    instruments: tuple[Instrument, ...] = ()
    stop_after: int | None = None
    audit: bool = False

    def run(self, context: Context) -> Result:
        """Run the passes on `context.original`, which is never changed.

        Raises
        ------
        GraphPruneError
            Of the class that the pass raised, its message preceded by the pass and its number;
            `PipelineError` for any other exception and for a pass that broke its promises.
        CalibrationError
            Before any work, when a pass needs calibration data and there is none.
        """
        chosen, skipped = self._limited()
        _refuse_uncalibrated(chosen, calibrated=context.calibration is not None)
        program, records = context.original, []
        _check_later(chosen, program, at_first=True)
        for index, position in enumerate(chosen):
            program, context, record = self._step(position, program, context)
            records.append(record)
            if position.pass_.resizes and not position.pass_.required:
                _check_later(chosen[index + 1 :], program)
        calibration = context.calibration
        report = Report(
            pipeline=",".join(map(str, self.passes)),
            before=ProgramSize.of(context.original),
            after=ProgramSize.of(program),
            passes=tuple(records),
            skipped=tuple(str(position.pass_) for position in skipped),
            seed=context.seed,
            calibration=None if calibration is None else calibration.describe(),
        )
        return Result(program, context.plan_of(program), report)

    def _limited(self) -> tuple[list[PassPosition], list[PassPosition]]:
        """Return the positions to run and those beyond the bisect limit."""
        chosen: list[PassPosition] = []
        skipped: list[PassPosition] = []
        optional = 0
        for number, pass_ in enumerate(self.passes, 1):
            optional += not pass_.required
            beyond = self.stop_after is not None and optional > self.stop_after
            position = PassPosition(number, pass_, self.passes)
            (skipped if beyond and not pass_.required else chosen).append(position)
        return chosen, skipped

    def _step(
        self, position: PassPosition, program: Program, context: Context
    ) -> tuple[Program, Context, PassRecord]:
        """Run one pass with its instruments; return what the next one needs, and the record."""
        pass_ = position.pass_
        # Whoever only watches, checks or writes does so in one process.
        instruments = self.instruments if ranks.is_first() else ()
        try:
            with ranks.alone():
                for instrument in instruments:
                    instrument.before_pass(position, program, context)
            used = _data_used(pass_, program, context)
            began = time.perf_counter()
            outcome = _run(pass_, program, context)
            seconds = time.perf_counter() - began
            check_claims(pass_, program, outcome)
            if outcome.plan is not None and ranks.size() > 1:
                ranks.agree(outcome.plan.to_json(), "the processes made different plans")
            if self.audit:
                audit_preserved(pass_, program, outcome.program, context)
            context.analyses.move(program, outcome.program, pass_.preserves)
            if outcome.edited:
                edit = edit_of(
                    str(pass_),
                    outcome.baseline.program if outcome.baseline else outcome.program,
                    (program, context.since_baseline()[0]),
                    outcome.patterns,
                    resized=outcome.baseline is None and bool(outcome.plan),
                )
                context = dataclasses.replace(context, edits=(*context.edits, edit))
            plan = context.plan_so_far
            if outcome.plan is not None:
                plan += outcome.plan
            if used is not None and outcome.program is not program:
                plan = dataclasses.replace(plan, calibration=used)
            context = dataclasses.replace(context, plan_so_far=plan)
            if outcome.edited:
                baseline = outcome.baseline or Baseline(outcome.program, len(plan.steps))
                context = dataclasses.replace(context, baseline=baseline)
            with ranks.alone():
                for instrument in instruments:
                    instrument.after_pass(position, outcome, context)
        except Exception as error:
            named = _named(error, position)
            for instrument in instruments:
                instrument.on_error(position, named)
            if named is error:
                raise
            raise named from error
        sizes = ProgramSize.of(program), ProgramSize.of(outcome.program)
        record = PassRecord(
            pass_.name,
            str(pass_),
            seconds,
            *sizes,
            dict(outcome.details),
            changed=outcome.program is not program,
            verified=outcome.verified,
        )
        return outcome.program, context, record


def _run(pass_: Pass, program: Program, context: Context) -> Outcome:
    """Run a pass; one that changes nothing is run by the first of several processes."""
    if not pass_.required:
        return pass_.run(program, context)
    if not ranks.is_first():
        return Outcome(program)
    with ranks.alone():
        return pass_.run(program, context)


def _data_used(pass_: Pass, program: Program, context: Context) -> Mapping[str, Any] | None:
    """Return how the calibration data was drawn that a pass is about to look at, if any."""
    if context.calibration is None:
        return None
    looks = pass_.requires_calibration or pass_.calibration_tokens(program)
    return context.calibration.describe() if looks else None


def check_claims(pass_: Pass, before: Program, outcome: Outcome) -> None:
    """Compare what a pass says it did with what it did.

    Raises
    ------
    PipelineError
        When the outcome is of the wrong type, its details are no JSON, its plan and the sizes
        disagree, or it says nothing of a change that it made.
    """
    if not isinstance(outcome, Outcome):
        raise PipelineError(f"run returned {type(outcome).__name__}, not an Outcome")
    after = outcome.program
    if not isinstance(after, type(before)):
        raise PipelineError(f"the new program is a {type(after).__name__}")
    try:
        json.dumps(dict(outcome.details))
    except (TypeError, ValueError) as error:
        raise PipelineError(f"the details cannot be written as JSON: {error}") from error
    resized = _resized(before, after)
    if resized and not pass_.resizes:
        raise PipelineError(f"it says that it changes no size, but {resized} has another")
    planned = outcome.plan is not None and bool(outcome.plan.steps)
    if resized and not planned:
        raise PipelineError(f"the size of {resized} has changed, but the plan is empty")
    if planned and not resized:
        raise PipelineError("the plan is not empty, but no weight has changed its size")
    if not planned and not outcome.edited and _differs(before, after):
        raise PipelineError("the program has changed, but there is no plan and edited is not set")


def audit_preserved(pass_: Pass, before: Program, after: Program, context: Context) -> None:
    """Recompute the analyses that `pass_` says it preserves from one program to the other.

    Raises
    ------
    PipelineError
        When an analysis of the new program differs from that of the old one.
    """
    for analysis in pass_.preserves if after is not before else ():
        kept = analysis.digest(context.analysis(analysis, before))
        if analysis.digest(analysis.compute(after)) != kept:
            raise PipelineError(f"it says that it preserves {analysis.name!r}, but does not")


def _refuse_uncalibrated(positions: list[PassPosition], calibrated: bool) -> None:
    """Ask every pass, so that options that only then turn out to make no sense are refused too."""
    for position in positions:
        if position.pass_.requires_calibration and not calibrated:
            raise CalibrationError(f"{position}: {uncalibrated(position.pass_)}")


def _check_later(
    positions: Sequence[PassPosition], program: Program, *, at_first: bool = False
) -> None:
    """Ask passes that are still to come for what they refuse, as long as sizes are settled.

    At first all are asked: what they refuse of any sizes is known then.
    """
    settled = True
    for position in positions:
        if not settled and not at_first:
            return
        try:
            position.pass_.refuse_early(program, settled=settled)
        except Exception as error:
            named = _named(error, position)
            if named is error:
                raise
            raise named from error
        settled &= position.pass_.required or not position.pass_.resizes


def uncalibrated(pass_: Pass) -> str:
    """Say that a pass lacks calibration data, and what to do about it."""
    instead = pass_.instead_of_calibration
    return (
        f"{pass_} needs calibration data; none was given: give --calibration FILE (in Python "
        "calibration=Calibration.from_text(...))"
        + (f", or {instead}, which needs none" if instead else "")
    )


def _resized(before: Program, after: Program) -> str:
    """Return the first weight whose shape differs between the two, or ""."""
    old = {name: tuple(weight.shape) for name, weight in before.weights.items()}
    new = {name: tuple(weight.shape) for name, weight in after.weights.items()}
    return next((name for name in {**old, **new} if old.get(name) != new.get(name)), "")


def _differs(before: Program, after: Program) -> bool:
    """Return whether graph or weights differ, for two programs of the same weight names."""
    if before is after:
        return False
    same = all(after.weights[name] is weight for name, weight in before.weights.items())
    return not same or before.fingerprint() != after.fingerprint()


def _named(error: Exception, position: PassPosition) -> Exception:
    """Put the pass in front of the error's message; a deliberate error keeps its class."""
    if not isinstance(error, GraphPruneError):
        return PipelineError(f"{position}: {type(error).__name__}: {error}")
    return add_context(error, str(position))
