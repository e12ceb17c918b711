"""Prune coupled groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune.errors import NothingToPrune, SelectionError, UsageError
from graphprune.ir.devices import Runtime
from graphprune.pipeline.pass_base import Context, Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphprune.analysis.coupling import Coupling
    from graphprune.analysis.groups import Group
    from graphprune.criteria import Criterion
    from graphprune.ir.program import Program
    from graphprune.plan.steps import Cut

    Scorer = str | Criterion
else:
    Scorer = str  # what the text of a pipeline can hold


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
        What to prune, one or more of: ffn, experts, kv-heads, query-heads, head-dim, rope-dim,
        hidden, channels (in the singular, too, or by role as `inspect` prints it: kv-head,
        residual), all (every group whose removal equals zeroing its weight slices, but the residual
        stream), or globs over group names.
    ratio
        The part of the units that goes, in [0, 1).
    criterion
        How units are scored: l1, l2, magnitude (as l2), random, taylor, taylor-vector,
        taylor-second, taylor-mixed, wanda, gate, gate-token, gate-batch, obs, scop, scop-gamma,
        scop-beta, order (the last go, as is right after `rotate`); for experts also reap, frequency
        and aimer; or one of one's own (`graphprune.criteria.base.Criterion`), by name, in Python
        also as an object.
    aggregate
        How the scores of a unit in the weights of its group become one: sum, mean, max, product, or
        last (in the weight that is used last).
    scope
        local: every group loses the same part. global: those units of all groups go that are the
        least important for what they save; layers then differ in size. None: local where `ratio`
        is given, which says what every group loses, and in the form plain; global where only
        budgets of the whole program are, and the criterion's scores say the same of every group
        (taylor and gate do).
    normalize
        How the scores of different groups are made comparable in scope global: divided by what the
        word says of a group's scores, or in their place the increase of the loss on the calibration
        data, measured as ever more of each group is masked (loss).
    round_to
        Every group keeps a multiple of this many units (rounded up). None: 1, or what `runtime`
        likes.
    skip
        Globs over names of groups or weights that stay whole.
    steps
        In how many equal parts the ratio is removed, with scores taken anew before each.
    protect
        How many of the first and of the last layers stay whole: groups that hold a weight of
        theirs. 4,2 of 32 in the paper. None: all layers lose something, so that they stay alike.
    params
        The part of the program's parameters that goes, in [0, 1). All budgets that are given are
        met.
    macs
        The part of its multiply-accumulates, for a prompt of 512 tokens on an empty cache.
    kv_bytes
        The part of its KV cache.
    scores
        A file that holds the scores, or that they are written to: another budget takes seconds
        then. It is refused for another program, other data or another criterion.
    runtime
        What the program is to run on: cpu, cuda, tensorrt, or portable for any of them. Groups then
        keep sizes that its kernels like, rounded up, where they are large enough (FFN widths,
        hidden sizes and channels in multiples of 64 on cuda and tensorrt and of 16 on cpu; head
        sizes in multiples of 16; 1, 2, 4, 8, 16 or 32 query heads on a KV head on cuda), unless
        `round_to` is given; and the report has what leaves the fast path ("speed hints").
    form
        What kind of checkpoint the result shall be. plain: layers stay alike, and where the config
        refuses a number of units (heads have to divide the hidden size, say) groups keep the
        nearest that it accepts, by which at most twice as many go as were asked for; of two as near
        the larger. any: takes no notice. None: as `run --form` says, else any.

    Requires
    --------
    The coupling of the program; calibration data for all criteria but l1, l2, magnitude, random,
    order, aimer and (behind batch norms) scop-gamma, and to measure the loss.

    Preserves
    ---------
    Nothing.

    Refuses
    -------
    A target or pattern that matches nothing, no budget, one outside of [0, 1), one that removes
    nothing or that the groups cannot meet (`SelectionError`).

    Reference
    ---------
    Groups and criteria: Ma et al., LLM-Pruner, 2305.11627, sections 3.1 and 3.2; the other criteria
    name theirs in `graphprune.criteria`.

    Example
    -------
    >>> str(Prune(target=("ffn", "kv-heads"), params=0.25, scope="global", normalize="loss"))
    'prune{target=ffn,kv-heads scope=global normalize=loss params=0.25}'
    """

    name: ClassVar[str] = "prune"
    renamed_options: ClassVar[Mapping[str, str]] = {"normalise": "normalize"}
    renamed_choices: ClassVar[Mapping[str, Mapping[str, str]]] = {"scope": {"group": "local"}}

    target: tuple[str, ...]
    ratio: float | None = None
    criterion: Scorer = "taylor"
    aggregate: Literal["sum", "mean", "max", "product", "last"] = "sum"
    scope: Literal["local", "global"] | None = None
    normalize: Literal["none", "mean", "max", "sum", "l2", "loss"] = "none"
    round_to: int | None = None
    skip: tuple[str, ...] = ()
    steps: int = 1
    protect: tuple[int, ...] | None = None
    params: float | None = None
    macs: float | None = None
    kv_bytes: float | None = None
    scores: str | None = None
    runtime: Runtime | None = None
    form: Literal["plain", "any"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.criterion, str):
            object.__setattr__(self, "_criterion", _checked(self.criterion))
            object.__setattr__(self, "criterion", self.criterion.name)
        super().__post_init__()
        if not self.target:
            raise SelectionError("prune: no target")
        if not self.budgets:
            raise SelectionError("prune: no budget; give one of ratio, params, macs and kv_bytes")
        for name, part in self.budgets.items():
            if not 0 <= part < 1:
                percent = f"; {part:g} % is {part / 100:g}" if 1 < part < 100 else ""
                raise SelectionError(f"prune: {name} {part:g} is not in [0, 1){percent}")
        if self.normalize == "loss" and self.allocation == "local":
            raise SelectionError("prune: normalize=loss decides between groups: add scope=global")
        if self.round_to is not None and self.round_to < 1:
            raise SelectionError(f"prune: round_to {self.round_to} is not positive")
        if self.steps < 1:
            raise SelectionError(f"prune: steps {self.steps} is not positive")
        if self.scores is not None and self.steps > 1:
            raise SelectionError("prune: scores are taken anew before each of several steps")
        kept = self.protect or ()
        if len(kept) not in (0, 2) or min(kept, default=0) < 0:
            raise SelectionError(
                f"prune: protect {','.join(map(str, kept))} is not a number of first "
                "layers and one of last layers, such as 4,2"
            )

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are given, by name."""
        parts = {name: getattr(self, name) for name in ("ratio", "params", "macs", "kv_bytes")}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def scorer(self) -> Criterion:
        """The criterion that was given, as an object or by its name."""
        from graphprune.criteria import criterion

        given: Criterion | None = vars(self).get("_criterion")
        return given or criterion(str(self.criterion))

    @property
    def allocation(self) -> Literal["local", "global"]:
        """The scope, where none is given the one that fits budget and criterion."""
        if self.scope is not None:
            return self.scope
        comparable = self.normalize != "none" or self.scorer.comparable
        alike = self.ratio is not None or self.form == "plain"
        return "global" if comparable and not alike else "local"

    @property
    def requires_calibration(self) -> bool:
        """Return whether the criterion looks at data, or the loss is measured on it."""
        from pathlib import Path

        kept = self.scores is not None and Path(self.scores).exists()
        scoring = self.scorer.requires_calibration and not kept
        return scoring or self.normalize == "loss"

    @property
    def runs_program(self) -> bool:
        """Return whether data are looked at."""
        return self.requires_calibration

    @property
    def instead_of_calibration(self) -> str:
        """Scores of the weights alone."""
        return "criterion=l2" + (" normalize=none" if self.normalize == "loss" else "")

    def calibration_tokens(self, program: Program) -> int:
        """Return what the criterion needs."""
        return self.scorer.tokens_needed(program)

    def run(self, program: Program, context: Context) -> Outcome:
        """Score the groups of the target, select units and remove them; once for each step."""
        from graphprune.plan.plan import Plan
        from graphprune.plan.steps import Step
        from graphprune.selection.targets import outer_layers, target_groups
        from graphprune.transforms.apply import apply_step

        first = coupling = context.coupling(program)
        protected = outer_layers(first, *self.protect) if self.protect else set()
        names = {
            group.name
            for target in self.target
            for group in target_groups(first, target, self.skip)
            if not protected.intersection(group.weights())
        }
        if not names:
            targets = ", ".join(map(repr, self.target))
            raise SelectionError(f"every group of target {targets} is in a protected layer")
        if not any(self.budgets.values()):
            return Outcome(program, details={"note": "a budget of 0: nothing goes"})
        steps: list[Step] = []
        instead: dict[str, str] = {}
        for number in range(1, self.steps + 1):
            groups = [group for group in coupling.groups if group.name in names]
            part = number / self.steps
            cuts = self._cuts(program, coupling, groups, context, part, first, instead)
            if not cuts:  # what this part of the budget asks for is less than one unit more
                continue
            steps.append(Step(program.fingerprint(), tuple(cuts)))
            program = apply_step(program, steps[-1], coupling)
            coupling = context.coupling(program) if number < self.steps else coupling
        removed: dict[str, int] = {}
        for step in steps:
            for cut in step.cuts:
                removed[cut.group] = removed.get(cut.group, 0) + cut.count
        details: dict[str, Any] = {
            "removed": {name: f"{n} of {first.group(name).size}" for name, n in removed.items()},
            "unchanged": [g.name for g in first.groups if g.name in names - removed.keys()],
        }
        if instead:
            details["left with, for a plain checkpoint"] = instead
        if hints := self._hints(first, removed):
            details["speed hints"] = hints
        return Outcome(program, Plan(tuple(steps)), details=details)

    def _hints(self, first: Coupling, removed: Mapping[str, int]) -> list[str]:
        """Return what leaves the fast path of `runtime` by this."""
        from graphprune.report.overview import hint_lines
        from graphprune.selection.kernel_sizes import speed_hints

        if self.runtime is None:
            return []
        before = speed_hints(first, self.runtime)
        after = speed_hints(first, self.runtime, removed)
        return hint_lines(hint for hint in after if hint not in before)

    def _cuts(
        self,
        program: Program,
        coupling: Coupling,
        groups: Sequence[Group],
        context: Context,
        part: float,
        first: Coupling,
        instead: dict[str, str],
    ) -> list[Cut]:
        """Return what goes so that `part` of the budgets on `first` is met; none where it is.

        `instead` takes what groups are left with where a config refuses what was asked for.
        """
        from graphprune.backends.huggingface.config_rules import size_rules
        from graphprune.criteria import ScoringContext, check_scores
        from graphprune.criteria.score_cache import load_or_score
        from graphprune.selection.allocation import loss_margins
        from graphprune.selection.kernel_sizes import preferred_sizes
        from graphprune.selection.selector import Selector

        scoring = ScoringContext(
            program,
            coupling,
            groups,
            calibration=context.calibration,
            aggregate=self.aggregate,
            seed=context.seed,
            track=context.track,
        )
        if self.scores is not None:
            scores = load_or_score(self.scores, self.scorer, scoring)
        else:
            scores = self.scorer.scores(scoring)
            check_scores(scores, scoring)
        sizes: Mapping[str, Sequence[int]] = {}
        if self.runtime is not None and self.round_to is None:
            sizes = preferred_sizes((first.group(group.name) for group in groups), self.runtime)
        selector = Selector(
            scope=self.allocation,
            normalize="none" if self.normalize == "loss" else self.normalize,
            round_to=self.round_to or 1,
            first=first,
            sizes=sizes,
            rules=size_rules(program, groups) if self.form == "plain" else {},
            **{name: share * part for name, share in self.budgets.items()},
        )
        margins = loss_margins(scoring, scores) if self.normalize == "loss" else None
        try:
            cuts = selector.select(coupling, groups, scores, margins)
        except NothingToPrune:
            if part == 1 and coupling is first:
                raise
            return []
        instead.update(selector.instead(groups))
        return cuts


def _checked(given: object) -> Criterion:
    """Return `given`, a criterion as an object; refuse anything else."""
    from graphprune.criteria import Criterion

    if not isinstance(given, Criterion):
        raise UsageError(
            "prune: criterion is a name or an object of a class made of graphprune.criteria's "
            f"Criterion, not {given!r}"
        )
    return given
