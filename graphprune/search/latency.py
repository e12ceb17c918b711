"""A budget of time: what the kernels of a program take, each measured once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphprune.analysis.coupling import analyze
from graphprune.backends.onnx.kernel_times import KernelTimes
from graphprune.errors import SelectionError
from graphprune.ir.program import Program
from graphprune.selection.cost import Costs, Kernel


@dataclass(frozen=True, eq=False)
class Latency:
    """What is to go of the time that the matrix products and attentions of a prompt take.

    Parameters
    ----------
    part
        The part that is to go, in (0, 1).
    times
        What measures kernels.
    whole
        The seconds that the program takes that is made smaller.
    """

    part: float
    times: KernelTimes
    whole: float

    @classmethod
    def of(cls, costs: Costs, part: float, times: KernelTimes) -> Latency:
        """Return the budget for the program of `costs`.

        Raises
        ------
        SelectionError
            When nothing in it takes time that could go.
        """
        whole = times.total(costs.kernels({}))
        if not whole:
            raise SelectionError("latency: the program has none to lose")
        return cls(part, times, whole)

    @property
    def most(self) -> float:
        """The seconds that may be left."""
        return self.whole * (1 - self.part)

    def left(self, kernels: Mapping[Kernel, int]) -> float:
        """Return the part of the time that `kernels` take."""
        return self.times.total(kernels) / self.whole

    def met_by(self, kernels: Mapping[Kernel, int]) -> bool:
        """Return whether `kernels` take little enough."""
        return self.times.total(kernels) <= self.most

    def seconds(self, program: Program) -> float:
        """Return what a program takes."""
        return self.times.total(Costs(analyze(program)).kernels({}))

    def refusal(self, seconds: float) -> str:
        """Say that a program of so many seconds is too slow; "" where it is not."""
        if seconds <= self.most:
            return ""
        share = 1 - seconds / self.whole
        return f"it is too slow: {share:.3g} of the latency goes, and {self.part:g} has to"
