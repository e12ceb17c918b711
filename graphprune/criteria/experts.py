"""Criteria for experts: how often a router chooses each, and what it then adds.

Where an expert ends is read from the graph: its last matrix is found by the units of its parts, and
from there rows are followed, through bias and gate, to the operator that adds them up.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.experts.outputs import ExpertOutputs, expert_outputs, own_matrices
from graphprune.calibration.data import own_batches
from graphprune.calibration.layerwise import BatchExecution, not_run, unpadded
from graphprune.calibration.segments import segments
from graphprune.criteria.base import Criterion, Scores, ScoringContext
from graphprune.ir.interpreter import ancestors


@dataclass(frozen=True)
class Rows:
    """Outputs of experts, one for each token that an expert computed: ``[rows]`` each.

    Parameters
    ----------
    tokens
        Number of the token that it is added to.
    units
        Which unit it comes from, counted over all parents.
    norms
        Its length as it is added.
    gates
        What it was multiplied with before; one where the graph multiplies no output.
    routed
        Whether it adds anything: some code computes all experts for all tokens.
    """

    tokens: Tensor
    units: Tensor
    norms: Tensor
    gates: Tensor
    routed: Tensor

    @classmethod
    def of(cls, outputs: ExpertOutputs, values: Mapping[fx.Node, Any]) -> Rows:
        """Return those of one contraction, from the values before they are added up."""
        norms = values[outputs.end].double().norm(dim=-1).flatten()
        gates = outputs.factors(values)
        units, tokens = outputs.units_of_rows(values), outputs.tokens(values)
        routed = (gates if outputs.gates else norms) != 0
        return cls(tokens.to(norms.device), units.to(norms.device), norms, gates.abs(), routed)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all `parts`."""
        return cls(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))

    @property
    def shares(self) -> Tensor:
        """Lengths with the gates of every token made to sum to one."""
        tokens, numbers = self.tokens.unique(return_inverse=True)
        sums = self.gates.new_zeros(len(tokens)).index_add_(0, numbers, self.gates)
        return torch.where(self.routed, self.norms / sums[numbers], 0)


# -- the criteria ----------------------------------------------------------------------------------


class ExpertCriterion(Criterion):
    """Scores experts by the rows that each computes on calibration data."""

    requires_calibration = True
    only = frozenset({"expert"})

    def scores(self, context: ScoringContext) -> Scores:
        """Run the data through the graph as far as the last experts.

        Raises
        ------
        SelectionError
            When a group is not one of experts whose outputs can be followed.
        CalibrationError
            Without calibration data that fit the program.
        """
        found = {
            group.name: expert_outputs(context.program, group, context.sizes(group))
            for group in context.groups
        }
        seen = {
            group.name: torch.zeros(2, math.prod(context.sizes(group)), dtype=torch.float64)
            for group in context.groups
        }
        for name, rows in _rows_of_all(context, found):
            shares, routed = rows.shares.cpu(), rows.routed.double().cpu()
            seen[name].index_add_(1, rows.units.cpu(), torch.stack([shares, routed]))
        ranks.sum_of(seen.values())
        return {
            group.name: self.of_sums(*seen[group.name]).view(context.sizes(group))
            for group in context.groups
        }

    @abstractmethod
    def of_sums(self, shares: Tensor, routed: Tensor) -> Tensor:
        """Return scores ``[units]`` of the sum of `Rows.shares` and the number of rows, of each."""


def _rows_of_all(
    context: ScoringContext, found: Mapping[str, Sequence[ExpertOutputs]]
) -> Iterator[tuple[str, Rows]]:
    """Yield the rows of every group and batch, by name of the group, as they are computed."""
    program = context.program
    at = {outputs.sum: (name, outputs) for name, each in found.items() for outputs in each}
    needed = ancestors([other for node in at for other in node.all_input_nodes])
    parts = [part.nodes for part in segments(program, among=needed | at.keys())]
    batches = list(unpadded(context.data()))
    own = [batches[index] for index in own_batches(batches)]
    idle = itertools.repeat(not_run(at.keys() - needed))
    executions = BatchExecution.of_all(program, own, parts, computes=idle)
    waiting: list[dict[str, list[Rows]]] = [defaultdict(list) for _ in executions]
    for part in context.track(parts, "counting what experts add"):
        for execution, held in zip(executions, waiting, strict=True):

            def look(
                node: fx.Node, values: Mapping[fx.Node, Any], held: dict[str, list[Rows]] = held
            ) -> None:
                if node in at:
                    name, outputs = at[node]
                    held[name].append(Rows.of(outputs, values))

            execution.advance(part, look)
            for name in [name for name, rows in held.items() if len(rows) == len(found[name])]:
                yield name, Rows.joined(held.pop(name))


class Reap(ExpertCriterion):
    """What an expert adds to the tokens that are sent to it: the mean of g ||f(x)|| over these.

    Router-weighted expert activation pruning (Lasby et al. 2510.13999, equation 9), with the gates
    g of the experts that a token is sent to made to sum to one. An expert that no token is sent to
    scores zero. It depends on the kind of text more than others do: 2603.18492 finds half of the
    experts chosen on web text worse for code than experts chosen without data.
    """

    name = "reap"

    def of_sums(self, shares: Tensor, routed: Tensor) -> Tensor:
        """Return the mean."""
        return shares / routed.clamp(min=1)


class Frequency(ExpertCriterion):
    """How many tokens are sent to an expert: the baseline of `reap`."""

    name = "frequency"

    def of_sums(self, shares: Tensor, routed: Tensor) -> Tensor:
        """Return the number."""
        return routed


class Aimer(Criterion):
    """How unlike each other the weights of an expert are: 1 - mean |w| / root mean w^2, no data.

    AIMER (Liu et al. 2603.18492) removes the experts whose absolute mean is largest for their root
    mean square, over all elements of an expert's matrices.
    """

    name = "aimer"
    only = frozenset({"expert"})

    def scores(self, context: ScoringContext) -> Scores:
        """Take sums over the matrices of every unit.

        Raises
        ------
        SelectionError
            When a group is not one of experts.
        """
        found = {}
        for group in context.track(context.groups, "scoring experts"):
            count = math.prod(context.sizes(group))
            sums = torch.zeros(3, count, dtype=torch.float64)
            for matrix, units in own_matrices(context.program, group, context.sizes(group)):
                parts = matrix.read(context.weight(matrix.weight)).flatten(1)
                for unit, part in zip(units.tolist(), parts, strict=True):
                    wide = part.double()
                    sums[:, unit] += torch.stack(
                        [wide.abs().sum(), wide.square().sum(), wide.new_tensor(len(wide))]
                    ).cpu()
            total, squares, number = sums
            ratio = total / (number * squares).sqrt().clamp(min=torch.finfo(sums.dtype).tiny)
            found[group.name] = (1 - ratio).view(context.sizes(group))
        return found
