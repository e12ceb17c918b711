"""Coupled groups as records: their units, their members in weights, and their names."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from graphprune.analysis.axes import Atom, Axis
from graphprune.analysis.roles import Role
from graphprune.errors import PlanError
from graphprune.plan.checks import check_change
from graphprune.plan.index_map import IndexMap
from graphprune.plan.steps import Cut

Exactness = Literal["exact", "rescaled", "approximate"]


@dataclass(frozen=True)
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

    def __str__(self) -> str:
        head = f"{self.name}: {self.size} units, {self.role}, {self.exactness}"
        lines = [head + (f" ({self.why})" if self.why else "")]
        if self.parents:
            lines.append(f"  chosen per unit of {', '.join(self.parents)}")
        for m in self.members:
            if m.owner is not None:
                lines.append(f"  {m.weight}: whole, of unit {m.owner}")
                continue
            loops = "".join(f" + {stride}*[0,{size})" for size, stride in m.outer)
            wide = f" + [0,{m.width})" if m.width > 1 else ""
            lines.append(f"  {m.weight} dim {m.dim}: {m.offset}{loops} + {m.width}*unit{wide}")
        return "\n".join(lines)


def group_names(members: Mapping[Atom, list[str]], roles: Mapping[Atom, Role]) -> dict[Axis, str]:
    """Return a stable name for each group: the module path of its weights, and its label."""
    names: dict[Axis, str] = {}
    taken: dict[str, int] = defaultdict(int)
    for atom, weights in members.items():
        path = common_path(weights)
        name = f"{path}:{roles[atom]}" if path else str(roles[atom])
        taken[name] += 1
        names[atom] = name if taken[name] == 1 else f"{name}.{taken[name]}"
    return names


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
