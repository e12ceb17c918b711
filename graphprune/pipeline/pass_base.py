"""The base class of passes: frozen dataclasses that turn a program into another one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from graphprune.errors import PipelineError, nearest
from graphprune.pipeline.options import Option, options_of

if TYPE_CHECKING:
    from graphprune.analysis.coupling import Coupling
    from graphprune.calibration.data import Calibration
    from graphprune.io.progress import DisplayFactory
    from graphprune.ir.program import Program
    from graphprune.plan.edits import Edit
    from graphprune.plan.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Analysis(Generic[T]):
    """Something computed from a program without changing it, once for as long as it holds.

    Parameters
    ----------
    name
        For messages.
    compute
        The computation.
    digest
        What two results are compared by, when the claim that a pass preserves this is audited.
    """

    name: str
    compute: Callable[[Program], T]
    digest: Callable[[T], object]


def _analyze(program: Program) -> Coupling:
    from graphprune.analysis.coupling import analyze

    return analyze(program)


COUPLING: Analysis[Coupling] = Analysis("coupling", _analyze, lambda coupling: coupling.to_json())
"""The coupled groups of a program, `graphprune.analyze`."""


class AnalysisCache:
    """The analyses of the program in hand; a new program makes them stale.

    Only one program is held, so that a chain of passes does not keep every step's weights alive.
    """

    def __init__(self) -> None:
        self._program: Program | None = None
        self._results: dict[Analysis[Any], object] = {}

    def get(self, analysis: Analysis[T], program: Program) -> T:
        """Return the analysis of `program`, computed unless it is known."""
        if program is not self._program:
            self._program, self._results = program, {}
        if analysis not in self._results:
            self._results[analysis] = analysis.compute(program)
        return cast(T, self._results[analysis])

    def move(self, before: Program, after: Program, preserved: frozenset[Analysis[Any]]) -> None:
        """Carry what a pass from `before` to `after` preserved over, and drop the rest."""
        if after is self._program:
            return
        known = self._results if before is self._program else {}
        self._program = after
        self._results = {key: result for key, result in known.items() if key in preserved}


@dataclass(frozen=True)
class Baseline:
    """A program that verification starts from: the last one whose values a pass edited.

    Parameters
    ----------
    program
        The edited program.
    steps
        How many steps of the plan led to it; those after them are verified.
    """

    program: Program
    steps: int


@dataclass(frozen=True)
class Context:
    """The things that a pass may use beside the program; the pass manager makes one for each pass.

    Parameters
    ----------
    original
        The program that the pipeline started from.
    plan_so_far
        What the passes before this one removed and merged.
    baseline
        What the program is verified against; None for `original` and the whole plan.
    calibration
        Batches to run the program on, or None.
    output
        The folder that relative output paths start from.
    seed
        Seed of whatever is random.
    progress
        Makes a progress display, or None to be quiet.
    analyses
        Results of analyses, shared by the passes of one run.
    edits
        What passes did to values beside the plan.
    """

    original: Program
    plan_so_far: Plan
    calibration: Calibration | None = None
    output: Path = Path()
    seed: int = 0
    progress: DisplayFactory | None = None
    analyses: AnalysisCache = field(default_factory=AnalysisCache, repr=False)
    baseline: Baseline | None = None
    edits: tuple[Edit, ...] = ()

    def plan_of(self, program: Program) -> Plan:
        """Return the plan so far, with the values of weights that it would not give `program`."""
        from graphprune.pipeline.edits import with_edits

        return with_edits(self.original, self.plan_so_far, program, self.edits)

    def since_baseline(self) -> tuple[Program, Plan]:
        """Return what to verify a program against: the baseline, and the plan from there on."""
        baseline = self.baseline or Baseline(self.original, 0)
        steps = self.plan_so_far.steps[baseline.steps :]
        return baseline.program, dataclasses.replace(self.plan_so_far, steps=steps)

    def analysis(self, analysis: Analysis[T], program: Program) -> T:
        """Return the result of `analysis` on `program`, from the cache where it is not stale."""
        return self.analyses.get(analysis, program)

    def coupling(self, program: Program) -> Coupling:
        """Return the coupled groups of `program`, from the cache where they are not stale."""
        return self.analysis(COUPLING, program)

    def bar(
        self, what: str, total: float | None = None
    ) -> AbstractContextManager[Callable[[float], None]]:
        """Show a progress bar called `what`, advanced by calling what it gives; none if quiet."""
        from graphprune.io.progress import progress_bar

        return progress_bar(self.progress, what, total)

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Iterate over `items` beside a progress bar called `what`; none on a quiet run."""
        with self.bar(what, len(items) if isinstance(items, Sized) else None) as advance:
            for item in items:
                yield item
                advance(1)

    def path(self, path: str) -> Path:
        """Return where a pass writes: `path` in the output folder, or itself if absolute."""
        return self.output / path


@dataclass(frozen=True)
class Outcome:
    """The result of a pass.

    Parameters
    ----------
    program
        The new program, or the very one that came in.
    plan
        What was removed and merged; None or an empty plan where no size changed.
    details
        What is worth reporting: anything that JSON can hold.
    edited
        Whether weights or graph changed in another way than by the plan.
    baseline
        What the new program is verified against where values were edited before sizes: the edited
        program, to which the rest of the plan was then applied. None where nothing was edited, or
        the new program is itself what later ones are verified against.
    verified
        The largest relative error that the pass found of the program, where it verified it.
    patterns
        Weights -> the n:m pattern of zeros, such as "2:4", that the pass promises of them.
    """

    program: Program
    plan: Plan | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    edited: bool = False
    baseline: Baseline | None = None
    verified: float | None = None
    patterns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes. A subclass is a frozen dataclass too; its fields are its text options.

    Field types are `bool`, `int`, `float`, `str`, a `Literal` of texts, any of these `| None`, and
    tuples such as `tuple[str, ...]`. A pass keeps no state of a run: `run` may be called again.
    """

    name: ClassVar[str]
    """The name in pipelines, such as ``merge-kv-heads`` (class ``MergeKvHeads``)."""

    required: ClassVar[bool] = False
    """Whether the pass runs beyond a bisect limit: true for what checks and writes, not changes."""

    resizes: ClassVar[bool] = True
    """Whether the pass may change sizes; a dry run stops after the last pass that may."""

    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset()
    """The analyses that hold for the new program because they held for the old one."""

    renamed_options: ClassVar[Mapping[str, str]] = {}
    """Names that options had -> those that they have; both are read, the new ones written."""

    renamed_choices: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Option -> words that its choices had -> those that they have."""

    def __post_init__(self) -> None:
        for option in self.options().values():
            object.__setattr__(self, option.name, option.check(getattr(self, option.name)))

    @property
    def requires_calibration(self) -> bool:
        """Return whether these options need calibration data; asked before any pass runs."""
        return False

    @property
    def runs_program(self) -> bool:
        """Return whether these options run the program, on data or on random inputs.

        Where no pass does, the command line loads a program that is only changed and written.
        """
        return True

    @property
    def instead_of_calibration(self) -> str:
        """Options with which the pass needs no calibration data; "" where there are none."""
        return ""

    def calibration_tokens(self, program: Program) -> int:
        """Return how many tokens of calibration text do well by `program`; 0 for any number."""
        return 0

    def refuse_early(self, program: Program, *, settled: bool) -> None:  # noqa: B027
        """Refuse at once what `run` would refuse when its turn comes; by default, nothing.

        It is asked before any pass runs, and again after the last pass before it that may change
        sizes.

        Parameters
        ----------
        program
            What the pipeline begins with, or what that last pass made.
        settled
            Whether its sizes are those that `run` will meet.
        """

    @abstractmethod
    def run(self, program: Program, context: Context) -> Outcome:
        """Make a new program; never edit the one that came in."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return the options by name, read from the fields."""
        renamed = cls.renamed_choices
        return {
            name: dataclasses.replace(option, renamed=renamed.get(name, {}))
            for name, option in options_of(cls).items()
        }

    @classmethod
    def option(cls, name: str) -> Option:
        """Return the option that is, or was, called `name`.

        Raises
        ------
        PipelineError
            When there is none; names the nearest.
        """
        options, name = cls.options(), cls.renamed_options.get(name, name)
        if name not in options:
            hint = nearest(name, options) or _listing(options)
            raise PipelineError(f"pass {cls.name!r} has no option {name!r}{hint}")
        return options[name]

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Pass:
        """Return the pass with these option values.

        Raises
        ------
        PipelineError
            When an option that has no default is missing, or a value is of the wrong type.
        """
        for option in cls.options().values():
            if option.required and option.name not in values:
                raise PipelineError(f"pass {cls.name!r} needs the option {option.name!r}")
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """Return the option values that differ from their defaults."""
        pairs = ((option, getattr(self, option.name)) for option in self.options().values())
        return {option.name: value for option, value in pairs if value != option.default}

    def __str__(self) -> str:
        """Return the text form, such as ``prune{target=ffn ratio=0.25}``, without defaults."""
        options = self.options()
        pairs = [f"{name}={options[name].write(value)}" for name, value in self.values().items()]
        return f"{self.name}{{{' '.join(pairs)}}}" if pairs else self.name


def _listing(names: Iterable[str]) -> str:
    return f"; it takes {', '.join(names)}" if names else "; it takes none"
