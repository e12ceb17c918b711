"""The search itself: a ladder around the best state so far, generations on it, and finer again."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphprune.errors import UsageError
from graphprune.evolution.clock import Clock
from graphprune.evolution.fitness import Departures
from graphprune.evolution.generations import Generation, State, evolve, stages_of, work_of
from graphprune.evolution.ladder import Ladder, Subject
from graphprune.evolution.record import SECONDS, Milestone, Record
from graphprune.evolution.space import Space, Switch
from graphprune.io.progress import Progress, no_progress

PATIENCE = 5
"""Generations in which nothing better is found, after which a step ends."""


@dataclass(frozen=True)
class Settings:
    """How far a search goes.

    Parameters
    ----------
    steps
        How often levels are refitted around the best state so far, each time half as far apart.
    generations
        Of each step, at most.
    children
        Of each generation.
    seconds
        How long it may take; None for any time.
    seed
        Of mutations.
    """

    steps: int
    generations: int
    children: int
    seconds: float | None = None
    seed: int = 0

    @property
    def work(self) -> str:
        """What a `Clock` calls a generation."""
        return f"generation of {self.children}"


@dataclass(frozen=True)
class Found:
    """The best state, and how it was found.

    Parameters
    ----------
    state
        What each group loses.
    measure
        What fitness is called.
    fitness
        How far it is from the original; `equal` is that of what the search began with.
    generations
        How many there were in each step.
    in_time
        Whether all of them were; else time was over before.
    """

    state: State
    measure: str
    fitness: float
    equal: float
    generations: tuple[int, ...]
    in_time: bool


def search(
    subject: Subject,
    space: Space,
    departures: Departures,
    record: Record,
    settings: Settings,
    track: Progress = no_progress,
) -> Found:
    """Search for what groups lose best within all budgets.

    It begins where all lose the same part. Equal settings give equal results where time suffices,
    also where a record is gone on with.

    Raises
    ------
    SelectionError
        When a budget is missed: before any work, by all that groups may lose.
    UsageError
        When there is no time for one generation.
    CalibrationError
        As `Ladder`.
    """
    best, fitness, equal = space.equal(), math.nan, math.nan
    clock, counts, in_time = Clock(settings.seconds, record.folder / SECONDS), list[int](), True
    for step in range(settings.steps):
        # For these levels, and to refit what is chosen in the end.
        if step and not clock.has_time_for("refit", "refit"):
            in_time = False
            break
        with clock.timing("refit"):
            levels = space.levels(best, step)
            ladder = Ladder(subject, levels, best, record.folder, track=track)
        measure = _Measure(ladder, departures, record)
        with clock.timing("measure"):
            fitness = measure(best, departures.count)
        equal = equal if step else fitness
        clock.expect(settings.work, "measure", work_of(settings.children, departures.count))
        if not clock.has_time_for(settings.work, "refit"):
            if not step:
                raise UsageError(
                    f"{clock.limit:g} seconds are too few for one generation: refitting the levels "
                    f"takes {clock.taken('refit'):.3g}, and what is chosen in the end as long; a "
                    f"generation {clock.taken(settings.work):.3g}"
                )
            in_time = False
            break
        last, over = _climb(best, step, space, measure, settings, clock, track)
        best, fitness, in_time = last.best, last.fitness, in_time and not over
        counts.append(last.number)
    space.check(best, "what was found")
    record.draw()
    return Found(best, departures.name, fitness, equal, tuple(counts), in_time)


class _Measure:
    """Measures states once; what a record knows of them is taken from there."""

    def __init__(self, ladder: Ladder, departures: Departures, record: Record) -> None:
        self.ladder, self.departures, self.record = ladder, departures, record

    def __call__(self, state: State, batches: int) -> float:
        """Return how far a state is from the original on the first so many batches."""
        known = self.record.find(self.ladder.key, batches, state)
        if known is None:
            known = self.departures.of(self.ladder.weights(state), batches)
            known = known if math.isfinite(known) else math.inf
            self.record.add(self.ladder.key, batches, state, known)
        return known


def _climb(
    start: State,
    step: int,
    space: Space,
    measure: _Measure,
    settings: Settings,
    clock: Clock,
    track: Progress,
) -> tuple[Generation, bool]:
    """Return the last generation of a step, and whether time was over before it ended."""
    batches, record = measure.departures.count, measure.record
    born = evolve(
        start,
        Switch(space, measure.ladder.levels),
        measure,
        stages_of(batches, settings.children),
        children=settings.children,
        seed=f"{settings.seed} {step}",
    )
    last, better = next(born), 0
    record.show(Milestone(step, 0, last.fitness, space.counts(last.best)))
    for number in track(range(1, settings.generations + 1), f"step {step + 1}"):
        with clock.timing(settings.work):
            found = next(born, last)
        if found is last:  # nothing is left to try
            break
        better = number if found.fitness < last.fitness else better
        last = found
        record.show(Milestone(step, number, last.fitness, space.counts(last.best)))
        if number - better == PATIENCE:
            break
        until = (step + 1) / settings.steps
        if not clock.has_time_for(settings.work, "refit", part=until):
            return last, number < settings.generations
    return last, False
