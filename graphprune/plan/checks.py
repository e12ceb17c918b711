"""Checks of a plan: those that need no program, and those against a given one."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, MutableMapping

from graphprune.errors import PlanError
from graphprune.plan.index_map import IndexMap
from graphprune.plan.steps import Branch, Cut, Merge, Step, WeightDim


def check_change(change: Cut | Merge) -> None:
    """Refuse what no program allows.

    Raises
    ------
    PlanError
        Naming the group.
    """
    name, size = change.group, change.size
    for member in change.members:
        _check_member(name, size, member)
    if isinstance(change, Cut):
        _check_units(change)
        return
    if change.groups < 1 or size % change.groups:
        raise PlanError(f"{name}: {change.groups} groups do not divide {size} KV heads")
    for permutation in (*change.deinterleaving, *change.reordering):
        if sorted(permutation.sources) != list(range(len(permutation.sources))):
            weight = permutation.weight
            raise PlanError(f"{name}: the permutation of {weight} does not name every index once")


def check_step(step: Step, sizes: MutableMapping[WeightDim, int]) -> None:
    """Refuse a step for another program than one of these `sizes`, and bring them past it.

    Raises
    ------
    PlanError
        Naming the group or weight.
    """
    _check_extents(step.cuts, sizes)
    _check_branches(step.branches, sizes)
    for at, lost in step.removed().items():
        if at in sizes:  # what goes with a branch is forgotten
            sizes[at] -= len(lost)
    _check_extents(step.merges, sizes)
    _check_permutations(step, sizes)
    for merge in step.merges:
        for weight, dim, runs in merge.runs():
            sizes[weight, dim] -= sum(len(run) - 1 for run in runs)


def _check_member(name: str, size: int, member: IndexMap) -> None:
    m = member
    if len(m.outer) != len(m.outer_groups):
        raise PlanError(f"{name}: {m.weight} has {len(m.outer)} loops, not as many groups")
    if m.owner is not None:
        if m.owner >= size or (m.dim, m.offset, m.width, m.outer) != (0, 0, m.extent, ()):
            raise PlanError(f"{name}: {m.weight} is not all of one unit")
        return
    last = m.offset + sum((loop - 1) * stride for loop, stride in m.outer) + size * m.width
    if last > m.extent:
        raise PlanError(f"{name}: it reaches beyond dimension {m.dim} of {m.weight}")


def _check_units(cut: Cut) -> None:
    name, size = cut.group, cut.size
    counts = {len(found) for found in cut.units.values()}
    if len(counts) != 1:
        raise PlanError(f"{name}: parents lose unequally many units ({sorted(counts)})")
    for found in cut.units.values():
        if any(not 0 <= unit < size for unit in found):
            raise PlanError(f"{name}: it has only {size} units")
        if list(found) != sorted(set(found)):
            raise PlanError(f"{name}: its units are not in order, each once")
    if counts == {size}:
        raise PlanError(f"{name}: all of its {size} units would go")
    loops: dict[str | None, int] = {}
    for m in cut.members:
        loops |= {group: n for group, (n, _) in zip(m.outer_groups, m.outer, strict=True)}
    sizes = [loops.get(parent, 0) for parent in cut.parents]
    if len(cut.units) != math.prod(sizes) or any(
        len(parents) != len(sizes) or not all(map(operator.lt, parents, sizes))
        for parents in cut.units
    ):
        raise PlanError(f"{name}: units are not given for every unit of its parents")


def _check_extents(changes: Iterable[Cut | Merge], sizes: MutableMapping[WeightDim, int]) -> None:
    for change in changes:
        for m in change.members:
            if (size := sizes.get((m.weight, m.dim))) != m.extent:
                found = f"dimension {m.dim} of {m.weight} is {size}, not {m.extent}"
                raise PlanError(f"{change.group}: {found}")


def _check_branches(branches: Iterable[Branch], sizes: MutableMapping[WeightDim, int]) -> None:
    """Refuse branches whose weights are not there or of other sizes, and forget these."""
    for branch in branches:
        for name, shape in branch.weights.items():
            found = {dim: size for (other, dim), size in sizes.items() if other == name}
            if found != dict(enumerate(shape)):
                now = f"of shape {tuple(found.values())}" if found else "missing"
                raise PlanError(f"{branch.name}: {name} is {now}, not of shape {shape}")
            for dim in found:
                del sizes[name, dim]


def _check_permutations(step: Step, sizes: MutableMapping[WeightDim, int]) -> None:
    """Refuse permutations of other dimensions, and two deinterleavings of one."""
    for each in step.permutations:
        if (size := sizes.get((each.weight, each.dim))) != len(each.sources):
            found = f"dimension {each.dim} of {each.weight} is {size}"
            raise PlanError(f"{found}, not {len(each.sources)}")
    seen: set[WeightDim] = set()
    for each in step.deinterleaving:
        if (each.weight, each.dim) in seen:
            raise PlanError(f"{each.weight} is permuted in two ways in one step")
        seen.add((each.weight, each.dim))
