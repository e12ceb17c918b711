"""The budgets of an evolution: what is to go of a program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from graphprune.analysis.coupling import Coupling
from graphprune.backends.onnx.kernel_times import KernelTimes
from graphprune.errors import SelectionError
from graphprune.evolution.space import Budget
from graphprune.selection.cost import Cost, Costs


def budgets_of(
    coupling: Coupling, parts: Mapping[str, float], times: KernelTimes | None = None
) -> list[Budget]:
    """Return the budgets of which a part is to go, by name.

    Parameters
    ----------
    coupling
        The analysis of the program.
    parts
        What is to go of costs (`graphprune.selection.cost.Cost`), and of "latency": the seconds of
        the matrix products and attentions of a prompt, added up.
    times
        What measures these.

    Raises
    ------
    SelectionError
        When there is nothing of one in the program.
    """
    costs, found = Costs(coupling), list[Budget]()

    def latency(lost: Mapping[str, int]) -> float:
        assert times is not None, "whoever asks for a latency has a provider"
        return times.total(costs.kernels(lost))

    for name, part in parts.items():

        def cost(lost: Mapping[str, int], name: str = name) -> float:
            return costs.after(cast(Cost, name), lost)

        left = latency if name == "latency" else cost
        if not left({}):
            raise SelectionError(f"{name}: the program has none to lose")
        found.append(Budget(name, part, left))
    return found
