"""Select the units that go, by scores and a budget."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.criteria import Scores
from graphprune.errors import NothingToPrune, SelectionError
from graphprune.plan.steps import Cut
from graphprune.selection.cost import Cost, Costs
from graphprune.selection.size_rules import SizeRule, nearest_size, sizes_that_do

Scope = Literal["local", "global"]
Normalize = Literal["none", "mean", "max", "sum", "l2"]

Amount = Literal["ratio"] | Cost
"""What a budget counts: units of the groups ("ratio"), or a cost of the whole program."""

_NOUNS: dict[Amount, str] = {
    "ratio": "units",
    "params": "parameters",
    "macs": "multiply-accumulates",
    "kv_bytes": "bytes of the KV cache",
}


@dataclass(frozen=True)
class Selector:
    """Chooses the units that go.

    A budget is the part that is to go, in [0, 1); at least one is given, and all that are given are
    met. In scope "global" the next unit to go is the one whose importance is lowest for what its
    group saves of the budgets that are not met yet (for units, every one saves the same).

    Parameters
    ----------
    ratio
        The part of the units of the groups.
    scope
        "local": every group loses the same part. "global": the least important units of all groups
        go, wherever they are.
    normalize
        How scores of a group are made comparable with those of others, in scope "global".
    round_to
        Every group keeps a multiple of this many units (rounded up), where it has that many.
    sizes
        Group name -> the numbers of units that it may keep beside all of them, ascending, in place
        of the multiples of `round_to` (see `graphprune.selection.kernel_sizes.preferred_sizes`).
    rules
        Group name -> what it may keep by rules of a config. Such a group keeps the nearest number
        that is accepted (`graphprune.selection.size_rules.nearest_size`), one of `sizes` if it can.
    params, macs, kv_bytes
        The part of the program's parameters, multiply-accumulates (of a prompt of
        `graphprune.selection.cost.TOKENS` tokens) and KV cache.
    first
        The coupling that the budgets refer to, where earlier steps have removed a part already; the
        groups have the same names in both. None: the one in hand.
    """

    ratio: float | None = None
    scope: Scope = "local"
    normalize: Normalize = "none"
    round_to: int = 1
    params: float | None = None
    macs: float | None = None
    kv_bytes: float | None = None
    first: Coupling | None = None
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    rules: Mapping[str, SizeRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.budgets:
            raise SelectionError("no budget: give one of ratio, params, macs and kv_bytes")
        for name, part in self.budgets.items():
            if not 0 <= part < 1:
                raise SelectionError(f"{name} {part:g} is not in [0, 1)")
        if self.round_to < 1:
            raise SelectionError(f"round_to {self.round_to} is not positive")

    def kept(self, group: Group, wanted: int) -> int:
        """Return how many units a group keeps where it should keep at least `wanted`.

        By a rule of a config it may be fewer.
        """
        step = min(self.round_to, group.size)
        sizes = self.sizes.get(group.name, range(step, group.size + 1, step))
        if (rule := self.rules.get(group.name)) is not None:
            return nearest_size(group.size, wanted, rule, least=group.min_units, preferred=sizes)
        at = bisect_left(sizes, max(wanted, group.min_units))
        return min(sizes[at], group.size) if at < len(sizes) else group.size

    @property
    def budgets(self) -> dict[Amount, float]:
        """The budgets that are given."""
        parts: dict[Amount, float | None] = {
            "ratio": self.ratio,
            "params": self.params,
            "macs": self.macs,
            "kv_bytes": self.kv_bytes,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def select(
        self,
        coupling: Coupling,
        groups: Sequence[Group],
        scores: Scores,
        margins: Mapping[str, Tensor] | None = None,
    ) -> list[Cut]:
        """Return the cuts that meet the budgets; groups that lose nothing have none.

        Parameters
        ----------
        coupling
            The analysis of the program in hand.
        groups
            Those that may lose units.
        scores
            Group name -> the importance of its units, ``[*parents' sizes, size]``: which of them go
            first.
        margins
            Group name -> what losing its least important unit costs, and the next, and so on,
            ``[size]``; by default their scores, normalized. They decide between groups in scope
            "global".

        Raises
        ------
        SelectionError
            When nothing would go, or a budget cannot be met.
        """
        search = _BudgetSearch(self, coupling, groups, scores, margins or {})
        counts = search.uniform_counts() if self.scope == "local" else search.global_counts()
        cuts = [
            group.cut(lowest_units(scores[group.name], count))
            for group, count in zip(groups, counts, strict=True)
            if count
        ]
        if not cuts:
            raise NothingToPrune(f"nothing to prune: {self._why_nothing(groups)}")
        return cuts

    def instead(self, groups: Iterable[Group]) -> dict[str, str]:
        """Say what each group is left with where a rule refuses what `ratio` asks for."""
        found = {}
        for group in groups:
            rule, wanted = self.rules.get(group.name), self._left_by_ratio(group)
            if rule is not None and wanted < group.size and (why := rule(wanted)):
                found[group.name] = f"{self.kept(group, wanted)} of {group.size}: {why}"
        return found

    def _left_by_ratio(self, group: Group) -> int:
        return group.size - math.floor(group.size * (self.ratio or 0) + 1e-9)

    def _why_nothing(self, groups: Sequence[Group]) -> str:
        """Say what was asked for, and the rule that is against it or that it is too little."""
        asked = " and ".join(f"{part:g} of the {_NOUNS[b]}" for b, part in self.budgets.items())
        for group in groups:
            rule, wanted = self.rules.get(group.name), self._left_by_ratio(group)
            if rule is not None and (why := rule(wanted)):
                others = sizes_that_do(group.size, rule, least=group.min_units, near=wanted)
                return (
                    f"{asked} leaves {wanted} of the {group.size} units of {group.name}, and {why}"
                    + (f"; {others} would do" if others else "")
                )
        sizes = ", ".join(sorted({str(group.size) for group in groups}))
        kept = " and ".join(sorted({self._kept_in(group) for group in groups}))
        return f"{asked}, in groups of {sizes} units, kept in {kept}, is less than one unit"

    def _kept_in(self, group: Group) -> str:
        """Return what the units of a group are kept in."""
        sizes = self.sizes.get(group.name, ())
        if sizes and not isinstance(sizes, range):
            return f"one of {', '.join(map(str, sizes))}"
        return f"multiples of {sizes.step if isinstance(sizes, range) else self.round_to}"


class _BudgetSearch:
    """Finds how many units each group loses: lists of counts, one for every group."""

    def __init__(
        self,
        selector: Selector,
        coupling: Coupling,
        groups: Sequence[Group],
        scores: Scores,
        margins: Mapping[str, Tensor],
    ) -> None:
        self.selector, self.groups, self.scores = selector, groups, scores
        self.costs = Costs(coupling)
        self.before = self.costs if selector.first is None else Costs(selector.first)
        self.margins = [
            margins[group.name] if group.name in margins else self._ranked(group, scores)
            for group in groups
        ]
        self.wanted = {
            budget: self._wanted(budget, part) for budget, part in selector.budgets.items()
        }

    def uniform_counts(self) -> list[int]:
        """Take the same part of every group, as small as the budgets allow."""
        ratio = self.selector.ratio
        shares = sorted({n / group.size for group in self.groups for n in range(group.size)})

        def at(level: int) -> list[int]:
            share = shares[level]
            found = [math.floor(group.size * share + 1e-9) for group in self.groups]
            return self._rounded([max(pair) for pair in zip(found, least, strict=True)])

        least = [0] * len(self.groups)
        if ratio is not None:
            least = [self._units([group], ratio) for group in self.groups]
        costs = [budget for budget in self.wanted if budget != "ratio"]
        top = len(shares) - 1
        for budget in costs:
            self._check_possible(budget, at(top))
        return at(_first(top, lambda level: all(self._met(b, at(level)) for b in costs)))

    def global_counts(self) -> list[int]:
        """Take the units with the lowest margins for what they save, until all budgets are met."""
        counts = [0] * len(self.groups)
        while missing := [budget for budget in self.wanted if not self._met(budget, counts)]:
            taken = _CountsAfter(counts, self._order(counts, missing))
            for budget in missing:
                self._check_possible(budget, taken(len(taken)))
            counts = self._until_one_is_met(missing, taken)
        return self._rounded(counts)

    def _until_one_is_met(self, missing: Sequence[Amount], taken: _CountsAfter) -> list[int]:
        def met(number: int) -> bool:
            return any(self._met(budget, taken(number)) for budget in missing)

        return taken(_first(len(taken), met))

    def _ranked(self, group: Group, scores: Scores) -> Tensor:
        """Sort the scores of a group, the lowest first, and take the mean over its parents."""
        ranked = scores[group.name].reshape(-1, group.size).sort(dim=1).values.mean(0)
        return ranked / _scale(ranked, self.selector.normalize)

    def _order(self, counts: Sequence[int], missing: Sequence[Amount]) -> Tensor:
        """Return indices of groups, one for each unit that can go, the best to go first."""
        prices = [self._saving(counts, index, missing) for index in range(len(self.groups))]
        ranks, owners = [], []
        for index, (group, price) in enumerate(zip(self.groups, prices, strict=True)):
            if price > 0:
                margins = self.margins[index][counts[index] : self._most(group)] / price
                ranks.append(margins)
                owners.append(torch.full((len(margins),), index))
        if not ranks:
            return torch.zeros(0, dtype=torch.int64)
        order = torch.sort(torch.cat(ranks), stable=True).indices
        return torch.cat(owners)[order]

    def _saving(self, counts: Sequence[int], index: int, missing: Sequence[Amount]) -> float:
        """Return what one more unit of a group saves, as a part of what the budgets lack."""
        if counts[index] >= self._most(self.groups[index]):
            return 0.0
        more = list(counts)
        more[index] += 1
        total = 0.0
        for budget in missing:
            now = self._amount(budget, counts)
            total += (now - self._amount(budget, more)) / (now - self.wanted[budget])
        return total

    def _amount(self, budget: Amount, counts: Sequence[int]) -> int:
        """Return what is left of what `budget` counts."""
        if budget == "ratio":
            return sum(group.size for group in self.groups) - sum(counts)
        lost: dict[str, int | tuple[int, ...]] = {}
        for group, count in zip(self.groups, counts, strict=True):
            # Weights that one unit owns may differ in size: which units go matters then.
            which = lowest_units(self.scores[group.name], count)[()] if group.owned() else count
            lost[group.name] = which
        return self.costs.after(budget, lost)

    def _wanted(self, budget: Amount, part: float) -> float:
        """Return what may be left of what `budget` counts."""
        if budget == "ratio":
            return sum(group.size for group in self.groups) - self._units(self.groups, part)
        before = self.before.after(budget, {})
        if not before:
            raise SelectionError(f"{budget}: the program has no {_NOUNS[budget]} to lose")
        return before * (1 - part)

    def _units(self, groups: Sequence[Group], part: float) -> int:
        """Return how many units of `groups` together are to go now."""
        first = self.selector.first
        now = sum(group.size for group in groups)
        before = now if first is None else sum(first.group(group.name).size for group in groups)
        return max(0, math.floor(before * part + 1e-9) - (before - now))

    def _met(self, budget: Amount, counts: Sequence[int]) -> bool:
        """Return whether `counts` meet a budget: units as counted, costs after rounding."""
        if budget != "ratio":
            counts = self._rounded(counts)
        return self._amount(budget, counts) <= self.wanted[budget]

    def _check_possible(self, budget: Amount, most: Sequence[int]) -> None:
        """Refuse a budget that is not even met when the groups lose `most`."""
        if self._met(budget, most):
            return
        asked = f"{self.selector.budgets[budget]:g} of the {_NOUNS[budget]} cannot go"
        if budget == "ratio":
            units = sum(group.size for group in self.groups)
            raise SelectionError(f"{asked}: these groups can lose {sum(most)} of {units}")
        before = self.before.after(budget, {})
        share = 1 - self._amount(budget, self._rounded(most)) / before
        raise SelectionError(f"{asked}: these groups hold at most {share:.3f}")

    def _most(self, group: Group) -> int:
        """Return how many units a group can lose at most."""
        return group.size - self.selector.kept(group, 1)

    def _rounded(self, counts: Sequence[int]) -> list[int]:
        """Lower `counts` so that every group keeps a number of units that it may keep."""
        pairs = zip(self.groups, counts, strict=True)
        return [group.size - self.selector.kept(group, group.size - n) for group, n in pairs]


class _CountsAfter:
    """Counts of groups after so many units of an order are taken."""

    def __init__(self, counts: Sequence[int], order: Tensor) -> None:
        self.counts, self.order = counts, order

    def __len__(self) -> int:
        return len(self.order)

    def __call__(self, number: int) -> list[int]:
        more = torch.bincount(self.order[:number], minlength=len(self.counts))
        return [count + extra for count, extra in zip(self.counts, more.tolist(), strict=True)]


def _first(top: int, met: Callable[[int], bool]) -> int:
    """Return the smallest number up to `top` for which `met` holds; it holds for all above."""
    low, high = 0, top
    while low < high:
        middle = (low + high) // 2
        if met(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _scale(scores: Tensor, how: Normalize) -> float:
    if how == "none":
        return 1.0
    scales: dict[str, Callable[[], Tensor]] = {
        "mean": scores.mean,
        "max": scores.max,
        "sum": scores.sum,
        "l2": scores.norm,
    }
    return float(scales[how]().abs()) or 1.0


def lowest_units(scores: Tensor, count: int) -> Mapping[tuple[int, ...], tuple[int, ...]]:
    """Return the `count` least important units under each parent; of equals the first."""
    parents = itertools.product(*map(range, scores.shape[:-1]))
    rows = scores.reshape(-1, scores.shape[-1])
    order = torch.sort(rows, dim=1, stable=True).indices[:, :count]
    return {index: tuple(row.tolist()) for index, row in zip(parents, order, strict=True)}
