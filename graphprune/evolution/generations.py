"""Evolution of one parent by children of whom fewer and fewer are measured on more and more.

It knows nothing of programs: a state is a tuple of integers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

State = tuple[int, ...]
"""What each group loses."""

Mutate = Callable[[State, random.Random], State]
"""Gives a state near another one, that meets all that is asked for."""

Fitness = Callable[[State, int], float]
"""How bad a state is on the first so many batches; the lower, the better."""

_TRIES = 8
"""Mutations that are tried for each child: where few states are left, most are known."""


@dataclass(frozen=True)
class Stage:
    """A round of selection: on how many batches children are measured, and how many go on."""

    batches: int
    survivors: int


def stages_of(batches: int, children: int) -> list[Stage]:
    """Return the rounds in which one child of many is found, on an eighth of the batches first.

    Examples
    --------
    >>> [(stage.batches, stage.survivors) for stage in stages_of(96, 32)]
    [(12, 8), (48, 2), (96, 1)]
    >>> stages_of(1, 32)
    [Stage(batches=1, survivors=1)]
    """
    rounds = {max(batches // 8, 1): children // 4, max(batches // 2, 1): children // 16, batches: 1}
    return [Stage(count, max(survivors, 1)) for count, survivors in rounds.items()]


def work_of(children: int, batches: int = 8) -> float:
    """Return what a generation takes at most, in measurements of one state on all batches.

    Examples
    --------
    >>> work_of(32)
    10.0
    """
    stages = stages_of(batches, children)
    entering = [children, *(stage.survivors for stage in stages)]
    pairs = zip(entering, stages, strict=False)
    return sum(count * stage.batches for count, stage in pairs) / stages[-1].batches


@dataclass(frozen=True)
class Generation:
    """A generation: its number, the best state so far and how bad it is on all batches."""

    number: int
    best: State
    fitness: float


def evolve(
    start: State,
    mutate: Mutate,
    fitness: Fitness,
    stages: Sequence[Stage],
    *,
    children: int,
    seed: object,
) -> Iterator[Generation]:
    """Yield generations, each with a parent at least as good as the one before, without an end.

    From one parent come children by mutation, none of which was there before; those that survive
    all stages replace it if one of them is better on all batches: (1 + lambda) with multi-step
    selection, as in EvoPress (Sieberling et al. 2410.14649, algorithm 2). It ends where no new
    child is found.

    Parameters
    ----------
    start
        The first parent.
    mutate
        Makes a child.
    fitness
        Measures one.
    stages
        Ascending in batches; the last one is of all.
    children
        How many a generation has.
    seed
        Equal ones give equal generations.

    Examples
    --------
    >>> def mutate(state, draw):  # one up, another one down: the sum stays
    ...     more, less = draw.sample(range(3), 2)
    ...     return tuple(each + (at == more) - (at == less) for at, each in enumerate(state))
    >>> far = lambda state, batches: sum((a - b) ** 2 for a, b in zip(state, (4, -1, 0)))
    >>> found = evolve((1, 1, 1), mutate, far, [Stage(1, 1)], children=6, seed=0)
    >>> [next(found).best for _ in range(4)][-1]
    (4, -1, 0)
    """
    everything = stages[-1].batches
    best = start, fitness(start, everything)
    known = {start}
    yield Generation(0, *best)
    number = 0
    while True:
        number += 1
        draw = random.Random(f"{seed} {number}")
        born = _born(best[0], mutate, draw, children, known)
        if not born:
            return
        known.update(born)
        for stage in stages:
            measured = sorted((fitness(each, stage.batches), each) for each in born)
            born = [each for _, each in measured[: stage.survivors]]
        found, child = measured[0]
        if found < best[1]:
            best = child, found
        yield Generation(number, *best)


def _born(
    parent: State, mutate: Mutate, draw: random.Random, children: int, known: set[State]
) -> list[State]:
    """Return up to so many new states near `parent`."""
    found: dict[State, None] = {}
    for _ in range(_TRIES * children):
        child = mutate(parent, draw)
        if child not in known:
            found[child] = None
        if len(found) == children:
            break
    return list(found)
