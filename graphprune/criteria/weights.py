"""Criteria on single weights: a score of each element, summed over the slice of each unit."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphprune.analysis.groups import Group
from graphprune.criteria.base import Aggregate, Criterion, Scores, ScoringContext
from graphprune.criteria.units import sum_units
from graphprune.errors import SelectionError
from graphprune.ir.program import Program
from graphprune.plan.index_map import IndexMap

Measure = Literal["sum", "l1", "l2"]
"""How the elements of a slice become one number: their sum, sum of absolutes, or of squares."""


class WeightCriterion(Criterion):
    """Measures the slice of each unit in each weight of its group.

    Subclasses say what stands at each element (the weight itself, its gradient times the weight)
    and by which measure a slice is reduced.
    """

    measure: ClassVar[Measure]

    def scores(self, context: ScoringContext) -> Scores:
        """Reduce the slice of each unit in each weight, then combine the weights of the group.

        Raises
        ------
        SelectionError
            When the program was captured on the meta device.
        """
        per_weight: dict[str, dict[str, Tensor]] = {group.name: {} for group in context.groups}
        stands_for = {group.name: _stands_for(group) for group in context.groups}
        members = _members_by_weight(context)
        names = context.parameters()
        if any(context.program.weights[name].is_meta for name in names):
            raise SelectionError(f"{self.name}: the program was captured without weights to score")
        for name, elements in context.track(self.elements(context, names), "scoring weights"):
            dims = {member.dim for _, member in members[name]}
            lines = {dim: _reduce(elements, dim, self.measure) for dim in dims}
            for group, member in members[name]:
                found, slot = per_weight[group.name], stands_for[group.name][name]
                score = sum_units(lines[member.dim], group, member)
                found[slot] = found[slot] + score if slot in found else score
        order = _use_order(context.program)
        finished = {
            group: [self.finish(found[name]) for name in sorted(found, key=order.__getitem__)]
            for group, found in per_weight.items()
        }
        return {group: _combine(found, context.aggregate) for group, found in finished.items()}

    @abstractmethod
    def elements(
        self, context: ScoringContext, names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, a tensor of the weight's shape) for the weights called `names`."""

    def finish(self, total: Tensor) -> Tensor:
        """Turn the reduced slices of one weight into scores."""
        return total


def _stands_for(group: Group) -> dict[str, str]:
    """Map weights of a group to the first of those that are one weight of all units together."""
    owned = group.owned()
    first = {at: name for name, at in reversed(owned.items())}
    return {name: first[owned[name]] if name in owned else name for name in group.weights()}


def _members_by_weight(context: ScoringContext) -> dict[str, list[tuple[Group, IndexMap]]]:
    found: dict[str, list[tuple[Group, IndexMap]]] = {}
    for group in context.groups:
        for member in group.members:
            found.setdefault(member.weight, []).append((group, member))
    return found


_BLOCK = 1 << 20
"""Elements that are reduced at once: few enough to stay in the processor's cache."""


def _reduce(elements: Tensor, dim: int, measure: Measure) -> Tensor:
    """Reduce all dimensions but `dim` in one pass over the elements; float64, on the CPU."""
    if elements.ndim == 1:
        elements = elements[:, None]
    others = [other for other in range(elements.ndim) if other != dim]
    wide = torch.promote_types(elements.dtype, torch.float32)
    rows = max(1, _BLOCK * len(elements) // elements.numel())
    lines = [
        _SINGLE[measure](block.to(wide)).sum(others).double() for block in elements.split(rows)
    ]
    return (torch.cat(lines) if dim == 0 else torch.stack(lines).sum(0)).cpu()


_SINGLE: dict[Measure, Callable[[Tensor], Tensor]] = {
    "sum": lambda elements: elements,
    "l1": Tensor.abs,
    "l2": Tensor.square,
}


def _use_order(program: Program) -> dict[str, int]:
    """Return for each weight when the graph first uses it."""
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    return {
        name: min((order[user] for user in node.users), default=0)
        for name, node in program.weight_nodes()
    }


def _combine(scores: Sequence[Tensor], aggregate: Aggregate) -> Tensor:
    """Combine scores in the weights of a group, given in the order of their use."""
    if aggregate == "last":
        return scores[-1]
    stacked = torch.stack(list(scores))
    if aggregate == "sum":
        return stacked.sum(0)
    if aggregate == "mean":
        return stacked.mean(0)
    return stacked.amax(0) if aggregate == "max" else stacked.prod(0)


class L1(WeightCriterion):
    """Sum of absolute weights of the slice (LLM-Pruner's L1; no root)."""

    name = "l1"
    measure: ClassVar[Measure] = "l1"

    def elements(
        self, context: ScoringContext, names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights themselves."""
        for name in names:
            yield name, context.weight(name)


class L2(L1):
    """Sum of squared weights of the slice (LLM-Pruner's L2; no root)."""

    name = "l2"
    measure = "l2"


class Magnitude(L2):
    """Another name for `l2`."""

    name = "magnitude"


class Random(Criterion):
    """Uniformly random scores: the baseline that every criterion must beat."""

    name = "random"

    def scores(self, context: ScoringContext) -> Scores:
        """Draw scores for each group from a seed of its name, whatever the order of groups."""
        found = {}
        for group in context.groups:
            seed = zlib.crc32(f"{context.seed}:{group.name}".encode())
            generator = torch.Generator().manual_seed(seed)
            sizes = context.sizes(group)
            found[group.name] = torch.rand(sizes, generator=generator, dtype=torch.float64)
        return found


class Order(Criterion):
    """The order of the units: the first matter most, as the pass `rotate` leaves them."""

    name = "order"

    def scores(self, context: ScoringContext) -> Scores:
        """Count backwards, alike under all parents."""
        return {
            group.name: torch.arange(group.size, 0, -1.0, dtype=torch.float64).expand(
                context.sizes(group)
            )
            for group in context.groups
        }
