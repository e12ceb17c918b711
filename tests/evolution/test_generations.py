"""The search by itself: against brute force, within budgets, the same for the same seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from graphprune.errors import SelectionError
from graphprune.evolution.generations import Generation, State, evolve, stages_of
from graphprune.evolution.space import Budget, Space, Switch

SIZES, PRICES = (8, 8, 4, 16), (3, 5, 7, 1)


def groups() -> Any:
    return [SimpleNamespace(name=f"g{at}", size=n, min_units=1) for at, n in enumerate(SIZES)]


def left(prices: tuple[int, ...]) -> Callable[[Mapping[str, int]], float]:
    def count(lost: Mapping[str, int]) -> float:
        sizes = zip(SIZES, prices, strict=True)
        return sum((n - lost.get(f"g{at}", 0)) * each for at, (n, each) in enumerate(sizes))

    return count


def space(part: float = 0.4) -> Space:
    budgets = [Budget("params", part, left(PRICES)), Budget("macs", 0.2, left((1, 1, 9, 1)))]
    return Space(groups(), budgets)


def worse(state: State, batches: int = 1) -> float:
    """Separable, convex in one group and not in another, unlike for each."""
    a, b, c, d = state
    return a**2 + 3 * b + (6 if c > 1 else c) + 0.1 * d**1.5


def run(seed: int = 0, count: int = 40, fitness: Any = worse) -> list[Generation]:
    held = space()
    start = held.equal()
    found = evolve(
        start,
        Switch(held, held.levels(start, 0)),
        fitness,
        stages_of(8, 16),
        children=16,
        seed=seed,
    )
    return list(itertools.islice(found, count))


def test_it_finds_what_brute_force_finds() -> None:
    held = space()
    levels = held.levels(held.equal(), 0)
    best = min(filter(held.fits, itertools.product(*levels)), key=worse)
    for seed in range(3):
        generations = run(seed)
        assert generations[-1].fitness == worse(best)
        values = [each.fitness for each in generations]
        assert values == sorted(values, reverse=True)


def test_equal_seeds_give_equal_generations_and_children_are_measured_once() -> None:
    seen: list[tuple[State, int]] = []

    def fitness(state: State, batches: int) -> float:
        seen.append((state, batches))
        return worse(state)

    first = run(3, fitness=fitness)
    assert first == run(3)
    assert len(seen) == len(set(seen))


def test_all_budgets_are_met_by_whatever_is_born_and_little_is_left_of_them() -> None:
    held, draw = space(), random.Random(0)
    state = held.equal()
    switch = Switch(held, held.levels(state, 0))
    for _ in range(50):
        state = switch(state, draw)
        assert held.fits(state)
        assert 0.6 * left(PRICES)({}) >= left(PRICES)(held.counts(state))


def test_a_child_that_misses_a_budget_is_none() -> None:
    """As of a latency, where odd widths take longer than wider ones."""

    def odd_is_slow(lost: Mapping[str, int]) -> float:
        return sum(n + 4 * (lost.get(f"g{at}", 0) % 2) for at, n in enumerate(SIZES))

    held, draw = Space(groups(), [Budget("latency", 0.0, odd_is_slow)]), random.Random(0)
    start = (0, 0, 0, 0)
    switch = Switch(held, [range(n) for n in SIZES])
    assert all(held.fits(switch(start, draw)) for _ in range(50))
    with pytest.raises(SelectionError, match=r"latency 0 is not met: that is -0\.111 of it"):
        held.check((1, 0, 0, 0), "that")


def test_equal_parts_are_the_smallest_that_meet_the_budgets() -> None:
    held = space()
    state = held.equal()
    assert held.fits(state)
    shares = {count / size for count, size in zip(state, SIZES, strict=True)}
    assert max(shares) - min(shares) < 1 / min(SIZES)
    assert not held.fits(tuple(max(count - 1, 0) for count in state))


def test_levels_come_nearer_to_each_other_in_every_step() -> None:
    held = space()
    assert held.levels((2, 2, 2, 3), 0)[3] == [0, 2, 3, 4, 6, 8, 10, 12, 14, 15]
    assert held.levels((2, 2, 2, 3), 1)[3] == [0, 1, 2, 3, 4, 5, 6, 7]
    rounded = Space(groups(), [], round_to=4)
    assert rounded.levels((0, 0, 0, 8), 1)[3] == [0, 4, 8, 12]


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"params 0\.95 is not met: all .* is 0\.852 of it"):
        space(0.95).equal()
