"""Coupled groups as records: their units, their members in weights, and their names."""

from __future__ import annotations

import html
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphprune.analysis.axes import Atom, Axis
from graphprune.analysis.index_maps import unit_indices
from graphprune.analysis.roles import Role
from graphprune.errors import PlanError
from graphprune.plan.checks import check_change
from graphprune.plan.index_map import IndexMap
from graphprune.plan.steps import Cut

Exactness = Literal["exact", "rescaled", "approximate"]


@dataclass(frozen=True, repr=False)
class Group:
    """A coupled group: removing a unit removes its slice of every member.

    Parameters
    ----------
    name
        Stable name: the module that the members share, and what the group is.
    size
        Number of units.
    role
        What the axis does in the graph.
    exactness
        "exact" where removing equals zeroing, "rescaled" where a mean's divisor has to be kept,
        "approximate" where a normalization's statistics change.
    why
        Why it is not exact ("" when it is).
    members
        Every occurrence of the group in a weight.
    parents
        Groups under each of whose units this one may lose other units (equally many).
    min_units
        How many units must stay: 1, or as many experts as are chosen at once.
    """

    name: str
    size: int
    role: Role
    exactness: Exactness
    why: str
    members: tuple[IndexMap, ...]
    parents: tuple[str, ...] = ()
    min_units: int = 1

    @property
    def is_zeroing(self) -> bool:
        """True where removing units equals zeroing their slices of the weights."""
        return self.exactness == "exact" and self.role != "expert"

    def cut(self, units: Mapping[tuple[int, ...], tuple[int, ...]]) -> Cut:
        """Return the cut that takes `units`; without parents the only key is the empty tuple.

        Raises
        ------
        PlanError
            When a unit does not exist, parents lose unequally many, or nothing would be left.
        """
        ordered = {at: tuple(sorted(set(found))) for at, found in sorted(units.items())}
        parents = self.parents if set(ordered) != {()} else ()
        cut = Cut(self.name, self.size, self.role, ordered, parents, self.members)
        check_change(cut)
        if self.size - cut.count < self.min_units:
            raise PlanError(
                f"{self.name}: {self.min_units} of its units are chosen at once and must stay"
            )
        return cut

    def weights(self) -> list[str]:
        """Return the names of the weights it reaches into, each once."""
        return list(dict.fromkeys(member.weight for member in self.members))

    def owned(self) -> dict[str, int]:
        """Weight that one unit owns -> which of the unit's weights it is, counted from 0.

        Those that are the same one of their units stand in place of one weight of all of them.
        """
        taken: dict[int, int] = defaultdict(int)
        found: dict[str, int] = {}
        for member in self.members:
            if member.owner is not None:
                found[member.weight] = taken[member.owner]
                taken[member.owner] += 1
        return found

    @property
    def summary(self) -> str:
        """One line: name, units, role, exactness with its reason, and number of weights."""
        why = f" ({self.why})" if self.why else ""
        head = f"{self.name}: {self.size} units, {self.role}, {self.exactness}{why}"
        return f"{head}, in {len(self.weights())} weights"

    def __repr__(self) -> str:
        return f"<Group {self.summary}>"

    def __str__(self) -> str:
        head = f"{self.name}: {self.size} units, {self.role}, {self.exactness}"
        lines = [head + (f" ({self.why})" if self.why else "")]
        if self.parents:
            lines.append(f"  chosen per unit of {', '.join(self.parents)}")
        lines += [f"  {where}: {held}" for where, held in map(_placed, self.members)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the members as a table, for notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(where)}</td><td><code>{html.escape(held)}</code></td></tr>"
            for where, held in map(_placed, self.members)
        )
        return (
            f"<p>{html.escape(self.summary)}</p>"
            f"<table><tr><th>weight</th><th>indices of a unit</th></tr>{rows}</table>"
        )


def _placed(member: IndexMap) -> tuple[str, str]:
    """Return where a member lies, and which indices a unit has there."""
    if member.owner is not None:
        return member.weight, f"whole, of unit {member.owner}"
    loops = "".join(f" + {stride}*[0,{size})" for size, stride in member.outer)
    wide = f" + [0,{member.width})" if member.width > 1 else ""
    return (
        f"{member.weight} dim {member.dim}",
        f"{member.offset}{loops} + {member.width}*unit{wide}",
    )


def group_names(members: Mapping[Atom, list[str]], roles: Mapping[Atom, Role]) -> dict[Axis, str]:
    """Return a stable name for each group: where it lies, and what it is.

    That is the path of the module that its weights share. Where they share none, or another group
    of the kind lies there, it is the module of its first weight, or else of its last.
    """
    shared = {atom: common_path(weights) for atom, weights in members.items()}
    alone = {atom: path for atom, path in shared.items() if path or roles[atom] == "residual"}
    first = {atom: common_path(weights[:1]) for atom, weights in members.items()}
    last = {atom: common_path(weights[-1:]) for atom, weights in members.items()}
    names: dict[Axis, str] = {}
    taken: set[str] = set()
    for paths in (alone, first, last):
        found: dict[str, list[Atom]] = defaultdict(list)
        for atom in members.keys() - names.keys():
            if atom in paths:
                found[_name(paths[atom], roles[atom])].append(atom)
        for name, atoms in found.items():
            if len(atoms) == 1 and name not in taken:
                names[atoms[0]] = name
                taken.add(name)
    for atom in members:  # what is left lies in one module and is of one kind: it is numbered
        if atom in names:
            continue
        name = _name(first[atom], roles[atom])
        numbered = (name, *(f"{name}.{number}" for number in range(2, len(members) + 2)))
        names[atom] = next(each for each in numbered if each not in taken)
        taken.add(names[atom])
    return {atom: names[atom] for atom in members}


def earlier_names(members: Mapping[Atom, list[str]], roles: Mapping[Atom, Role]) -> dict[Atom, str]:
    """Return the names that groups had in plans and scores of earlier releases."""
    names: dict[Atom, str] = {}
    taken: dict[str, int] = defaultdict(int)
    for atom, weights in members.items():
        name = _name(common_path(weights), roles[atom])
        taken[name] += 1
        names[atom] = name if taken[name] == 1 else f"{name}.{taken[name]}"
    return names


def _name(path: str, role: Role) -> str:
    return f"{path}:{role}" if path else str(role)


def common_path(weights: Iterable[str]) -> str:
    """Return the dotted path of the module that all `weights` share."""
    common: list[str] | None = None
    for weight in dict.fromkeys(weights):
        parts = weight.split(".")[:-1]
        if common is None:
            common = parts
            continue
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(common, parts, strict=False)
        )
        common = [part for part, _ in same]
    return ".".join(common or [])


def unit_numbers(sizes: Sequence[int], group: Group, member: IndexMap, size: int) -> Tensor:
    """Return the unit of each index of a dimension, counted over all parents, or -1: ``[size]``.

    `sizes` are the sizes of the parents of `group`, and its own.
    """
    numbers = torch.arange(math.prod(sizes)).view(sizes)
    line = torch.full((size,), -1 if member.owner is None else member.owner)
    if member.owner is not None:
        return line
    indices = unit_indices(member, group.size)
    keep = [member.outer_groups.index(parent) for parent in group.parents]
    order = sorted(keep)
    numbers = numbers.permute(*(keep.index(dim) for dim in order), len(keep))
    shape = [1] * indices.ndim
    for dim, count in zip((*order, indices.ndim - 2), numbers.shape, strict=True):
        shape[dim] = count
    line[indices] = numbers.reshape(shape).expand_as(indices)
    return line
