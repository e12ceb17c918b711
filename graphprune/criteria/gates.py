"""Criteria on the loss's gradient at gates: the head importance of "Are Sixteen Heads ..."."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.matrices import Use
from graphprune.criteria.base import Criterion, Scores, ScoringContext
from graphprune.criteria.gradients import loss_walk


class Gate(Criterion):
    """Expected sensitivity of the loss to a gate on the unit: E_x |dL(x) / d xi| at xi = 1.

    The head importance of Michel et al. (1905.10650, equation 2), for any group: the gate stands
    where the unit's activations come into what sums over them, so that its gradient is the inner
    product of activation and gradient. Here the absolute value is taken of each sample, as in the
    paper's formula; `GateToken` and `GateBatch` take it where its published codes do.
    """

    name = "gate"
    requires_calibration = True
    comparable = True
    absolute: ClassVar[Literal["token", "sample", "batch"]] = "sample"

    def scores(self, context: ScoringContext) -> Scores:
        """Take gradients of gates of one, by the chain rule at the consumers' inputs.

        Raises
        ------
        SelectionError
            When nothing sums over a group.
        CalibrationError
            As `loss_gradients` does.
        """
        data, held = context.data(), context.consumers(self.name)
        totals = {
            group.name: torch.zeros(math.prod(context.sizes(group)), dtype=torch.float64)
            for group in context.groups
        }
        uses: dict[fx.Node, list[tuple[str, Use, Tensor]]] = {}
        for name, consumers in held.items():
            for matrix, units in consumers:
                for use in matrix.uses:
                    uses.setdefault(use.source, []).append((name, use, units))
        beside = {node for each in uses.values() for _, use, _ in each for node in use.picks}
        batches = list(data.singly() if self.absolute == "sample" else data.labeled())
        device = context.program.device
        sums = [{n: torch.zeros_like(t, device=device) for n, t in totals.items()} for _ in batches]

        def visit(
            number: int, values: Mapping[fx.Node, Any], gradients: Mapping[fx.Node, Tensor]
        ) -> None:
            for node, gradient in gradients.items():
                moved = {**values, node: values[node] * gradient}
                for name, use, units in uses[node]:
                    for part, rows in use.rows(moved):
                        gates = _gates(rows, units[part], len(totals[name]))
                        gates = gates.abs() if self.absolute == "token" else gates
                        sums[number][name] += gates.sum(0)

        walk = loss_walk(context, batches, nodes=uses, beside=beside, mean=False)
        for _ in walk.run(visit=visit, track=context.track):
            pass
        for of_batch in sums:
            for name, each in of_batch.items():
                totals[name] += each.abs().cpu()
        ranks.sum_of(totals.values())
        return {g.name: totals[g.name].view(context.sizes(g)) for g in context.groups}


class GateToken(Gate):
    """The scores of `gate` by the absolute value of every token (as the paper's authors' code)."""

    name = "gate-token"
    absolute = "token"


class GateBatch(Gate):
    """The scores of `gate` with the absolute value of every batch (transformers' ``bertology``)."""

    name = "gate-batch"
    absolute = "batch"


def _gates(rows: Tensor, units: Tensor, count: int) -> Tensor:
    """Sum over the columns of each unit: ``[n, units]``."""
    found = torch.zeros(len(rows), count + 1, dtype=torch.float64, device=rows.device)
    at = torch.where(units < 0, count, units).to(rows.device)
    return found.index_add_(1, at, rows.double())[:, :count]
