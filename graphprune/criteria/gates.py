"""Criteria on the loss's gradient at gates: the head importance of "Are Sixteen Heads ..."."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphprune.calibration.data import inputs_of
from graphprune.criteria.base import Criterion, Scores, ScoringContext
from graphprune.criteria.gradients import finite_loss
from graphprune.ir.interpreter import Hooks, Interpreter, Values, given_of
from graphprune.ir.program import Program


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
        sources = {use.source for each in held.values() for m, _ in each for use in m.uses}
        batches = list(data.singly() if self.absolute == "sample" else data.labeled())
        for batch in context.track(batches, "taking gradients of gates"):
            values = _activations(context.program, batch, sources)
            for name, consumers in held.items():
                gates = [
                    _gates(rows, units[part], len(totals[name]))
                    for matrix, units in consumers
                    for use in matrix.uses
                    for part, rows in use.rows(values)
                ]
                if self.absolute == "token":
                    totals[name] += sum(each.abs().sum(0) for each in gates)
                else:
                    totals[name] += torch.stack([each.sum(0) for each in gates]).sum(0).abs()
        return {g.name: totals[g.name].view(context.sizes(g)) for g in context.groups}


class GateToken(Gate):
    """The scores of `gate` by the absolute value of every token (as the paper's authors' code)."""

    name = "gate-token"
    absolute = "token"


class GateBatch(Gate):
    """The scores of `gate` with the absolute value of every batch (transformers' ``bertology``)."""

    name = "gate-batch"
    absolute = "batch"


def _activations(
    program: Program, batch: Mapping[str, Tensor], sources: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """Return the values of nodes; those of `sources` are multiplied with the loss's gradient."""
    kept: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, value: Any, _: Mapping[fx.Node, Any]) -> Any:
        if node in sources and isinstance(value, Tensor):
            value = value if value.requires_grad else value.detach().requires_grad_()
            kept[node] = value
        return value

    given = given_of(program, inputs_of(batch))
    held = Values({node: keep(node, tensor.detach(), {}) for node, tensor in given.items()})
    (_, logits), *_ = program.output_nodes()
    with torch.enable_grad():
        Interpreter(held, Hooks(after=keep)).run(program.graph.nodes)
        loss = finite_loss(held[logits], batch)
        gradients = torch.autograd.grad(loss, list(kept.values()), allow_unused=True)
    values = {n: v.detach() if isinstance(v, Tensor) else v for n, v in held.items()}
    for (node, value), gradient in zip(kept.items(), gradients, strict=True):
        values[node] = torch.zeros_like(value) if gradient is None else value.detach() * gradient
    return values


def _gates(rows: Tensor, units: Tensor, count: int) -> Tensor:
    """Sum over the columns of each unit: ``[n, units]``."""
    found = torch.zeros(len(rows), count + 1, dtype=torch.float64)
    at = torch.where(units < 0, count, units)
    return found.index_add_(1, at, rows.double())[:, :count]
