"""Prune depth: remove whole blocks, or single branches of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune.errors import SelectionError
from graphprune.pipeline.pass_base import Baseline, Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class PruneDepth(Pass):
    """Remove the blocks, or the attention and MLP branches, that are missed least.

    Before
    ------
    ::

        x = x + attention(x);  x = x + mlp(x)     in each of four layers

    After
    -----
    With ``count=1`` three layers are left, three KV caches, and a config of three layers. With
    ``unit=branch`` one attention or MLP adds nothing any more, and is not there::

        x = x + mlp(x)                            in one of four layers

    Options
    -------
    ratio
        The part of the blocks (or branches) that goes, in [0, 1), rounded down.
    count
        How many go, in place of `ratio`.
    unit
        block: a numbered layer, with all branches in it and all else that it holds, so that a plain
        checkpoint with fewer layers can hold the result. branch: what is added to the residual
        stream, each by itself; an archive and ONNX hold that, and a Hugging Face directory with a
        modeling file (``trust_remote_code=True``).
    criterion
        loss: what the loss on calibration data grows by least, measured again after each that went.
        cosine: what turns the residual stream least, measured once.
    fold
        What takes over a linear part of what went, by least squares on the residual stream. linear:
        the last matrix of the branch before, such as a down projection; stream: that of every
        branch behind it as well. Sizes stay what they are without it. none: nothing.
    skip
        Globs over names of blocks, branches or weights that stay.

    Requires
    --------
    The coupling of the program; calibration data.

    Preserves
    ---------
    Nothing.

    Refuses
    -------
    A program without residual branches, or of which no whole block can go, such as one whose layers
    normalize the sums; more than can go: something has to be left in the KV cache, if there is one
    (`SelectionError`). With `fold`, what nothing precedes, or what follows a branch that
    normalizes the output of its last matrix, as Gemma 3 does (`PlanError`). An output whose loss
    cannot be measured (`CalibrationError`).

    Reference
    ---------
    The cosine: Men et al., ShortGPT, 2403.03853, equation 1. Greedily by loss: Zhong et al.,
    BlockPruner, 2406.10594, algorithm 1, there by perplexity. The fold: Shopkhoev et al.,
    ReplaceMe, 2505.02819, equation 6, here of the inputs of the last matrix in place of its
    outputs, and drawn towards what the matrix was.

    Example
    -------
    >>> str(PruneDepth(count=1, criterion="cosine"))
    'prune-depth{count=1 criterion=cosine}'
    """

    name: ClassVar[str] = "prune-depth"

    ratio: float | None = None
    count: int | None = None
    unit: Literal["block", "branch"] = "block"
    criterion: Literal["loss", "cosine"] = "loss"
    fold: Literal["none", "linear", "stream"] = "none"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.count is None):
            raise SelectionError("prune-depth: give one of ratio and count")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            percent = f"; {self.ratio:g} % is {self.ratio / 100:g}" if 1 < self.ratio < 100 else ""
            raise SelectionError(f"prune-depth: ratio {self.ratio:g} is not in [0, 1){percent}")
        if self.count is not None and self.count < 0:
            raise SelectionError(f"prune-depth: count {self.count} is negative")

    @property
    def requires_calibration(self) -> bool:
        """Always."""
        return True

    def calibration_tokens(self, program: Program) -> int:
        """Return what tells losses apart, or what least squares need."""
        from graphprune.calibration.statistics import tokens_for_gram
        from graphprune.selection.depth import TOKENS

        return max(TOKENS, tokens_for_gram(program)) if self.fold != "none" else TOKENS

    def run(self, program: Program, context: Context) -> Outcome:
        """Choose what goes, and remove it."""
        from graphprune.analysis.residual.branches import Branches
        from graphprune.plan.plan import Plan
        from graphprune.plan.steps import Step
        from graphprune.selection.depth import by_loss, by_turn, depth_units, names_of
        from graphprune.transforms.branches import remove_branches
        from graphprune.transforms.fold_branches import fold_branches

        assert context.calibration is not None, "the pass manager has asked for it"
        branches = Branches(context.coupling(program).types)
        units = depth_units(branches, self.unit, self.skip)
        count = self._count(len(units))
        if not count:
            return Outcome(program, details={"note": "a budget of 0: nothing goes"})
        context.calibration.check(program)
        details: dict[str, Any] = {}
        if self.criterion == "cosine":
            chosen = by_turn(branches, units, count, context.calibration)
        else:
            chosen, losses = by_loss(branches, units, count, context.calibration, context.track)
            details["loss, before and after each"] = [round(loss, 4) for loss in losses]
        records = branches.records(names_of(chosen))
        plan = Plan((Step(program.fingerprint(), branches=records),))
        details = {"removed": [unit.name for unit in chosen], **details}
        if self.fold == "none":
            return Outcome(remove_branches(program, records, branches), plan, details=details)
        folded, errors = fold_branches(
            branches, set(names_of(chosen)), context.calibration, self.fold, context.track
        )
        details["held-out error"] = {name: float(f"{each:.4g}") for name, each in errors.items()}
        baseline = Baseline(folded, len(context.plan_so_far.steps))
        smaller = remove_branches(folded, records, branches)
        return Outcome(smaller, plan, details=details, edited=True, baseline=baseline)

    def _count(self, units: int) -> int:
        """Return how many of `units` go."""
        if self.count is not None:
            return self.count
        assert self.ratio is not None
        found = int(units * self.ratio + 1e-9)
        if self.ratio and not found:
            raise SelectionError(
                f"nothing to prune: {self.ratio:g} of {units} {self.unit}s is less than one"
            )
        return found
