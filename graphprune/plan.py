"""Plans: which units of which groups go or merge, as plain data.

A plan holds, beside the units, the index map of every weight that a group reaches into. It can so
be printed, saved, reviewed, checked against a program and verified without the analysis that made
it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.coupling import Group, Member
from graphprune.errors import PlanError

if TYPE_CHECKING:
    from os import PathLike

    from graphprune.program import Program

_FORMAT = 1

Place = tuple[str, int]
"""(weight, dimension)"""

Removed = dict[str, dict[int, list[int]]]
"""Weight name -> dimension -> sorted indices."""


@dataclass(frozen=True)
class Cut:
    """The units of one group that go.

    Parameters
    ----------
    group, size, role
        The group, how many units it had, and what it is.
    units
        Indices of the parents' units (an empty tuple without parents) -> sorted units that go.
    parents
        Names of the groups that the keys of `units` index.
    members
        The index maps of the group.
    """

    group: str
    size: int
    role: str
    units: Mapping[tuple[int, ...], tuple[int, ...]]
    parents: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def count(self) -> int:
        """How many units go (under each parent)."""
        return len(next(iter(self.units.values()), ()))

    def indices(self) -> Iterator[tuple[str, int, list[int]]]:
        """(weight, dim, indices that go) of every member."""
        for member in self.members:
            found: set[int] = set()
            for place, units in self.units.items():
                at = dict(zip(self.parents, place, strict=True))
                for unit in units:
                    found.update(member.indices(unit, at))
            yield member.weight, member.dim, sorted(found)


@dataclass(frozen=True)
class Merge:
    """The KV heads of one attention, averaged in runs of neighbours.

    Parameters
    ----------
    group, size
        The group of KV heads and how many there were.
    groups
        How many are left; every run of ``size // groups`` neighbours becomes one.
    members
        The index maps of the group in key and value weights (query weights keep their heads).
    """

    group: str
    size: int
    groups: int
    members: tuple[Member, ...] = ()

    @property
    def width(self) -> int:
        """How many heads become one."""
        return self.size // self.groups

    def runs(self) -> Iterator[tuple[str, int, list[list[int]]]]:
        """(weight, dim, lists of indices that become one), sorted; each dimension once."""
        found: dict[Place, list[list[int]]] = defaultdict(list)
        for member in self.members:
            for first in range(0, self.size, self.width):
                heads = [member.indices(first + i) for i in range(self.width)]
                same = (list(indices) for indices in zip(*heads, strict=True))
                found[member.weight, member.dim].extend(same)
        for (weight, dim), runs in found.items():
            yield weight, dim, sorted(runs)


@dataclass(frozen=True)
class Step:
    """Cuts and merges that one pass decided, in the coordinates of the program it was given."""

    fingerprint: str
    cuts: tuple[Cut, ...] = ()
    merges: tuple[Merge, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Steps in order; see the module's docstring."""

    steps: tuple[Step, ...] = ()

    def __add__(self, other: Plan) -> Plan:
        return Plan((*self.steps, *other.steps))

    def __bool__(self) -> bool:
        return bool(self.steps)

    # -- in the coordinates of the first program --------------------------------------------------

    @property
    def removed(self) -> Removed:
        """Weight name -> dimension -> sorted indices that go, as the first program counts them.

        Merged heads are not removed; of a head that was merged and then removed all parts are.
        """
        origin: dict[Place, list[list[int]]] = {}
        removed: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for step in self.steps:
            for place, extent in _extents(step).items():
                origin.setdefault(place, [[index] for index in range(extent)])
            for (weight, dim), lost in _gone(step).items():
                for index in lost:
                    removed[weight][dim].update(origin[weight, dim][index])
            _advance(step, origin)
        return {
            weight: {dim: sorted(found) for dim, found in sorted(dims.items())}
            for weight, dims in removed.items()
        }

    # -- applying -------------------------------------------------------------------------------

    def apply(self, program: Program) -> Program:
        """Carry the plan out on `program`.

        Raises
        ------
        PlanError
            When the plan was made for another program.
        """
        from graphprune.rewrite import carry_out

        for step in self.steps:
            program = carry_out(program, step)
        return program

    def check(self, program: Program) -> None:
        """Refuse a program that the plan was not made for.

        Raises
        ------
        PlanError
            Naming both fingerprints.
        """
        if self.steps and self.steps[0].fingerprint != program.fingerprint():
            raise PlanError(
                f"the plan was made for program {self.steps[0].fingerprint}, "
                f"this one is {program.fingerprint()}"
            )

    # -- as text --------------------------------------------------------------------------------

    def to_json(self, indent: int | None = 1) -> str:
        """The plan as JSON text."""
        document = {
            "format": _FORMAT,
            "steps": [
                {
                    "fingerprint": step.fingerprint,
                    "cuts": [_cut_to_data(cut) for cut in step.cuts],
                    "merges": [dataclasses.asdict(merge) for merge in step.merges],
                }
                for step in self.steps
            ],
        }
        return json.dumps(document, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises
        ------
        PlanError
            When the text is no plan.
        """
        try:
            document = json.loads(text)
            if document["format"] != _FORMAT:
                raise PlanError(f"plan format {document['format']} is not {_FORMAT}")
            return cls(tuple(_step_from_data(step) for step in document["steps"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"not a plan: {type(error).__name__}: {error}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan from a file.

        Raises
        ------
        PlanError
            When the file is missing or holds no plan.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot be read: {error}") from error
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def __str__(self) -> str:
        if not self.steps:
            return "an empty plan"
        lines = []
        for number, step in enumerate(self.steps, start=1):
            lines.append(f"step {number}, for program {step.fingerprint}")
            for cut in step.cuts:
                each = f" per unit of {', '.join(cut.parents)}" if cut.parents else ""
                share = f"{cut.count} of {cut.size}"
                lines.append(f"  remove {share:>12} {cut.role} of {cut.group}{each}")
            for merge in step.merges:
                lines.append(
                    f"  merge {merge.size:>6} into {merge.groups} KV heads of {merge.group}"
                )
        return "\n".join(lines)


def cut_of(group: Group, units: Mapping[tuple[int, ...], tuple[int, ...]]) -> Cut:
    """The cut of `units` of `group`; without parents the only key is the empty tuple.

    Raises
    ------
    PlanError
        When a unit does not exist, parents lose unequally many, or nothing would be left.
    """
    ordered = {place: tuple(sorted(set(found))) for place, found in sorted(units.items())}
    counts = {len(found) for found in ordered.values()}
    if len(counts) != 1:
        raise PlanError(f"{group.name}: parents lose unequally many units ({sorted(counts)})")
    if any(not 0 <= unit < group.size for found in ordered.values() for unit in found):
        raise PlanError(f"{group.name}: it has only {group.size} units")
    if counts == {group.size}:
        raise PlanError(f"{group.name}: all of its {group.size} units would go")
    parents = group.parents if set(ordered) != {()} else ()
    return Cut(group.name, group.size, group.role, ordered, parents, group.members)


# -- coordinates --------------------------------------------------------------------------------


def _gone(step: Step) -> dict[Place, set[int]]:
    """The indices that the cuts of `step` remove, as the program before it counts them."""
    found: dict[Place, set[int]] = defaultdict(set)
    for cut in step.cuts:
        for weight, dim, indices in cut.indices():
            found[weight, dim].update(indices)
    return found


def _extents(step: Step) -> dict[Place, int]:
    """The size of every dimension that `step` changes, before it."""
    changes: tuple[Cut | Merge, ...] = (*step.cuts, *step.merges)
    return {(m.weight, m.dim): m.extent for change in changes for m in change.members}


def _advance(step: Step, origin: dict[Place, list[list[int]]]) -> None:
    """Bring the record of the first program's indices past `step`."""
    for place, lost in _gone(step).items():
        origin[place] = [o for index, o in enumerate(origin[place]) if index not in lost]
    for merge in step.merges:
        for weight, dim, runs in merge.runs():
            before = origin[weight, dim]
            fused = {run[0]: sorted(i for j in run for i in before[j]) for run in runs}
            later = {index for run in runs for index in run[1:]}
            origin[weight, dim] = [
                fused.get(index, old) for index, old in enumerate(before) if index not in later
            ]


# -- JSON ---------------------------------------------------------------------------------------


def _cut_to_data(cut: Cut) -> dict[str, Any]:
    return {
        "group": cut.group,
        "size": cut.size,
        "role": cut.role,
        "parents": list(cut.parents),
        "units": [[list(place), list(units)] for place, units in cut.units.items()],
        "members": [dataclasses.asdict(member) for member in cut.members],
    }


def _step_from_data(data: dict[str, Any]) -> Step:
    return Step(
        data["fingerprint"],
        tuple(
            Cut(
                cut["group"],
                cut["size"],
                cut["role"],
                {tuple(place): tuple(units) for place, units in cut["units"]},
                tuple(cut["parents"]),
                tuple(map(_member_from_data, cut["members"])),
            )
            for cut in data["cuts"]
        ),
        tuple(
            Merge(
                merge["group"],
                merge["size"],
                merge["groups"],
                tuple(map(_member_from_data, merge["members"])),
            )
            for merge in data["merges"]
        ),
    )


def _member_from_data(data: dict[str, Any]) -> Member:
    return Member(
        data["weight"],
        data["dim"],
        data["offset"],
        data["width"],
        data["extent"],
        tuple((size, stride) for size, stride in data["outer"]),
        tuple(data["outer_groups"]),
    )
