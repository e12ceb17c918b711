"""Prune coupled groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphprune.errors import SelectionError
from graphprune.pass_base import Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.program import Program


@dataclass(frozen=True)
class Prune(Pass):
    """Remove the least important units of coupled groups.

    Before
    ------
    ::

        gate[112, 64]  up[112, 64]  down[64, 112]

    After
    -----
    With ``target=ffn ratio=0.25``::

        gate[84, 64]   up[84, 64]   down[64, 84]

    Options
    -------
    target
        What to prune: ffn, experts, kv-heads, query-heads, head-dim, rope-dim, hidden, channels,
        all (every group whose removal equals zeroing its weight slices, but the residual stream),
        or a glob over group names.
    ratio
        The part that goes, in [0, 1).
    criterion
        How units are scored: l1, l2, magnitude (as l2), random, taylor, taylor-vector, wanda.
    aggregate
        How the scores of a unit in the weights of its group become one.
    scope
        Whether every group loses the same part, or the least important units of all groups go.
    budget
        Whether the ratio counts units of the groups or parameters of the whole program.
    normalise
        How the scores of different groups are made comparable in scope global.
    round_to
        Every group keeps a multiple of this many units.
    skip
        Globs over names of groups or weights that stay whole.

    Requires
    --------
    The coupling of the program; calibration data for the criteria taylor, taylor-vector and wanda.

    Preserves
    ---------
    Nothing.

    Refuses
    -------
    A target or pattern that matches nothing, a ratio outside of [0, 1), a budget that removes
    nothing or that the groups cannot meet (`SelectionError`).

    Reference
    ---------
    Groups and criteria: Ma et al., LLM-Pruner, 2305.11627, sections 3.1 and 3.2.

    Example
    -------
    >>> str(Prune(target="ffn", ratio=0.25, criterion="l2"))
    'prune{target=ffn ratio=0.25 criterion=l2}'
    """

    name: ClassVar[str] = "prune"

    target: str
    ratio: float
    criterion: str = "taylor"
    aggregate: Literal["sum", "mean", "max", "product"] = "sum"
    scope: Literal["group", "global"] = "group"
    budget: Literal["units", "parameters"] = "units"
    normalise: Literal["none", "mean", "max", "sum", "l2"] = "mean"
    round_to: int = 1
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise SelectionError(f"prune: ratio {self.ratio:g} is not in [0, 1)")
        if self.round_to < 1:
            raise SelectionError(f"prune: round_to {self.round_to} is not positive")

    @property
    def requires_calibration(self) -> bool:
        """Whether the criterion looks at data."""
        from graphprune.importance import criterion

        return criterion(self.criterion).requires_calibration

    def run(self, program: Program, context: Context) -> Outcome:
        """Score the target's groups, select units, and rewrite."""
        from graphprune.importance import Evidence, check_scores, criterion
        from graphprune.plan import Plan, Step
        from graphprune.rewrite import carry_out
        from graphprune.selection import Selector, target_groups

        coupling = context.coupling(program)
        groups = target_groups(coupling, self.target, self.skip)
        if self.ratio == 0:
            return Outcome(program, details={"note": "ratio 0: nothing goes"})
        evidence = Evidence(
            program,
            coupling,
            groups,
            calibration=context.calibration,
            aggregate=self.aggregate,
            seed=context.seed,
            track=context.track,
        )
        scores = criterion(self.criterion).scores(evidence)
        check_scores(scores, evidence)
        selector = Selector(self.ratio, self.scope, self.budget, self.normalise, self.round_to)
        cuts = selector.select(coupling, groups, scores)
        step = Step(program.fingerprint(), tuple(cuts))
        pruned = carry_out(program, step, coupling)
        whole = [group.name for group in groups if group.name not in {c.group for c in cuts}]
        details = {
            "removed": {cut.group: f"{cut.count} of {cut.size}" for cut in cuts},
            "unchanged": whole,
        }
        return Outcome(pruned, Plan((step,)), details=details)
