"""From scores and a budget to a plan's cuts."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from graphprune.analysis.coupling import Coupling, Group
from graphprune.analysis.roles import Role
from graphprune.criteria import Scores
from graphprune.errors import NothingToPrune, SelectionError
from graphprune.ir.provenance import layer_of
from graphprune.plan.plan import Cut
from graphprune.selection.cost import Cost, Costs

Scope = Literal["group", "global"]
Normalise = Literal["none", "mean", "max", "sum", "l2"]

TARGETS: dict[str, tuple[Role, ...]] = {
    "ffn": ("ffn", "expert-unit"),
    "experts": ("expert",),
    "kv-heads": ("kv-head",),
    "query-heads": ("query-slot",),
    "head-dim": ("head-dim",),
    "rope-dim": ("rope-pair",),
    "hidden": ("residual",),
    "channels": ("channel",),
}
"""Name of a pruning target -> the roles that it means."""


# -- which groups ---------------------------------------------------------------------------------


def target_groups(coupling: Coupling, target: str, skip: Iterable[str] = ()) -> list[Group]:
    """The groups that `target` means, without those that match a `skip` pattern.

    Parameters
    ----------
    coupling
        The analysis.
    target
        A key of `TARGETS`, "all" (every group whose removal equals zeroing its weight slices, but
        the residual stream), or a glob over group names.
    skip
        Globs over names of groups or of weights.

    Raises
    ------
    SelectionError
        When nothing matches, naming what there is; also for a `skip` pattern that matches nothing.
    """
    if target in TARGETS:
        found = [group for group in coupling.groups if group.role in TARGETS[target]]
    elif target == "all":
        found = [
            group
            for group in coupling.groups
            if group.role not in ("residual", "expert") and group.exactness != "approximate"
        ]
    else:
        found = [group for group in coupling.groups if fnmatchcase(group.name, target)]
    if not found:
        roles = sorted({group.role for group in coupling.groups})
        has = (
            f"its groups are {', '.join(roles)}" if roles else "it has no group that can be pruned"
        )
        raise SelectionError(f"target {target!r} matches no group of this program; {has}")
    for pattern in skip:
        matched = {group.name for group in coupling.groups if _matches(group, pattern)}
        if not matched:
            raise SelectionError(f"skip pattern {pattern!r} matches no group and no weight")
        found = [group for group in found if group.name not in matched]
    if not found:
        raise SelectionError(f"every group of target {target!r} is skipped")
    return found


def _matches(group: Group, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (group.name, *group.weights()))


def outer_layers(coupling: Coupling, first: int, last: int) -> set[str]:
    """Weights of the `first` and of the `last` numbered layers of every stack of layers.

    LLM-Pruner keeps the outer layers whole (Ma et al. 2305.11627, section 4.1): the first four and
    the last two of 32.

    Raises
    ------
    SelectionError
        When the program has no numbered layers.
    """
    stacks = _stacks(coupling)
    if not stacks:
        raise SelectionError("the program has no numbered layers to protect")
    return {name for layers in stacks for name in _outer(layers, first, last)}


def outer_groups(coupling: Coupling) -> set[str]:
    """Groups that lie in one of the outer layers of a deep stack, and are parts of blocks.

    The first eighth and the last sixteenth of the layers, rounded down: of 32 the first four and
    the last two, as LLM-Pruner keeps them (see `outer_layers`); of less than eight none.
    """
    outer = {
        name
        for layers in _stacks(coupling)
        for name in _outer(layers, len(layers) // 8, len(layers) // 16)
    }
    return {
        group.name
        for group in coupling.groups
        if group.role in _BLOCK_ROLES and outer.issuperset(group.weights())
    }


_BLOCK_ROLES: tuple[Role, ...] = (
    "ffn",
    "expert",
    "expert-unit",
    "kv-head",
    "query-slot",
    "head-dim",
)


def _stacks(coupling: Coupling) -> list[dict[int, list[str]]]:
    """The weights of every stack of numbered layers, by the number of the layer."""
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in coupling.program.weights:
        stack, _, number = layer_of(name.rpartition(".")[0]).rpartition(".")
        if number:
            stacks.setdefault(stack, {}).setdefault(int(number), []).append(name)
    return list(stacks.values())


def _outer(layers: Mapping[int, list[str]], first: int, last: int) -> Iterator[str]:
    for at, number in enumerate(sorted(layers)):
        if at < first or at >= len(layers) - last:
            yield from layers[number]


# -- how many and which units ---------------------------------------------------------------------


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
        "group": every group loses the same part. "global": the least important units of all groups
        go, wherever they are.
    normalise
        How scores of a group are made comparable with those of others, in scope "global".
    round_to
        Every group keeps a multiple of this many units (rounded up), where it has that many.
    sizes
        Group name -> the numbers of units that it may keep beside all of them, ascending, in place
        of the multiples of `round_to` (see `graphprune.analysis.kernel_sizes.liked_sizes`).
    params, macs, kv_bytes
        The part of the program's parameters, multiply-accumulates (of a prompt of
        `graphprune.selection.cost.TOKENS` tokens) and KV cache.
    first
        The coupling that the budgets refer to, where earlier steps have removed a part already; the
        groups have the same names in both. None: the one in hand.
    """

    ratio: float | None = None
    scope: Scope = "group"
    normalise: Normalise = "none"
    round_to: int = 1
    params: float | None = None
    macs: float | None = None
    kv_bytes: float | None = None
    first: Coupling | None = None
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.budgets:
            raise SelectionError("no budget: give one of ratio, params, macs and kv_bytes")
        for name, part in self.budgets.items():
            if not 0 <= part < 1:
                raise SelectionError(f"{name} {part:g} is not in [0, 1)")
        if self.round_to < 1:
            raise SelectionError(f"round_to {self.round_to} is not positive")

    def kept(self, group: Group, wanted: int) -> int:
        """How many units a group keeps where it should keep at least `wanted`."""
        step = min(self.round_to, group.size)
        sizes = self.sizes.get(group.name, range(step, group.size + 1, step))
        at = bisect_left(sizes, max(wanted, group.least))
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
        """The cuts that meet the budgets; groups that lose nothing have none.

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
            ``[size]``; by default their scores, normalised. They decide between groups in scope
            "global".

        Raises
        ------
        SelectionError
            When nothing would go, or a budget cannot be met.
        """
        choice = _Choice(self, coupling, groups, scores, margins or {})
        counts = choice.everywhere() if self.scope == "group" else choice.anywhere()
        cuts = [
            group.cut(lowest(scores[group.name], count))
            for group, count in zip(groups, counts, strict=True)
            if count
        ]
        if not cuts:
            sizes = ", ".join(sorted({str(group.size) for group in groups}))
            asked = " and ".join(f"{part:g} of the {_NOUNS[b]}" for b, part in self.budgets.items())
            kept = sorted({self._said(group) for group in groups})
            raise NothingToPrune(
                f"nothing to prune: {asked}, in groups of {sizes} units, kept in "
                f"{' and '.join(kept)}, is less than one unit"
            )
        return cuts

    def _said(self, group: Group) -> str:
        """What the units of a group are kept in."""
        sizes = self.sizes.get(group.name, ())
        if sizes and not isinstance(sizes, range):
            return f"one of {', '.join(map(str, sizes))}"
        return f"multiples of {sizes.step if isinstance(sizes, range) else self.round_to}"


class _Choice:
    """How many units each group loses: lists of counts, one for every group."""

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

    def everywhere(self) -> list[int]:
        """The same part of every group, as small as the budgets allow."""
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
            self._possible(budget, at(top))
        return at(_first(top, lambda level: all(self._met(b, at(level)) for b in costs)))

    def anywhere(self) -> list[int]:
        """The units with the lowest margins for what they save, until every budget is met."""
        counts = [0] * len(self.groups)
        while missing := [budget for budget in self.wanted if not self._met(budget, counts)]:
            taken = _Taken(counts, self._order(counts, missing))
            for budget in missing:
                self._possible(budget, taken(len(taken)))
            counts = self._until_one_is_met(missing, taken)
        return self._rounded(counts)

    def _until_one_is_met(self, missing: Sequence[Amount], taken: _Taken) -> list[int]:
        def met(number: int) -> bool:
            return any(self._met(budget, taken(number)) for budget in missing)

        return taken(_first(len(taken), met))

    def _ranked(self, group: Group, scores: Scores) -> Tensor:
        """The scores of a group from its least important unit on, the mean over its parents."""
        ranked = scores[group.name].reshape(-1, group.size).sort(dim=1).values.mean(0)
        return ranked / _scale(ranked, self.selector.normalise)

    def _order(self, counts: Sequence[int], missing: Sequence[Amount]) -> Tensor:
        """Indices of groups, one for each unit that can go, the best to go first."""
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
        """What one more unit of a group saves, in parts of what is missing of the budgets."""
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
        """What is left of what `budget` counts."""
        if budget == "ratio":
            return sum(group.size for group in self.groups) - sum(counts)
        pairs = zip(self.groups, counts, strict=True)
        # What a unit owns is its own: it matters which ones go, and not only how many.
        lost = {g.name: lowest(self.scores[g.name], n)[()] if g.owned() else n for g, n in pairs}
        return self.costs.after(budget, lost)

    def _wanted(self, budget: Amount, part: float) -> float:
        """What may be left of what `budget` counts."""
        if budget == "ratio":
            return sum(group.size for group in self.groups) - self._units(self.groups, part)
        before = self.before.after(budget, {})
        if not before:
            raise SelectionError(f"{budget}: the program has no {_NOUNS[budget]} to lose")
        return before * (1 - part)

    def _units(self, groups: Sequence[Group], part: float) -> int:
        """How many units of `groups` together are to go now."""
        first = self.selector.first
        now = sum(group.size for group in groups)
        before = now if first is None else sum(first.group(group.name).size for group in groups)
        return max(0, math.floor(before * part + 1e-9) - (before - now))

    def _met(self, budget: Amount, counts: Sequence[int]) -> bool:
        """Whether `counts` meet a budget: units as counted, costs as what they are rounded to."""
        if budget != "ratio":
            counts = self._rounded(counts)
        return self._amount(budget, counts) <= self.wanted[budget]

    def _possible(self, budget: Amount, most: Sequence[int]) -> None:
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
        """How many units a group can lose at most."""
        return group.size - self.selector.kept(group, 1)

    def _rounded(self, counts: Sequence[int]) -> list[int]:
        """At most `counts`, so that every group keeps a number of units that it may keep."""
        pairs = zip(self.groups, counts, strict=True)
        return [group.size - self.selector.kept(group, group.size - n) for group, n in pairs]


class _Taken:
    """Counts of groups after so many units of an order are taken."""

    def __init__(self, counts: Sequence[int], order: Tensor) -> None:
        self.counts, self.order = counts, order

    def __len__(self) -> int:
        return len(self.order)

    def __call__(self, number: int) -> list[int]:
        more = torch.bincount(self.order[:number], minlength=len(self.counts))
        return [count + extra for count, extra in zip(self.counts, more.tolist(), strict=True)]


def _first(top: int, met: Callable[[int], bool]) -> int:
    """The smallest number up to `top` for which `met` holds; it holds for all above."""
    low, high = 0, top
    while low < high:
        middle = (low + high) // 2
        if met(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _scale(scores: Tensor, how: Normalise) -> float:
    if how == "none":
        return 1.0
    scales: dict[str, Callable[[], Tensor]] = {
        "mean": scores.mean,
        "max": scores.max,
        "sum": scores.sum,
        "l2": scores.norm,
    }
    return float(scales[how]().abs()) or 1.0


def lowest(scores: Tensor, count: int) -> Mapping[tuple[int, ...], tuple[int, ...]]:
    """The `count` least important units under each parent; of equals the first go first."""
    places = itertools.product(*map(range, scores.shape[:-1]))
    rows = scores.reshape(-1, scores.shape[-1])
    order = torch.sort(rows, dim=1, stable=True).indices[:, :count]
    return {place: tuple(row.tolist()) for place, row in zip(places, order, strict=True)}
