"""What groups may lose so that all budgets are met, and steps from one such state to another."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from graphprune.analysis.groups import Group
from graphprune.errors import SelectionError
from graphprune.evolution.generations import State

LEVELS = 8
"""In how many parts a group is taken away at first."""

REACH = 4
"""How many levels there are to either side of what a group loses."""

_SWITCHES = 3
"""The most groups that one mutation takes levels of, and the most levels of one."""


@dataclass(frozen=True)
class Budget:
    """What may be left of something.

    Parameters
    ----------
    name
        What it is called, such as "params".
    part
        The part that is to go.
    left
        What is left of it when groups, by name, have lost so many units.
    """

    name: str
    part: float
    left: Callable[[Mapping[str, int]], float]

    @property
    def whole(self) -> float:
        """What there is of it."""
        return self.left({})


class Space:
    """States of a program: how many units each group loses, within all budgets.

    Parameters
    ----------
    groups
        Those that may lose units.
    budgets
        What has to be met.
    round_to
        Groups keep multiples of so many units, or all of them.
    """

    def __init__(
        self, groups: Sequence[Group], budgets: Sequence[Budget], round_to: int = 1
    ) -> None:
        self.groups, self.round_to = groups, round_to
        self._wanted = [(each, each.whole * (1 - each.part)) for each in budgets]
        self._fitting: dict[State, bool] = {}

    def counts(self, state: State) -> dict[str, int]:
        """Return what each group loses, by name, where it loses something."""
        pairs = zip(self.groups, state, strict=True)
        return {group.name: count for group, count in pairs if count}

    def fits(self, state: State) -> bool:
        """Return whether a state meets all budgets."""
        if state not in self._fitting:
            counts = self.counts(state)
            self._fitting[state] = all(each.left(counts) <= most for each, most in self._wanted)
        return self._fitting[state]

    def check(self, state: State, what: str) -> None:
        """Refuse a state, called `what`, that misses a budget.

        Raises
        ------
        SelectionError
            When it does: says which one, and what part of it goes.
        """
        counts = self.counts(state)
        for budget, most in self._wanted:
            if (left := budget.left(counts)) > most:
                raise SelectionError(
                    f"{budget.name} {budget.part:g} is not met: {what} is "
                    f"{1 - left / budget.whole:.3g} of it"
                )

    def equal(self) -> State:
        """Return the state in which all groups lose the same part, as little as budgets allow.

        Raises
        ------
        SelectionError
            When all that groups may lose does not meet them.
        """
        shares = sorted({n / group.size for group in self.groups for n in range(group.size)})

        def at(share: float) -> State:
            return tuple(self._allowed(group, share * group.size) for group in self.groups)

        most = at(1.0)
        self.check(most, "all that these groups may lose")
        first = bisect_left(shares, True, key=lambda share: self.fits(at(share)))
        return at(shares[first]) if first < len(shares) else most

    def levels(self, around: State, step: int) -> list[list[int]]:
        """Return what each group may lose, ascending: some levels, and what it loses `around`.

        In step 0 the levels are parts of all units; later ones lie near by, half as far from each
        other as in the step before.
        """
        found = []
        for group, now in zip(self.groups, around, strict=True):
            width = max(group.size / LEVELS / 2**step, self.round_to)
            offsets = range(-REACH, REACH + 1)
            near = [now + width * each for each in offsets]
            if not step:
                near = [group.size * each / LEVELS for each in range(LEVELS + 1)]
            found.append(sorted({now, *(self._allowed(group, each) for each in near)}))
        return found

    def _allowed(self, group: Group, count: float) -> int:
        """Return what a group may lose that is `count` or, by what it has to keep, less."""
        step = min(self.round_to, group.size)
        kept = max(group.size - count, group.min_units)
        return max(group.size - math.ceil(kept / step - 1e-9) * step, 0)


@dataclass(frozen=True)
class Switch:
    """The mutation: some groups lose a level more, and others get levels back.

    As in EvoPress, levels are switched; there between parts that save the same, here until no
    other group can get a level back within all budgets.

    Parameters
    ----------
    space
        Says what meets the budgets.
    levels
        What each group may lose, ascending.
    """

    space: Space
    levels: Sequence[Sequence[int]]
    _at: list[dict[int, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        places = [{count: at for at, count in enumerate(each)} for each in self.levels]
        object.__setattr__(self, "_at", places)

    def __call__(self, start: State, draw: random.Random) -> State:
        """Return another state that meets the budgets, or `start` where it finds none.

        To lose more may miss a budget: kernels of odd widths take longer than wider ones.
        """
        state = start
        for _ in range(_few(draw)):
            able = [at for at in range(len(state)) if self._next(state, at, 1) is not None]
            if not able:
                break
            more = draw.choice(able)
            for _ in range(_few(draw)):
                if self._next(state, more, 1) is not None:
                    state = self._moved(state, more, 1)
            state = self._given_back(state, more, draw)
        return state if self.space.fits(state) else start

    def _given_back(self, state: State, more: int, draw: random.Random) -> State:
        """Give levels back to all groups but one, at random, until no other one fits."""
        before = None
        while state != before:
            before = state
            for other in draw.sample(range(len(state)), len(state)):
                if other == more or self._next(state, other, -1) is None:
                    continue
                less = self._moved(state, other, -1)
                if self.space.fits(less):
                    state = less
        return state

    def _next(self, state: State, at: int, by: int) -> int | None:
        """Return what a group loses a level away, if there is one."""
        place = self._at[at][state[at]] + by
        return self.levels[at][place] if 0 <= place < len(self.levels[at]) else None

    def _moved(self, state: State, at: int, by: int) -> State:
        found = self._next(state, at, by)
        assert found is not None, "it was asked for before"
        return (*state[:at], found, *state[at + 1 :])


def _few(draw: random.Random) -> int:
    """Return a small number, small ones more often."""
    return min(draw.randint(1, _SWITCHES), draw.randint(1, _SWITCHES))


def parts_of(shared: Sequence[frozenset[object]]) -> list[list[int]]:
    """Return which groups belong together, given what each has a part in.

    Examples
    --------
    >>> parts_of([frozenset("a"), frozenset("b"), frozenset("ac"), frozenset()])
    [[0, 2], [1], [3]]
    """
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(shared)))
    for (one, mine), (other, theirs) in itertools.combinations(enumerate(shared), 2):
        if mine & theirs:
            graph.add_edge(one, other)
    return sorted(map(sorted, networkx.connected_components(graph)))
