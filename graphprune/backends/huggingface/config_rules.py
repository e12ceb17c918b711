"""Sizes that a config class refuses by a rule of its own, such as heads that divide the width.

A model of such sizes can be built, and code beside a checkpoint can build it; but the config of a
plain checkpoint does not load. The rules are not known by name: the config class is asked.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from graphprune.backends.huggingface.config_search import (
    Builder,
    Changes,
    Search,
    Sizes,
    needed_sizes,
)
from graphprune.errors import last_line
from graphprune.ir.program import Program
from graphprune.plan.index_map import IndexMap
from graphprune.selection.size_rules import SizeRule

_WAYS = 3
"""Ways to give a model its sizes that are looked at."""


def broken_rule(builder: Builder, target: Sizes) -> str:
    """Say by which rule the config of a model of the sizes `target` is refused; "" for no rule.

    The fields and what would do in their place are named.
    """
    changes = next(iter(_solutions(builder, target, {})), None)
    why = _refusal(builder, changes) if changes else ""
    if not changes or not why:
        return ""
    before = builder.integers()
    scaled = {path: value for path, value in changes.items() if before.get(path, value) != value}
    if not scaled:
        return why
    first = next(iter(scaled))
    others = [
        each[first]
        for each in _multiples(before, changes, min(before[path] for path in scaled))
        if not _refusal(builder, each)
    ]
    would_do = f"; {first} of {', '.join(map(str, others))} would do" if others else ""
    return _told(scaled, why) + would_do


class Resizable(Protocol):
    """Units that weights hold: a coupled group, or the KV heads of an attention."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def size(self) -> int:
        """Number of units."""

    @property
    def members(self) -> Sequence[IndexMap]:
        """The index maps of the units."""


def size_rules(program: Program, groups: Iterable[Resizable]) -> dict[str, SizeRule]:
    """Return what the config of `program` says of the numbers of units that groups may keep.

    Groups that are alike in all layers are taken to keep the same number of units, as a plain
    checkpoint has it, and other groups to keep all of theirs.

    Returns
    -------
    dict
        Group name -> rule; groups whose sizes no field of the config sets are not in it.
    """
    source = program.source
    if source is None:
        return {}
    base = getattr(source.model_class, "graphprune_base", source.model_class)
    builder = Builder(source.config, base)
    alike: dict[Any, list[Resizable]] = {}
    for group in groups:
        members = {(re.sub(r"\d+", "*", m.weight), m.dim, m.width) for m in group.members}
        owned = any(member.owner is not None for member in group.members)
        if not owned and group.size > 1:
            alike.setdefault((group.size, frozenset(members)), []).append(group)
    now = _solutions(builder, needed_sizes(program, derived=True), {})
    if not now:
        return {}
    found: dict[str, SizeRule] = {}
    for same in alike.values():
        rule = _rule(builder, program, same, now[0])
        if rule is not None:
            found.update({group.name: rule for group in same})
    return found


def _rule(
    builder: Builder, program: Program, groups: Sequence[Resizable], now: Changes
) -> SizeRule | None:
    """Return the rule for groups of one size; `now` gives the model the sizes that it has.

    It is read off models with fewer units: the fields that these need go with the number of units.
    """
    size = groups[0].size
    before = {**builder.integers(), **now}
    at, other = size // 2, max(1, size // 4)
    target = _left_with(program, groups, other)
    # Sizes may not tell half the heads from heads of half the size: what counts must suit both.
    ways = []
    for changes in _solutions(builder, _left_with(program, groups, at), now):
        scaled = _scaled(before, changes, at, size, other)
        if scaled is not None and builder.unchecked().gives(scaled, target):
            ways.append(changes)
    if not ways:
        return None

    @cache
    def rule(count: int) -> str:
        for changes in ways:
            scaled = _scaled(before, changes, at, size, count)
            if scaled is None:
                return "its config has no whole number for it"
            if why := _refusal(builder, scaled):
                new = {p: v for p, v in scaled.items() if before.get(p) != v}
                return _told(new, why)
        return ""

    return rule


def _told(changes: Mapping[str, Any], why: str) -> str:
    """Say which fields the config refuses."""
    names = " and ".join(f"{path} {value}" for path, value in changes.items())
    return f"the config refuses {names}: {why}"


def _left_with(program: Program, groups: Sequence[Resizable], count: int) -> Sizes:
    """Return the sizes of all weights where `count` units of each of `groups` are left."""
    sizes = {name: list(shape) for name, shape in needed_sizes(program, derived=True).items()}
    for group in groups:
        for member in group.members:
            if member.weight in sizes:
                gone = (group.size - count) * len(member.indices(0))
                sizes[member.weight][member.dim] -= gone
    return {name: tuple(shape) for name, shape in sizes.items()}


def _solutions(builder: Builder, target: Sizes, base: Changes) -> list[Changes]:
    """Return changes that give a model the sizes `target`, whatever its config says to them."""
    search = Search(builder.unchecked(), target, base, lambda at: ())
    return list(itertools.islice(search.solutions(unset_as_well=False), _WAYS))


def _multiples(
    before: Mapping[str, int], changes: Mapping[str, Any], size: int
) -> Iterator[Changes]:
    """Yield `changes` with all fields that change at every other part of what they were."""
    for count in range(1, size + 1):
        fields = {path: before[path] for path in changes if path in before}
        if all(value * count % size == 0 for value in fields.values()):
            yield {**changes, **{path: value * count // size for path, value in fields.items()}}


def _scaled(
    before: Mapping[str, int], changes: Mapping[str, Any], at: int, size: int, count: int
) -> Changes | None:
    """Return `changes`, which were found `at` some units of `size`, for `count` of them."""
    found = {}
    for path, value in changes.items():
        if before.get(path) == value or path not in before:
            found[path] = value
            continue
        step, odd = divmod((before[path] - value) * (size - count), size - at)
        if odd:
            return None
        found[path] = before[path] - step
    return found


def _refusal(builder: Builder, changes: Mapping[str, Any]) -> str:
    try:
        builder.config(changes)
    except Exception as error:  # noqa: BLE001 - configs validate themselves in many ways
        return last_line(error).removeprefix("ValueError: ")
    return ""
