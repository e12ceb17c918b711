"""Plans: which units of which groups go or merge, as plain data.

A plan holds, beside the units, the index map of every weight that a group reaches into. It can so
be printed, saved, reviewed, checked against a program and verified without the analysis that made
it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.io.atomic import staged_file
from graphprune.plan.index_map import IndexMap

if TYPE_CHECKING:
    from os import PathLike

    from graphprune.ir.program import Program

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
    members: tuple[IndexMap, ...] = ()

    @property
    def count(self) -> int:
        """How many units go (under each parent)."""
        return len(next(iter(self.units.values()), ()))

    @property
    def whole(self) -> list[str]:
        """The weights that go as a whole, with the units that own them."""
        gone = {unit for units in self.units.values() for unit in units}
        return [member.weight for member in self.members if member.owner in gone]

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
class Order:
    """Another order of a weight's places along one dimension.

    Parameters
    ----------
    weight, dim
        The weight and the dimension.
    places
        For every place, where what it holds now was before.
    """

    weight: str
    dim: int
    places: tuple[int, ...]


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
    orders
        How weights in which queries, keys and values were interleaved are laid out before that;
        the index maps count what is so laid out.
    moves
        How heads change their places first, in every weight that they reach into, so that those
        that become one are neighbours.
    """

    group: str
    size: int
    groups: int
    members: tuple[IndexMap, ...] = ()
    orders: tuple[Order, ...] = ()
    moves: tuple[Order, ...] = ()

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
    """Cuts and merges that one pass decided, in the coordinates of the program it was given.

    Merges come after the cuts, and count what those leave.
    """

    fingerprint: str
    cuts: tuple[Cut, ...] = ()
    merges: tuple[Merge, ...] = ()

    @property
    def orders(self) -> tuple[Order, ...]:
        """How weights are laid out anew between cuts and merges, one after the other."""
        moves = (order for merge in self.merges for order in merge.moves)
        return (*moves, *self.layouts)

    @property
    def layouts(self) -> tuple[Order, ...]:
        """How interleaved weights are laid out between cuts and merges, each once."""
        return tuple(dict.fromkeys(order for merge in self.merges for order in merge.orders))


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

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight name -> truth values of its shape: which elements go. Of `weights`, those that do.

        For groups whose removal is exact, a program with these elements at zero is the reference
        for the program without them.
        """
        found = {}
        for name, dims in self.removed.items():
            found[name] = torch.zeros(weights[name].shape, dtype=torch.bool)
            for dim, indices in dims.items():
                found[name].index_fill_(dim, torch.tensor(indices), True)
        return found

    def masked(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `weights` in which something goes, with zeros there."""
        return {n: weights[n].masked_fill(m, 0) for n, m in self.masks(weights).items()}

    # -- checking -------------------------------------------------------------------------------

    def check(self, program: Program) -> None:
        """Refuse a program that the plan was not made for.

        Raises
        ------
        PlanError
            Naming both fingerprints, or a weight that is not as the plan says.
        """
        if self.steps and self.steps[0].fingerprint != program.fingerprint():
            raise PlanError(
                f"the plan was made for program {self.steps[0].fingerprint}, "
                f"this one is {program.fingerprint()}"
            )
        sizes = {(n, d): s for n, w in program.weights.items() for d, s in enumerate(w.shape)}
        for step in self.steps:
            _match(step.cuts, sizes)
            for place, lost in _gone(step).items():
                sizes[place] -= len(lost)
            _match(step.merges, sizes)
            _match_orders(step, sizes)
            for merge in step.merges:
                for weight, dim, runs in merge.runs():
                    sizes[weight, dim] -= sum(len(run) - 1 for run in runs)

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
            _conform(document["steps"], _STEPS, "steps")
            plan = cls(tuple(map(_step_from_data, document["steps"])))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"not a plan: {type(error).__name__}: {error}") from error
        for step in plan.steps:
            changes: tuple[Cut | Merge, ...] = (*step.cuts, *step.merges)
            for change in changes:
                check_change(change)
        return plan

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON; a file that is there is replaced.

        Raises
        ------
        OutputError
            When it cannot be written.
        """
        with staged_file(path, overwrite=True) as file:
            file.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan from a file.

        Raises
        ------
        PlanError
            When the file is missing or holds no plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
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
                moved = ", reordered" if merge.moves else ""
                share = f"{merge.size:>6} into {merge.groups}"
                lines.append(f"  merge {share} KV heads of {merge.group}{moved}")
        return "\n".join(lines)


def check_change(change: Cut | Merge) -> None:
    """Refuse what no program allows.

    Raises
    ------
    PlanError
        Naming the group.
    """
    name, size = change.group, change.size
    for m in change.members:
        if len(m.outer) != len(m.outer_groups):
            raise PlanError(f"{name}: {m.weight} has {len(m.outer)} loops, not as many groups")
        if m.owner is not None:
            if m.owner >= size or (m.dim, m.offset, m.width, m.outer) != (0, 0, m.extent, ()):
                raise PlanError(f"{name}: {m.weight} is not all of one unit")
            continue
        last = m.offset + sum((loop - 1) * stride for loop, stride in m.outer) + size * m.width
        if last > m.extent:
            raise PlanError(f"{name}: it reaches beyond dimension {m.dim} of {m.weight}")
    if isinstance(change, Cut):
        _check_units(change)
        return
    if change.groups < 1 or size % change.groups:
        raise PlanError(f"{name}: {change.groups} groups do not divide {size} KV heads")
    for order in (*change.orders, *change.moves):
        if sorted(order.places) != list(range(len(order.places))):
            raise PlanError(f"{name}: {order.weight} is not laid out with every place once")


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
        len(place) != len(sizes) or not all(map(operator.lt, place, sizes)) for place in cut.units
    ):
        raise PlanError(f"{name}: units are not given for every unit of its parents")


def _match(changes: Iterable[Cut | Merge], sizes: Mapping[Place, int]) -> None:
    """Refuse index maps of dimensions that a program with these `sizes` does not have."""
    for change in changes:
        for m in change.members:
            if (size := sizes.get((m.weight, m.dim))) != m.extent:
                found = f"dimension {m.dim} of {m.weight} is {size}, not {m.extent}"
                raise PlanError(f"{change.group}: {found}")


def _match_orders(step: Step, sizes: Mapping[Place, int]) -> None:
    """Refuse orders of other dimensions, and two layouts of one."""
    for order in step.orders:
        if (size := sizes.get((order.weight, order.dim))) != len(order.places):
            found = f"dimension {order.dim} of {order.weight} is {size}"
            raise PlanError(f"{found}, not {len(order.places)}")
    seen: set[Place] = set()
    for order in step.layouts:
        place = (order.weight, order.dim)
        if place in seen:
            raise PlanError(f"{order.weight} is laid out in two ways in one step")
        seen.add(place)


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
    # A merge beside cuts counts what they leave, so that theirs come last.
    changes: tuple[Cut | Merge, ...] = (*step.merges, *step.cuts)
    sizes = {(order.weight, order.dim): len(order.places) for order in step.orders}
    return sizes | {(m.weight, m.dim): m.extent for change in changes for m in change.members}


def _advance(step: Step, origin: dict[Place, list[list[int]]]) -> None:
    """Bring the record of the first program's indices past `step`."""
    for place, lost in _gone(step).items():
        origin[place] = [o for index, o in enumerate(origin[place]) if index not in lost]
    for order in step.orders:
        before = origin[order.weight, order.dim]
        origin[order.weight, order.dim] = [before[index] for index in order.places]
    for merge in step.merges:
        for weight, dim, runs in merge.runs():
            before = origin[weight, dim]
            fused = {run[0]: sorted(i for j in run for i in before[j]) for run in runs}
            later = {index for run in runs for index in run[1:]}
            origin[weight, dim] = [
                fused.get(index, old) for index, old in enumerate(before) if index not in later
            ]


# -- JSON ---------------------------------------------------------------------------------------

_MEMBERS = [
    {
        "weight": str,
        "dim": int,
        "offset": int,
        "width": int,
        "extent": int,
        "outer": [[int]],
        "outer_groups": [str | None],
        "owner": int | None,
    }
]
_CUT = {
    "group": str,
    "size": int,
    "role": str,
    "parents": [str],
    "units": [[[int]]],
    "members": _MEMBERS,
}
_ORDERS = [{"weight": str, "dim": int, "places": [int]}]
_MERGE = {
    "group": str,
    "size": int,
    "groups": int,
    "members": _MEMBERS,
    "orders": _ORDERS,
    "moves": _ORDERS,
}
_STEPS = [{"fingerprint": str, "cuts": [_CUT], "merges": [_MERGE]}]


def _conform(data: Any, form: Any, where: str) -> None:
    """Refuse JSON data that is not of a form: a dict of forms, a list of one, or a type."""
    if isinstance(form, dict):
        for key, inner in form.items():
            # Plans of earlier releases name no owners.
            _conform(data.get(key) if key == "owner" else data[key], inner, f"{where}.{key}")
    elif isinstance(form, list):
        if type(data) is not list:
            raise TypeError(f"{where} is no list")
        for index, item in enumerate(data):
            _conform(item, form[0], f"{where}[{index}]")
    elif not isinstance(data, form) or isinstance(data, bool) or (type(data) is int and data < 0):
        raise TypeError(f"{where} is {data!r}")


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
                tuple(map(_order_from_data, merge["orders"])),
                tuple(map(_order_from_data, merge["moves"])),
            )
            for merge in data["merges"]
        ),
    )


def _member_from_data(data: dict[str, Any]) -> IndexMap:
    return IndexMap(
        data["weight"],
        data["dim"],
        data["offset"],
        data["width"],
        data["extent"],
        tuple((size, stride) for size, stride in data["outer"]),
        tuple(data["outer_groups"]),
        data.get("owner"),
    )


def _order_from_data(data: dict[str, Any]) -> Order:
    return Order(data["weight"], data["dim"], tuple(data["places"]))
