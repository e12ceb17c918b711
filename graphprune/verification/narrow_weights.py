"""The weights that a plan leaves, from its index maps alone, and back at their first shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step, WeightDim
from graphprune.weights.deferred import later


class NarrowWeights:
    """The weights that a plan leaves of others: removed indices left out, merged heads pooled.

    Nothing of the slicing in `graphprune.transforms` is shared, which this is compared with.

    Parameters
    ----------
    weights
        Those of the program that the plan was made for.
    plan
        The plan; weights that it says were edited have the values that it brings along.
    names
        The only weights to look at; None for all.

    Attributes
    ----------
    values
        The weights by name.
    gone
        The names of weights that go as a whole.
    origin
        (weight, dimension) -> for every old index the new one, or -1 where it is gone.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], plan: Plan, names: Collection[str] | None = None
    ) -> None:
        self._first = {n: w for n, w in weights.items() if names is None or n in names}
        self.values = dict(self._first)
        self.origin: dict[WeightDim, Tensor] = {}
        for step in plan.steps:
            self._follow(step)
        self.gone = {name for step in plan.steps for name in step.whole}
        for name in self.gone:
            self.values.pop(name, None)
        # What goes with its unit as a whole says nothing about the units of its own axes.
        self.origin = {at: old for at, old in self.origin.items() if at[0] not in self.gone}

    def widen(self, name: str) -> Tensor:
        """Return a weight at its first shape: copies of merged heads, zeros for what went."""
        if name not in self.values:
            return later(torch.zeros_like, self._first[name])
        value, dims = self.values[name], self._dims(name)

        def widened(weight: Tensor) -> Tensor:
            for dim, origin in dims:
                weight = weight.movedim(dim, 0)[origin.clamp(min=0)]
                weight[origin < 0] = 0
                weight = weight.movedim(0, dim)
            return weight

        return later(widened, value, self._first[name].shape) if dims else value

    def untold(self, name: str) -> Tensor:
        """Return a boolean mask, of the first shape, of elements that no later weight holds.

        They were removed, or are of merged heads but the first.
        """
        if name not in self.values:
            return torch.ones(self._first[name].shape, dtype=torch.bool)
        found = torch.zeros(self._first[name].shape, dtype=torch.bool)
        for dim, indices in self._untold(name):
            found.index_fill_(dim, indices, True)
        return found

    def is_told(self, name: str) -> bool:
        """Return whether later weights hold every element: `untold` is false everywhere."""
        return name in self.values and not any(len(found) for _, found in self._untold(name))

    def _untold(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield dimensions with the indices along them that no later weight holds."""
        for dim, origin in self._dims(name):
            kept = origin.clamp(min=0)
            firsts = torch.full((int(kept.max()) + 1,), len(origin))
            firsts.scatter_reduce_(0, kept, torch.arange(len(origin)), "amin")
            later = (origin < 0) | (torch.arange(len(origin)) > firsts[kept])
            yield dim, later.nonzero().flatten()

    def _dims(self, name: str) -> list[tuple[int, Tensor]]:
        return [(dim, origin) for (other, dim), origin in self.origin.items() if other == name]

    def _follow(self, step: Step) -> None:
        for at, gone in step.removed().items():
            if at[0] in self.values:
                size = self.values[at[0]].shape[at[1]]
                kept = [index for index in range(size) if index not in gone]
                moved = torch.full((size,), -1)
                moved[kept] = torch.arange(len(kept))
                self._shrink(at, kept, moved)
        for each in step.permutations:
            if each.weight in self.values:
                moved = torch.tensor(each.sources).argsort()
                self._shrink((each.weight, each.dim), each.sources, moved)
        for merge in step.merges:
            for weight, dim, runs in merge.runs():
                if weight in self.values:
                    self._pool((weight, dim), runs)

    def _pool(self, at: WeightDim, runs: list[list[int]]) -> None:
        name, dim = at
        members = torch.tensor(runs)

        def pooled(weight: Tensor) -> Tensor:
            weight = weight.clone().movedim(dim, 0)
            weight[members[:, 0]] = weight[members].double().mean(dim=1).to(weight.dtype)
            return weight.movedim(0, dim)

        self.values[name] = later(pooled, self.values[name])
        first = torch.arange(self.values[name].shape[dim])
        first[members] = members[:, :1].expand_as(members)
        kept = sorted(set(first.tolist()))
        moved = torch.empty(len(first), dtype=torch.long)
        moved[kept] = torch.arange(len(kept))
        self._shrink(at, kept, moved[first])

    def _shrink(self, at: WeightDim, kept: Sequence[int], moved: Tensor) -> None:
        """Keep only `kept`; `moved` tells where every index is found now (-1: nowhere)."""
        name, dim = at
        weight, stays = self.values[name], list(kept)
        origin = self.origin.get(at, torch.arange(weight.shape[dim]))
        self.origin[at] = torch.where(origin >= 0, moved[origin.clamp(min=0)], -1)
        self.values[name] = later(
            lambda old: old.movedim(dim, 0)[stays].movedim(0, dim).contiguous(),
            weight,
            [*weight.shape[:dim], len(stays), *weight.shape[dim + 1 :]],
        )
