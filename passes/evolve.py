"""Search for what each group loses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graphprune.errors import ProcessError, SelectionError, UsageError
from graphprune.pipeline.pass_base import Baseline, Context, Outcome, Pass

if TYPE_CHECKING:
    from pathlib import Path

    from graphprune.analysis.coupling import Coupling
    from graphprune.analysis.groups import Group
    from graphprune.backends.onnx.kernel_times import KernelTimes
    from graphprune.evolution.ladder import Subject
    from graphprune.evolution.search import Found
    from graphprune.evolution.space import Space
    from graphprune.ir.program import Program

_BUDGETS = ("params", "macs", "kv_bytes", "latency")


@dataclass(frozen=True)
class Evolve(Pass):
    """Search for the units that each group loses best within budgets, and refit what stays.

    Before
    ------
    ::

        gate[112, 64]  up[112, 64]  down[64, 112]     in each of two layers

    After
    -----
    With ``target=ffn params=0.2`` one layer may lose much and the other one little, wherever the
    outputs of the whole model change least by it; what stays is refitted, as by `reconstruct`::

        gate[98, 64]   up[98, 64]   down[64, 98]
        gate[56, 64]   up[56, 64]   down[64, 56]

    Options
    -------
    target
        What to prune, as in `prune`: groups whose removal equals zeroing weights.
    params
        The part of the program's parameters that goes, in (0, 1). All budgets that are given are
        met.
    macs
        The part of its multiply-accumulates, for a prompt of 512 tokens on an empty cache.
    kv_bytes
        The part of its KV cache.
    latency
        The part of the time that the matrix products and attentions of such a prompt take together,
        each by itself in ONNX Runtime on `provider`, in float32 whatever the program's type. Times
        differ from one measuring to the next, and with them what is found: it is found again only
        with the same file of `times`.
    criterion
        In what order the units of a group go, as in `prune`.
    skip
        Globs over names of groups or weights that stay whole.
    round_to
        Every group keeps a multiple of this many units (rounded up).
    steps
        How often levels are made and searched: first eighths of every group, then levels around
        what was best, each time half as far apart.
    generations
        Of each step, at most; it ends after five that find nothing better.
    children
        Of each generation.
    tokens
        How many tokens of the calibration data states are measured on, the last ones: a quarter of
        the samples at most, and that for 0 or inputs that are no tokens. No level is fitted to
        them; what is found is, in the end. About an eighth of them, a batch at least, tells which
        children are measured on more.
    seconds
        How long the search may take, looked at between generations; what it has found by then is
        taken. None for any time.
    folder
        A directory for what is measured and refitted: the same command goes on there after an
        interruption, and another budget finds the first refits there. It also holds
        ``progress.json`` and, in the end, ``progress.svg``. None: nothing is kept.
    damp
        As in `reconstruct`.
    provider
        Of latency: what the result is to run on, an execution provider of ONNX Runtime such as cpu
        or cuda; its times are measured here.
    times
        Of latency: a file that keeps the times, each measured once and written at once. None: in
        the folder, if there is one.

    Requires
    --------
    The coupling of the program; calibration data; for a latency, ONNX Runtime with the provider.

    Preserves
    ---------
    Nothing.

    Refuses
    -------
    What `prune` refuses; groups whose removal is no zeroing of weights; a budget that all they may
    lose does not meet (`SelectionError`); no time for one generation (`UsageError`); a folder of
    another program or other data (`CalibrationError`); a provider that is not here, or a file of
    times of another one (`BackendError`); several processes (`ProcessError`).

    Reference
    ---------
    The search: Sieberling et al., EvoPress, 2410.14649, algorithm 2, with the divergence of the
    logits as fitness. Levels by optimal brain surgeon whose errors add up over layers, iterated
    with halved steps: Li et al., Tyr-the-Pruner, 2503.09657.

    Example
    -------
    >>> str(Evolve("ffn", params=0.1, steps=1, generations=2, children=4))
    'evolve{target=ffn params=0.1 steps=1 generations=2 children=4}'
    """

    name: ClassVar[str] = "evolve"

    target: tuple[str, ...]
    params: float | None = None
    macs: float | None = None
    kv_bytes: float | None = None
    latency: float | None = None
    criterion: str = "obs"
    skip: tuple[str, ...] = ()
    round_to: int = 1
    steps: int = 3
    generations: int = 30
    children: int = 24
    tokens: int = 4096
    seconds: float | None = None
    folder: str | None = None
    damp: float | None = None
    provider: str = "cpu"
    times: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target:
            raise SelectionError("evolve: no target")
        if not self.budgets:
            raise SelectionError(f"evolve: no budget; give one of {', '.join(_BUDGETS)}")
        for name, part in self.budgets.items():
            if not 0 < part < 1:
                percent = f"; {part:g} % is {part / 100:g}" if 1 < part < 100 else ""
                raise SelectionError(f"evolve: {name} {part:g} is not in (0, 1){percent}")
        for name in ("round_to", "steps", "generations", "children", "seconds", "damp"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"evolve: {name} {value:g} is not positive")
        if self.tokens < 0:
            raise UsageError(f"evolve: tokens {self.tokens} is negative")
        given = [name for name in ("provider", "times") if name in self.values()]
        if given and self.latency is None:
            raise UsageError(f"evolve: {given[0]} is of a latency, and none is asked for")

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are given, by name."""
        parts = {name: getattr(self, name) for name in _BUDGETS}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def requires_calibration(self) -> bool:
        """Always."""
        return True

    def calibration_tokens(self, program: Program) -> int:
        """Return what least squares and the criterion need."""
        from graphprune.calibration.statistics import tokens_for_gram
        from graphprune.criteria import criterion

        return max(tokens_for_gram(program), criterion(self.criterion).tokens_needed(program))

    def run(self, program: Program, context: Context) -> Outcome:
        """Search, refit what the best state leaves, and remove the rest."""
        from contextlib import nullcontext
        from pathlib import Path
        from tempfile import TemporaryDirectory

        from graphprune import ranks
        from graphprune.transforms.apply import apply_plan

        if ranks.size() > 1:  # their clocks differ, and with them what they find
            raise ProcessError("evolve works in one process: start it without torchrun")
        assert context.calibration is not None, "the pass manager has asked for it"
        context.calibration.check(program)
        coupling = context.coupling(program)
        groups = self._groups(coupling)
        with nullcontext(self.folder) if self.folder else TemporaryDirectory() as folder:
            space, times = self._space(coupling, groups, Path(folder))
            subject, found = self._search(space, times, coupling, Path(folder), context)
            whole = dataclasses.replace(subject, calibration=context.calibration)
            fitted = whole.refit(found.state, track=context.track)
        plan = subject.plan(found.state)
        lost = space.counts(found.state)
        details: dict[str, Any] = {
            "removed": {g.name: f"{lost[g.name]} of {g.size}" for g in groups if g.name in lost},
            f"{found.measure}, of equal parts and as found": [found.equal, found.fitness],
            "generations": list(found.generations),
            "refitted": fitted.names,
            "calibration bytes": fitted.peak_bytes,
        }
        if not found.in_time:
            details["note"] = "time was over before all generations were"
        baseline = Baseline(fitted.program, len(context.plan_so_far.steps))
        smaller = apply_plan(fitted.program, plan)
        return Outcome(smaller, plan, details, edited=True, baseline=baseline)

    def _groups(self, coupling: Coupling) -> list[Group]:
        """Return the groups of the target, each once."""
        from graphprune.selection.targets import target_groups

        given = [g for target in self.target for g in target_groups(coupling, target, self.skip)]
        groups = list({group.name: group for group in given}.values())
        for group in groups:
            if not group.is_zeroing:
                raise SelectionError(
                    f"{group.name} ({group.role}, {group.exactness}): its removal is no zeroing of "
                    "weights, so it has no levels to search; prune takes it"
                )
        return groups

    def _space(
        self, coupling: Coupling, groups: list[Group], folder: Path
    ) -> tuple[Space, KernelTimes | None]:
        """Return what meets the budgets; refuse, before any other work, where all would not."""
        from pathlib import Path

        from graphprune.backends.onnx.kernel_times import KernelTimes
        from graphprune.evolution.budgets import budgets_of
        from graphprune.evolution.space import Space

        times = None
        if self.latency is not None:
            times = KernelTimes(
                self.provider, Path(self.times) if self.times else folder / "times.json"
            )
        space = Space(groups, budgets_of(coupling, self.budgets, times), self.round_to)
        space.equal()
        return space, times

    def _search(
        self,
        space: Space,
        times: KernelTimes | None,
        coupling: Coupling,
        folder: Path,
        context: Context,
    ) -> tuple[Subject, Found]:
        """Return what was searched, and what was found."""
        from graphprune.criteria import ScoringContext
        from graphprune.criteria.score_cache import load_or_score
        from graphprune.evolution.fitness import Departures, divided
        from graphprune.evolution.ladder import Subject
        from graphprune.evolution.record import Record
        from graphprune.evolution.search import Settings, search

        data, program = context.calibration, coupling.program
        assert data is not None, "the pass manager has asked for it"
        record = Record(folder, program, data, self.tokens)
        if times is not None:
            times.keep()
        scoring = ScoringContext(
            program, coupling, space.groups, data, seed=context.seed, track=context.track
        )
        file = record.scores_file(self.criterion, [group.name for group in space.groups])
        scores = load_or_score(file, self.criterion, scoring)
        fitted, measured = divided(data, self.tokens)
        subject = Subject(coupling, space.groups, scores, fitted, self.damp)
        departures = Departures(program, measured, self.tokens)
        settings = Settings(self.steps, self.generations, self.children, self.seconds, context.seed)
        return subject, search(subject, space, departures, record, settings, context.track)
