"""From scores and a budget to a plan's cuts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from graphprune.axes import Axis
from graphprune.axes import Cut as AxisCut
from graphprune.coupling import Coupling, Group
from graphprune.criteria import Scores
from graphprune.errors import NothingToPrune, SelectionError
from graphprune.plan import Cut, cut_of
from graphprune.program import layer_of
from graphprune.roles import Role

Scope = Literal["group", "global"]
Budget = Literal["units", "parameters"]
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
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in coupling.program.weights:
        stack, _, number = layer_of(name.rpartition(".")[0]).rpartition(".")
        if number:
            stacks.setdefault(stack, {}).setdefault(int(number), []).append(name)
    if not stacks:
        raise SelectionError("the program has no numbered layers to protect")
    return {
        name
        for layers in stacks.values()
        for at, number in enumerate(sorted(layers))
        if at < first or at >= len(layers) - last
        for name in layers[number]
    }


# -- how many and which units ---------------------------------------------------------------------


@dataclass(frozen=True)
class Selector:
    """Chooses the units that go.

    Parameters
    ----------
    ratio
        Part that is removed, in [0, 1).
    scope
        "group": every group loses the same part. "global": the least important units of all groups
        go, wherever they are.
    budget
        What the ratio counts: "units" of the groups, or "parameters" of the whole program.
    normalise
        How scores of a group are made comparable with those of others, in scope "global".
    round_to
        Every group keeps a multiple of this many units (rounded up), where it has that many.
    first
        The coupling that the ratio refers to, where earlier steps have removed a part already; the
        groups have the same names in both. None: the one in hand.
    """

    ratio: float
    scope: Scope = "group"
    budget: Budget = "units"
    normalise: Normalise = "mean"
    round_to: int = 1
    first: Coupling | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise SelectionError(f"ratio {self.ratio} is not in [0, 1)")
        if self.round_to < 1:
            raise SelectionError(f"round_to {self.round_to} is not positive")

    def select(self, coupling: Coupling, groups: Sequence[Group], scores: Scores) -> list[Cut]:
        """The cuts that meet the budget; groups that lose nothing have none.

        Raises
        ------
        SelectionError
            When nothing would go, or the budget cannot be met.
        """
        counts = self._counts(coupling, groups, scores)
        cuts = [
            cut_of(group, _lowest(scores[group.name], count))
            for group, count in zip(groups, counts, strict=True)
            if count
        ]
        if not cuts:
            sizes = ", ".join(sorted({str(group.size) for group in groups}))
            raise NothingToPrune(
                f"nothing to prune: {self.ratio:g} of groups of {sizes} units, kept in multiples "
                f"of {self.round_to}, is less than one unit"
            )
        return cuts

    def _counts(self, coupling: Coupling, groups: Sequence[Group], scores: Scores) -> list[int]:
        if self.scope == "group":
            top = max(group.size for group in groups)
            levels = sorted({n / g.size for g in groups for n in range(g.size)}) if top else [0.0]

            def at(level: int) -> list[int]:
                part = levels[level]
                return [self._round(g, math.floor(g.size * part + 1e-9)) for g in groups]

            if self.budget == "units":
                return [self._round(g, self._wanted([g])) for g in groups]
            return self._meet(coupling, groups, at, len(levels) - 1)
        order = self._order(groups, scores)

        def first(count: int) -> list[int]:
            taken = [0] * len(groups)
            for index in order[:count]:
                taken[index] += 1
            return [self._round(g, n) for g, n in zip(groups, taken, strict=True)]

        if self.budget == "units":
            units = sum(group.size for group in groups)
            count = self._wanted(groups)
            if count > len(order):
                most = f"these groups can lose {len(order)} of {units}"
                raise SelectionError(f"{self.ratio:g} of the units cannot go: {most}")
            return first(count)
        return self._meet(coupling, groups, first, len(order))

    def _wanted(self, groups: Sequence[Group]) -> int:
        """How many units of `groups` together are to go now."""
        now = sum(group.size for group in groups)
        before = now if self.first is None else sum(self.first.group(g.name).size for g in groups)
        return max(0, math.floor(before * self.ratio + 1e-9) - (before - now))

    def _round(self, group: Group, count: int) -> int:
        """At most `count`, so that a positive multiple of `round_to` stays."""
        step = min(self.round_to, group.size)
        kept = max(step, group.least, math.ceil((group.size - count) / step) * step)
        return max(0, group.size - kept)

    def _meet(
        self,
        coupling: Coupling,
        groups: Sequence[Group],
        at: Callable[[int], list[int]],
        top: int,
    ) -> list[int]:
        """The smallest level at which enough parameters go; levels remove ever more."""
        before = (self.first or coupling).program.parameter_count()
        wanted = before * (1 - self.ratio)
        low, high = 0, top
        if parameters_after(coupling, groups, at(high)) > wanted:
            most = 1 - parameters_after(coupling, groups, at(high)) / before
            raise SelectionError(
                f"{self.ratio:g} of the parameters cannot go: these groups hold at most {most:.3f}"
            )
        while low < high:
            middle = (low + high) // 2
            if parameters_after(coupling, groups, at(middle)) <= wanted:
                high = middle
            else:
                low = middle + 1
        return at(high)

    def _order(self, groups: Sequence[Group], scores: Scores) -> list[int]:
        """Indices of groups, one for every unit, least important units first."""
        entries: list[tuple[float, int]] = []
        for index, group in enumerate(groups):
            ranked = scores[group.name].reshape(-1, group.size).sort(dim=1).values.mean(0)
            ranked = ranked / _scale(ranked, self.normalise)
            last = group.size - max(min(self.round_to, group.size), group.least)
            entries.extend((score, index) for score in ranked[:last].tolist())
        return [index for _, index in sorted(entries)]


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


def _lowest(scores: Tensor, count: int) -> Mapping[tuple[int, ...], tuple[int, ...]]:
    """The `count` least important units under each parent; of equals the first go first."""
    places = itertools.product(*map(range, scores.shape[:-1]))
    rows = scores.reshape(-1, scores.shape[-1])
    order = torch.sort(rows, dim=1, stable=True).indices[:, :count]
    return {place: tuple(row.tolist()) for place, row in zip(places, order, strict=True)}


def parameters_after(coupling: Coupling, groups: Sequence[Group], counts: Sequence[int]) -> int:
    """Parameters of the program when each of `groups` has lost `counts` units."""
    cuts: dict[Axis, AxisCut] = {
        coupling.atom(group.name): AxisCut(removed=tuple(range(count)))
        for group, count in zip(groups, counts, strict=True)
        if count
    }
    axes, total = coupling.types.axes, 0
    for name, node in coupling.program.weight_nodes():
        if coupling.program.kinds[name] == "parameter":
            total += math.prod(axes.kept_size(axis, cuts) for axis in coupling.types.of[node])
    return total
