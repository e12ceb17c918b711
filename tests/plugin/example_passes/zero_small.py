"""Sparsify: zero the small elements of the parameters, in place of removing any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class ZeroSmall(Pass):
    """Set every parameter element of small magnitude to zero.

    Before
    ------
    ``w = [0.5, -0.001, 2.0]``

    After
    -----
    ``w = [0.5, 0.0, 2.0]``

    Options
    -------
    threshold
        The magnitude below which an element is small.

    Requires
    --------
    Nothing.

    Preserves
    ---------
    The coupling: no size changes.

    Refuses
    -------
    Nothing.

    Reference
    ---------
    Han et al., Learning both Weights and Connections for Efficient Neural Networks (2015).

    Example
    -------
    >>> str(ZeroSmall(threshold=0.01))
    'zero-small{threshold=0.01}'
    """

    name: ClassVar[str] = "zero-small"
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    threshold: float = 1e-3

    def run(self, program: Program, context: Context) -> Outcome:
        """Zero the small elements, and say how many there were."""
        weights = program.weights.items()
        parameters = {n: w.detach() for n, w in weights if program.kinds[n] == "parameter"}
        small = {name: weight.abs() < self.threshold for name, weight in parameters.items()}
        zeroed = {name: parameters[name].masked_fill(mask, 0) for name, mask in small.items()}
        count = sum(int(mask.sum()) for mask in small.values())
        return Outcome(program.with_weights(zeroed), details={"zeroed": count}, edited=True)
