"""Prune coupled groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphprune.errors import NothingToPrune, SelectionError
from graphprune.pass_base import Context, Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphprune.coupling import Coupling, Group
    from graphprune.plan import Cut
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
        How units are scored: l1, l2, magnitude (as l2), random, taylor, taylor-vector,
        taylor-second, taylor-mixed, wanda, gate, gate-token, gate-batch, obs.
    aggregate
        How the scores of a unit in the weights of its group become one: sum, mean, max, product, or
        last (in the weight that is used last).
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
    steps
        In how many equal parts the ratio is removed, with scores taken anew before each.
    protect
        How many of the first and of the last layers stay whole, such as 4,2: groups that hold a
        weight of theirs.

    Requires
    --------
    The coupling of the program; calibration data for all criteria but l1, l2, magnitude and random.

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
    aggregate: Literal["sum", "mean", "max", "product", "last"] = "sum"
    scope: Literal["group", "global"] = "group"
    budget: Literal["units", "parameters"] = "units"
    normalise: Literal["none", "mean", "max", "sum", "l2"] = "mean"
    round_to: int = 1
    skip: tuple[str, ...] = ()
    steps: int = 1
    protect: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise SelectionError(f"prune: ratio {self.ratio:g} is not in [0, 1)")
        if self.round_to < 1:
            raise SelectionError(f"prune: round_to {self.round_to} is not positive")
        if self.steps < 1:
            raise SelectionError(f"prune: steps {self.steps} is not positive")
        if len(self.protect) not in (0, 2) or min(self.protect, default=0) < 0:
            raise SelectionError(
                f"prune: protect {','.join(map(str, self.protect))} is not a number of first "
                "layers and one of last layers, such as 4,2"
            )

    @property
    def requires_calibration(self) -> bool:
        """Whether the criterion looks at data."""
        from graphprune.criteria import criterion

        return criterion(self.criterion).requires_calibration

    def run(self, program: Program, context: Context) -> Outcome:
        """Score the target's groups, select units, and rewrite; once for each step."""
        from graphprune.plan import Plan, Step
        from graphprune.rewrite import carry_out
        from graphprune.selection import outer_layers, target_groups

        first = coupling = context.coupling(program)
        protected = outer_layers(first, *self.protect) if self.protect else set()
        names = {
            group.name
            for group in target_groups(first, self.target, self.skip)
            if not protected.intersection(group.weights())
        }
        if not names:
            raise SelectionError(f"every group of target {self.target!r} is in a protected layer")
        if self.ratio == 0:
            return Outcome(program, details={"note": "ratio 0: nothing goes"})
        steps: list[Step] = []
        for number in range(1, self.steps + 1):
            groups = [group for group in coupling.groups if group.name in names]
            ratio = self.ratio * number / self.steps
            cuts = self._cuts(program, coupling, groups, context, ratio, first)
            if not cuts:  # what this part of the ratio asks for is less than one unit more
                continue
            steps.append(Step(program.fingerprint(), tuple(cuts)))
            program = carry_out(program, steps[-1], coupling)
            coupling = context.coupling(program) if number < self.steps else coupling
        removed: dict[str, int] = {}
        for step in steps:
            for cut in step.cuts:
                removed[cut.group] = removed.get(cut.group, 0) + cut.count
        details = {
            "removed": {name: f"{n} of {first.group(name).size}" for name, n in removed.items()},
            "unchanged": [g.name for g in first.groups if g.name in names - removed.keys()],
        }
        return Outcome(program, Plan(tuple(steps)), details=details)

    def _cuts(
        self,
        program: Program,
        coupling: Coupling,
        groups: Sequence[Group],
        context: Context,
        ratio: float,
        first: Coupling,
    ) -> list[Cut]:
        """What goes so that `ratio` of `first` is gone; none where that is no unit more."""
        from graphprune.criteria import Evidence, check_scores, criterion
        from graphprune.selection import Selector

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
        options = self.scope, self.budget, self.normalise, self.round_to
        selector = Selector(ratio, *options, first=first)
        try:
            return selector.select(coupling, groups, scores)
        except NothingToPrune:
            if ratio == self.ratio and coupling is first:
                raise
            return []
