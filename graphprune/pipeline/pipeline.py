"""Pipelines: passes in order, built in Python, from text or from YAML, and run on a program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.errors import PROGRAMS, PipelineError, UsageError, add_context, nearest
from graphprune.pipeline import text as pipeline_text
from graphprune.pipeline.instruments import Dump, Instrument, PrintProgram, VerifyEach
from graphprune.pipeline.pass_base import Context, Pass
from graphprune.pipeline.pass_manager import PassManager, Result

if TYPE_CHECKING:
    from graphprune.calibration.data import Calibration
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes.

    Parameters
    ----------
    passes
        In the order in which they run.

    Raises
    ------
    PipelineError
        When one of them is not a pass.

    Examples
    --------
    >>> pipeline = Pipeline.parse("print{what=types},verify{tolerance=1e-5}")
    >>> print(pipeline)
    print{what=types},verify{tolerance=1e-05}
    >>> Pipeline.from_yaml(pipeline.to_yaml()) == pipeline
    True
    """

    passes: Sequence[Pass]

    def __post_init__(self) -> None:
        if isinstance(self.passes, str):
            raise PipelineError(
                f"a text is no sequence of passes: read it with Pipeline.parse({self.passes!r})"
            )
        object.__setattr__(self, "passes", tuple(self.passes))
        for number, pass_ in enumerate(self.passes, 1):
            if not isinstance(pass_, Pass):
                raise PipelineError(f"pass {number}: {pass_!r} is not a pass")

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read a pipeline from a text such as ``prune{ratio=0.25},verify``.

        Raises
        ------
        PipelineError
            When the text is malformed, or a pass or option is unknown or ill-typed; names the
            column and the nearest name.
        """
        return cls(pipeline_text.read_text(text))

    @classmethod
    def from_yaml(cls, source: str | PathLike[str]) -> Pipeline:
        """Read a pipeline from a YAML file, or from YAML text.

        Parameters
        ----------
        source
            A path object, or a text; a text of one line that ends in ``.yaml`` or ``.yml`` is a
            path.

        Raises
        ------
        PipelineError
            When the file cannot be read, is malformed, or a pass or option is unknown or ill-typed.
        """
        text = _yaml_text(source)
        try:
            return cls(pipeline_text.read_yaml(text))
        except PipelineError as error:
            if text is not source:
                add_context(error, str(source))
            raise

    def to_text(self) -> str:
        """Return the text that `parse` reads back."""
        return pipeline_text.write_text(self.passes)

    def to_yaml(self) -> str:
        """Return the YAML text that `from_yaml` reads back."""
        return pipeline_text.write_yaml(self.passes)

    def __str__(self) -> str:
        """Return the text form."""
        return self.to_text()

    def resizing(self) -> Pipeline:
        """Return the part that decides sizes: without what checks and writes, and what follows."""
        changing = [each for each in self.passes if not each.required]
        while changing and not changing[-1].resizes:
            changing.pop()
        return Pipeline(changing)

    def enough(self, calibration: Calibration, program: Program) -> Calibration:
        """Return as much calibration text as the passes need, where its size was left open.

        It has the inputs that the program takes.

        Raises
        ------
        CalibrationError
            When the program takes something that cannot be made of a text.
        """
        tokens = max((each.calibration_tokens(program) for each in self.passes), default=0)
        if tokens:
            calibration = calibration.enough_for(tokens, program.context_length)
        return calibration.for_program(program)

    def run(
        self,
        program: Program,
        *,
        calibration: Calibration | None = None,
        output: str | PathLike[str] = "",
        seed: int = 0,
        verify_each: bool = False,
        print_before: Sequence[str] = (),
        print_after: Sequence[str] = (),
        dump: str | PathLike[str] | None = None,
        stop_after: int | None = None,
        audit: bool = False,
        instruments: Iterable[Instrument] = (),
        quiet: bool = True,
    ) -> Result:
        """Run the passes on `program`, which is never changed.

        Parameters
        ----------
        program
            What to start from.
        calibration
            Batches for the passes that need them. Of a text whose windows nobody counted, as many
            as the passes need.
        output
            The folder that relative output paths start from; the current one by default.
        seed
            Seed of whatever is random.
        verify_each
            Verify against the original after every pass that changed sizes.
        print_before, print_after
            Names or globs of passes around which the graph is printed to standard error.
        dump
            A folder for the graph after every pass, and for a reproducer of a failure.
        stop_after
            Run only the first so many passes that change the program; those that check, print and
            write (`Pass.required`) run all the same.
        audit
            Recompute the analyses that passes say they preserve.
        instruments
            More instruments, told after the ones above.
        quiet
            Whether to show no progress; none is shown off a terminal.

        Returns
        -------
        Result
            The new program, the plan, and the report.

        Raises
        ------
        GraphPruneError
            Of the class that a pass raised, naming the pass; `PipelineError` for anything else that
            goes wrong in a pass; `CalibrationError` before any work when calibration is missing.
        UsageError
            When `stop_after` is negative, a pass to print around is not in the pipeline, or
            `program` or `calibration` is a name or a text.
        """
        from graphprune.io.progress import display_factory
        from graphprune.plan.plan import Plan

        _refuse_others(program, calibration)
        if stop_after is not None and stop_after < 0:
            raise UsageError(f"stop_after is {stop_after}, not a number of passes")
        self._refuse_absent([*print_before, *print_after])
        watching: list[Instrument] = [PrintProgram(print_before, print_after)]
        if dump is not None:
            watching.append(Dump(Path(dump)))
        if verify_each:
            watching.append(VerifyEach())
        context = Context(
            original=program,
            plan_so_far=Plan(),
            calibration=calibration and self.enough(calibration, program),
            output=Path(output),
            seed=seed,
            progress=display_factory(quiet=quiet),
        )
        manager = PassManager(tuple(self.passes), (*watching, *instruments), stop_after, audit)
        return manager.run(context)

    def _refuse_absent(self, patterns: Iterable[str]) -> None:
        names = [pass_.name for pass_ in self.passes]
        for pattern in patterns:
            if not matching(names, pattern):
                raise UsageError(f"no pass {pattern!r} to print around{nearest(pattern, names)}")


def _refuse_others(program: object, calibration: object) -> None:
    """Refuse names of files and models where programs are wanted, saying how to make those."""
    if hasattr(program, "named_modules"):  # torch is not imported for this
        raise UsageError(f"a {type(program).__name__} is no program: {PROGRAMS}")
    if isinstance(program, str | PathLike):
        raise UsageError(f"program is a name: load it with graphprune.load({str(program)!r})")
    if isinstance(calibration, str | PathLike):
        raise UsageError(
            "calibration is a text: make it ready with "
            f"graphprune.Calibration.from_text({str(calibration)!r}, tokenizer)"
        )
    if calibration is not None and not hasattr(calibration, "for_program"):
        raise UsageError(
            f"calibration is a {type(calibration).__name__}: make it ready with "
            "graphprune.Calibration.from_batches(...)"
        )


def _yaml_text(source: str | PathLike[str]) -> str:
    if isinstance(source, str) and ("\n" in source or not source.endswith((".yaml", ".yml"))):
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"cannot read the pipeline {source}: {error}") from error
