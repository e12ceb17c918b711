"""Verify the program against the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graphprune.errors import UsageError
from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class Verify(Pass):
    """Check that the program equals the original with the removed units set to zero.

    Before
    ------
    A program and the plan that made it from the original.

    After
    -----
    The same program.

    Options
    -------
    tolerance
        The largest relative error of any output that is accepted; by default 1e-4 in float32, and
        wider in half precision.

    Requires
    --------
    The original program, or the last one whose values a pass edited (sparsify), and the plan since.
    The report says how far outputs move when what went has other values: where they do not, there
    was nothing to prove (`proves_sizes`).

    Preserves
    ---------
    Everything.

    Refuses
    -------
    A program that differs by more than the tolerance (`VerificationError`); a tolerance that is not
    positive.

    Reference
    ---------
    `graphprune.verification`: the reference is computed from the plan and the original graph, and
    shares no code with the rewriter.

    Example
    -------
    >>> str(Verify(tolerance=0.001))
    'verify{tolerance=0.001}'
    """

    name: ClassVar[str] = "verify"
    required: ClassVar[bool] = True
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance is not None and self.tolerance <= 0:
            raise UsageError(f"verify: tolerance {self.tolerance} is not positive")

    def run(self, program: Program, context: Context) -> Outcome:
        """Verify, and return `program` as it is."""
        from graphprune.verification.verify import verify

        with context.bar("verifying"):
            report = verify(*context.since_baseline(), program, tolerance=self.tolerance)
        return Outcome(program, details=report.to_dict(), verified=report.max_relative_error)
