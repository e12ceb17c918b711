"""Take the statistics of batch norms anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class ReestimateNorms(Pass):
    """Set the running means and variances of batch norms to those on the calibration data.

    Before
    ------
    ::

        running_mean[48]  running_var[48]  of what 64 channels made of the data

    After
    -----
    ::

        running_mean[48]  running_var[48]  of what is left makes of it

    Options
    -------
    There are none.

    Requires
    --------
    Calibration data, the more of it the better: what it says of a channel's mean and variance is
    what the batch norm believes from then on.

    Preserves
    ---------
    The coupling.

    Refuses
    -------
    Data that has fewer than two values of a channel, and two batch norms that keep their statistics
    together (`CalibrationError`).

    Reference
    ---------
    SCOP, Tang et al. 2010.10732, whose published code does so after the channels are chosen.

    Example
    -------
    >>> str(ReestimateNorms())
    'reestimate-norms'
    """

    name: ClassVar[str] = "reestimate-norms"
    resizes: ClassVar[bool] = False
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    @property
    def requires_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> Outcome:
        """Walk the data through the graph."""
        from graphprune.transforms.batch_norms import reestimate

        assert context.calibration is not None, "the pass manager has asked for it"
        found = reestimate(program, context.calibration, context.track)
        if not found:
            return Outcome(program, details={"note": "no batch norm keeps statistics"})
        return Outcome(program.with_weights(found), details={"set": list(found)}, edited=True)
