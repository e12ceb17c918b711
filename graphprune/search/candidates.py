"""The recipes that could meet some budgets: what goes, by which criterion, and what follows."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graphprune.analysis.coupling import Coupling, analyze
from graphprune.analysis.groups import Group
from graphprune.criteria import criterion
from graphprune.errors import MergeError, SelectionError
from graphprune.passes.evolve import Evolve
from graphprune.passes.merge_kv_heads import MergeKvHeads
from graphprune.passes.prune import Prune
from graphprune.passes.reconstruct import Reconstruct
from graphprune.pipeline.pass_base import Pass
from graphprune.pipeline.pipeline import Pipeline
from graphprune.search.latency import Latency
from graphprune.selection.cost import Cost, Costs, Kernel
from graphprune.selection.targets import TARGETS, target_groups

WIDTHS, HEADS = ("ffn", "experts", "channels"), ("kv-heads", "query-heads")
"""Targets that are tried by themselves, and those that are tried beside these, too."""

DATA_FREE = "l2"
"""The criterion where nothing can be measured."""

Form = Literal["plain"] | None

Refit = Literal["none", "least-squares", "gradient"]

Budgets = Mapping[Cost, float]
"""What is to go, as a part of all there is."""

PARTS = 32
"""In how many steps the smallest part of units is looked for that meets a latency: wider kernels
may be faster, so that times have to be gone through one after the other."""


@dataclass(frozen=True)
class Candidate:
    """A recipe to be tried.

    Parameters
    ----------
    heads
        What makes fewer heads before anything else (or, merging them, after it); None for nothing.
    widths
        What prunes to meet the rest of the budgets; None where there is no rest.
    refit
        How what stays is refitted: not at all, by least squares, or its branches trained as well.
    search
        What searches for all that goes, in place of heads and widths; it refits by itself.
    """

    heads: Prune | MergeKvHeads | None
    widths: Prune | None
    refit: Refit = "none"
    search: Evolve | None = None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes, in the order in which they run."""
        if self.search is not None:
            return (self.search, *([Reconstruct("gradient")] if self.refit == "gradient" else []))
        pruned = [each for each in (self.heads, self.widths) if isinstance(each, Prune)]
        merged = [self.heads] if isinstance(self.heads, MergeKvHeads) else []
        trained = [Reconstruct("gradient")] if self.refit == "gradient" else []
        if not merged and trained:
            return (*pruned, *trained)
        refitted = [Reconstruct()] if self.refit != "none" and pruned else []
        return (*pruned, *refitted, *merged, *trained)

    @property
    def prunings(self) -> int:
        """How many passes prune, each with scores of its own."""
        return sum(isinstance(each, Prune) for each in self.passes)

    @property
    def criterion(self) -> str:
        """What scores units; "" where none are scored."""
        if self.search is not None:
            return self.search.criterion
        pruned = next((each for each in self.passes if isinstance(each, Prune)), None)
        return "" if pruned is None else str(pruned.criterion)

    @property
    def targets(self) -> tuple[str, ...]:
        """What is pruned."""
        pruned = (each for each in self.passes if isinstance(each, Prune))
        return tuple(dict.fromkeys(target for each in pruned for target in each.target))

    @property
    def alike(self) -> bool:
        """Whether all layers lose the same, as a config of equal layers wants it."""
        pruned = (each for each in self.passes if isinstance(each, Prune))
        return self.search is None and all(each.scope == "local" for each in pruned)

    def by(self, criterion: str) -> Candidate:
        """Return the same with units scored by another criterion."""
        heads, widths = self.heads, self.widths
        if isinstance(heads, Prune):
            heads = dataclasses.replace(heads, criterion=criterion)
        if widths is not None:
            widths = dataclasses.replace(widths, criterion=criterion)
        return Candidate(heads, widths, self.refit)

    def refitted(self) -> Candidate:
        """Return the same with what stays refitted."""
        return dataclasses.replace(self, refit="least-squares")

    def trained(self) -> Candidate:
        """Return the same with its branches trained as well."""
        return dataclasses.replace(self, refit="gradient")

    def everywhere(
        self, normalize: Literal["none", "loss"], targets: Sequence[str] = ()
    ) -> Candidate:
        """Return the same with units taken from wherever they are missed least.

        In all `targets`, or where it took them from before.
        """
        assert self.widths is not None, "there is something to take them from"
        widths = dataclasses.replace(
            self.widths,
            target=tuple(targets) or self.widths.target,
            scope="global",
            normalize=normalize,
        )
        return dataclasses.replace(self, widths=widths)

    def pipeline(self, kept: str | None = None) -> Pipeline:
        """Return the passes; where a place is named, the first one keeps there what it measures.

        That is a file for scores, and a folder for a search.
        """
        first, *rest = self.passes or (None,)
        if kept is not None and isinstance(first, Prune):
            first = dataclasses.replace(first, scores=kept)
        elif kept is not None and isinstance(first, Evolve):
            first = dataclasses.replace(first, folder=kept)
        return Pipeline([first, *rest] if first is not None else [])

    def __str__(self) -> str:
        """Return the text of the passes."""
        return str(self.pipeline())


def candidates(
    coupling: Coupling,
    budgets: Budgets,
    targets: Sequence[str] = (),
    *,
    plain: bool = False,
    latency: Latency | None = None,
) -> list[Candidate]:
    """Return the ways to meet `budgets` in which all layers lose the same.

    Units are scored by `DATA_FREE`; what else is tried follows from these
    (`Candidate.by`, `Candidate.refitted`, `Candidate.trained`, `Candidate.everywhere`).

    Parameters
    ----------
    coupling
        The analysis of the program.
    budgets
        What is to go.
    targets
        What may be pruned; left out, whatever of `WIDTHS` and `HEADS` the program has.
    plain
        Whether groups keep only sizes that the config accepts.
    latency
        What is to go of the time, beside the budgets.

    Raises
    ------
    SelectionError
        When there is no budget, a target matches nothing, or nothing meets the budgets: says how
        much could go at most.
    """
    if not budgets and latency is None:
        raise SelectionError("no budget: give one of params, macs, kv_bytes and latency")
    form: Form = "plain" if plain else None
    known = _Known(coupling, targets)
    rest: dict[Cost, float] = {cost: part for cost, part in budgets.items() if cost != "kv_bytes"}
    found: list[Candidate] = []
    ways = [_Way(None, {}, known.costs.kernels)]
    if "kv_bytes" in budgets:
        ways = list(known.fewer_kv_heads(budgets["kv_bytes"], form))
    elif rest or latency is not None:
        ways += known.one_head_less(form)
    for way in ways:
        heads, saved = way.step, way.saved
        left = known.left(rest, saved, before=isinstance(heads, Prune))
        if not left and known.ratio(latency, way, ()) == 0:
            found.append(Candidate(heads, None))
            continue
        taken = set(heads.target) if isinstance(heads, Prune) else set[str]()
        for names in known.sets:
            # Heads that a merge has made fewer stay as many as they are.
            spoken_for = taken or ({"kv-heads"} if heads is not None else set())
            if spoken_for.isdisjoint(names) and known.reaches(rest, names, saved):
                ratio = known.ratio(latency, way, names)
                if ratio is None:
                    continue
                widths = Prune(
                    names,
                    ratio=ratio or None,
                    criterion=DATA_FREE,
                    scope="local",
                    form=form,
                    params=left.get("params"),
                    macs=left.get("macs"),
                )
                found.append(Candidate(heads, widths))
    if not found:
        raise SelectionError(known.why_not(budgets, latency))
    return found


def too_slow(coupling: Coupling, targets: Sequence[str], latency: Latency) -> list[str]:
    """Return the targets that do not meet a latency by themselves, whatever they lose."""
    known = _Known(coupling, targets)
    return [name for name in known.groups if known.time_share((name,), latency) < latency.part]


def scores_all(name: str, coupling: Coupling, targets: Iterable[str]) -> bool:
    """Return whether the criterion called `name` scores whatever is pruned of `targets`."""
    only = criterion(name).only
    held = (group for target in targets for group in target_groups(coupling, target))
    return not only or all(group.role in only for group in held)


@dataclass(frozen=True)
class _Way:
    """What makes fewer heads, if anything does, and what it saves.

    Parameters
    ----------
    step
        The pass.
    saved
        The parts of costs that it saves.
    kernels
        The kernels that are left once groups, by name, have lost units as well.
    """

    step: Prune | MergeKvHeads | None
    saved: dict[Cost, float]
    kernels: Callable[[Mapping[str, int]], Counter[Kernel]]


class _Known:
    """What is known of a program: the targets that it has, and what they hold."""

    def __init__(self, coupling: Coupling, targets: Sequence[str]) -> None:
        self.coupling, self.costs = coupling, Costs(coupling)
        named = {name: target_groups(coupling, name) for name in targets}
        self.groups: dict[str, list[Group]] = named or dict(self._usual())
        if not self.groups:
            self.groups = {"all": target_groups(coupling, "all")}

    def _usual(self) -> Iterator[tuple[str, list[Group]]]:
        for name in (*WIDTHS, *HEADS):
            found = [g for g in self.coupling.groups if g.role in TARGETS[name]]
            if any(group.size > group.min_units for group in found):
                yield name, found

    @property
    def sets(self) -> list[tuple[str, ...]]:
        """The targets one by one, heads beside each of the others, and all together."""
        heads = [name for name in self.groups if name in HEADS]
        pairs = [(n, head) for n in self.groups if n not in HEADS for head in heads]
        return list(dict.fromkeys([*((n,) for n in self.groups), *pairs, tuple(self.groups)]))

    def total(self, cost: Cost, lost: Mapping[str, int] | None = None) -> int:
        """Return a cost of the program once groups have lost units."""
        return self.costs.after(cost, lost or {})

    def most(self, names: Iterable[str]) -> dict[str, int]:
        """Return the most units that the groups of targets can lose."""
        return {g.name: g.size - g.min_units for name in names for g in self.groups[name]}

    def reaches(self, rest: Budgets, names: Sequence[str], saved: Budgets) -> bool:
        """Return whether targets hold enough, where a part is `saved` already."""
        return all(self.share(c, names) + saved.get(c, 0) >= part for c, part in rest.items())

    def share(self, cost: Cost, names: Sequence[str]) -> float:
        """Return the part of a cost that targets can lose at most."""
        whole = self.total(cost)
        return 1 - self.total(cost, self.most(names)) / whole if whole else 0.0

    def left(self, rest: Budgets, saved: Budgets, *, before: bool) -> dict[Cost, float]:
        """Return what is left of budgets once a part is `saved`, rounded up.

        Where that is saved `before`, as a part of what there is then.
        """
        found: dict[Cost, float] = {}
        for cost, part in rest.items():
            gone = saved.get(cost, 0.0)
            wanted = (part - gone) / (1 - gone if before else 1)
            if wanted > 0:
                found[cost] = math.ceil(wanted * 10**6) / 10**6 if gone else part
        return found

    def ratio(self, latency: Latency | None, way: _Way, names: Sequence[str]) -> float | None:
        """Return the part of the units of targets that goes for a latency; None for no way."""
        groups = [group for name in names for group in self.groups[name]]
        for step in range(PARTS if groups else 1):
            counts = {g.name: math.floor(g.size * step / PARTS + 1e-9) for g in groups}
            lost = {g.name: min(counts[g.name], g.size - g.min_units) for g in groups}
            if latency is None or latency.met_by(way.kernels(lost)):
                return step / PARTS
        return None

    def time_share(self, names: Sequence[str], latency: Latency) -> float:
        """Return the part of the time that targets can lose at most."""
        return 1 - latency.left(self.costs.kernels(self.most(names)))

    def one_head_less(self, form: Form) -> Iterator[_Way]:
        """Yield, for each kind of heads, that every attention loses one under each parent."""
        for name in HEADS:
            groups = [g for g in self.groups.get(name, ()) if g.size > g.min_units]
            if not groups or len({group.size for group in groups}) > 1 or len(self.groups) < 2:
                continue
            ratio = math.ceil(10**6 / groups[0].size) / 10**6
            step = Prune((name,), ratio=ratio, criterion=DATA_FREE, scope="local", form=form)
            yield self._losing(step, {group.name: 1 for group in groups})

    def fewer_kv_heads(self, part: float, form: Form) -> Iterator[_Way]:
        """Yield the ways to make the KV cache smaller by at least `part`."""
        groups = [group for group in self.coupling.groups if group.role == "kv-head"]
        lost = {g.name: min(math.ceil(g.size * part - 1e-9), g.size - g.min_units) for g in groups}
        whole = self.total("kv_bytes")
        if not whole:
            raise SelectionError("kv_bytes: the program has no KV cache to lose")
        if self.total("kv_bytes", lost) > whole * (1 - part):
            most = {group.name: group.size - group.min_units for group in groups}
            share = 1 - self.total("kv_bytes", most) / whole
            raise SelectionError(f"kv_bytes {part:g} cannot go: KV heads hold at most {share:.3g}")
        step = Prune(("kv-heads",), kv_bytes=part, criterion=DATA_FREE, scope="local", form=form)
        yield self._losing(step, lost)
        yield from self._merges(groups, part, form)

    def _merges(self, groups: Sequence[Group], part: float, form: Form) -> Iterator[_Way]:
        """Yield the merge into the most heads that are few enough, where there is one."""
        sizes = {group.size for group in groups}
        fit = [n for n in range(1, max(sizes)) if n <= min(sizes) * (1 - part) + 1e-9]
        fit = [count for count in fit if all(size % count == 0 for size in sizes)]
        if not fit:
            return
        merge = MergeKvHeads(fit[-1], form=form)
        program = self.coupling.program
        try:
            mean = dataclasses.replace(merge, init="mean")
            after = Costs(analyze(Pipeline([mean]).run(program).program))
        except MergeError:
            return
        saved = {c: 1 - after.after(c, {}) / self.total(c) for c in self._counted}
        yield _Way(merge, saved, after.kernels)

    @property
    def _counted(self) -> list[Cost]:
        return [cost for cost in ("params", "macs") if self.total(cost)]

    def _losing(self, step: Prune, lost: Mapping[str, int]) -> _Way:
        """Return a step that takes units away."""
        saved = {cost: 1 - self.total(cost, lost) / self.total(cost) for cost in self._counted}
        return _Way(step, saved, lambda more: self.costs.kernels({**lost, **more}))

    def why_not(self, budgets: Budgets, latency: Latency | None) -> str:
        """Say how much could go of what is asked for."""
        sets = self.sets
        asked = [f"{cost} {part:g}" for cost, part in budgets.items()]
        most = [f"{max(self.share(c, names) for names in sets):.3g} of {c}" for c in budgets]
        if latency is not None:
            share = max(self.time_share(names, latency) for names in sets)
            asked.append(f"latency {latency.part:g}")
            most.append(f"{share:.3g} of latency")
        held = ", ".join(self.groups)
        return f"nothing meets {' and '.join(asked)}: {held} can lose at most {' and '.join(most)}"
