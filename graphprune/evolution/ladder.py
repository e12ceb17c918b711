"""What groups may lose, level by level, each refitted once and kept on disk."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.matrices import Matrix, bias_of, contractions
from graphprune.calibration.cache import read_cache, write_cache
from graphprune.calibration.data import Calibration
from graphprune.calibration.statistics import Statistics
from graphprune.criteria import Scores
from graphprune.evolution.generations import State
from graphprune.evolution.space import parts_of
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.selection.selector import lowest_units
from graphprune.transforms.refit import LostInputs, Refitted, refit
from graphprune.weights.overlay import overlaid

_WHAT = "levels"

_MOST = 81
"""Refits of one matrix: where several groups are inputs of it, they have fewer levels each."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The program that is searched, and in what order units go.

    Parameters
    ----------
    coupling
        The analysis of the program.
    groups
        Those that may lose units.
    scores
        The importance of their units; the lowest go first.
    calibration
        What refits are fitted to.
    damp
        How much they are damped, as in `graphprune.transforms.refit.refit`.
    """

    coupling: Coupling
    groups: Sequence[Group]
    scores: Scores
    calibration: Calibration
    damp: float | None = None

    @property
    def program(self) -> Program:
        """The program."""
        return self.coupling.program

    def plan(self, state: Mapping[int, int] | State) -> Plan:
        """Return the plan that takes so many units of the groups, by their place in `groups`."""
        counts = state if isinstance(state, Mapping) else dict(enumerate(state))
        cuts = tuple(
            self.groups[at].cut(lowest_units(self.scores[self.groups[at].name], count))
            for at, count in counts.items()
            if count
        )
        return Plan((Step(self.program.fingerprint(), cuts),) if cuts else ())

    def refit(self, state: State, **options: Any) -> Refitted:
        """Return what `graphprune.transforms.refit.refit` makes of a state."""
        given = self.program, self.coupling, self.plan(state), self.calibration
        return refit(*given, damp=self.damp, **options)

    @cached_property
    def consumers(self) -> list[set[str]]:
        """For each group the weights whose inputs its units are."""
        matrices, found = contractions(self.program).matrices, list[set[str]]()
        for at, group in enumerate(self.groups):
            plan = self.plan({at: group.size - group.min_units})
            lost = LostInputs.of(self.program, plan, matrices).columns
            found.append({matrix.weight for matrix in lost})
        return found

    @cached_property
    def parts(self) -> list[list[int]]:
        """Which groups are refitted together: inputs of one weight, or of weights of one bias."""
        biases: dict[str, set[str]] = {}
        for matrix in contractions(self.program).matrices:
            biases.setdefault(matrix.weight, set()).add(bias_of(self.program, matrix))
        return parts_of(
            [
                frozenset(weights.union(*(biases[name] for name in weights)) - {""})
                for weights in self.consumers
            ]
        )


class Ladder:
    """The refits of all levels of all groups.

    The statistics that a matrix is refitted by are those of the program that has lost what it loses
    in the state `around`, all before refitted: errors add up over layers as they will in the end
    (Li et al., Tyr-the-Pruner, 2503.09657). One run of the calibration data gives them all.

    Parameters
    ----------
    subject
        The program and the order of its units.
    levels
        What each group may lose, ascending.
    around
        What they lose for the statistics.
    folder
        Where refits are kept.
    track
        Wraps the loop over layers in a progress bar.

    Raises
    ------
    CalibrationError
        When the folder holds levels of another program, other weights or other data.
    """

    def __init__(
        self,
        subject: Subject,
        levels: Sequence[Sequence[int]],
        around: State,
        folder: Path,
        *,
        track: Progress = no_progress,
    ) -> None:
        self.subject, self.levels = subject, _bounded(subject, levels, around)
        scores = [score.tolist() for score in subject.scores.values()]
        self.key = hashlib.sha256(
            repr((around, self.levels, subject.damp, scores, list(subject.scores))).encode()
        ).hexdigest()[:16]
        self._files = {
            at: folder / f"{_WHAT}-{self.key}-{at}.safetensors"
            for at, part in enumerate(subject.parts)
            if subject.consumers[part[0]]
        }
        if missing := {at for at, file in self._files.items() if not file.exists()}:
            self._make(missing, around, track)
        self._refits = {at: self._read(file) for at, file in self._files.items()}
        self._lost = cache(self._lost_by)

    def weights(self, state: State) -> dict[str, Tensor]:
        """Return the weights of the program at their first sizes, with zeros for what goes."""
        found = dict(self.subject.program.weights)
        for at, refits in self._refits.items():
            text = _text([state[group] for group in self.subject.parts[at]])
            found |= refits.get(text, {})
        for group, count in enumerate(state):
            for (name, dim), indices in self._lost(group, count).items() if count else ():
                found[name] = found[name].index_fill(dim, indices.to(found[name].device), 0)
        return found

    def _lost_by(self, group: int, count: int) -> dict[tuple[str, int], Tensor]:
        removed = self.subject.plan({group: count}).removed
        return {
            (name, dim): torch.tensor(indices)
            for name, dims in removed.items()
            for dim, indices in dims.items()
        }

    def _make(self, missing: set[int], around: State, track: Progress) -> None:
        """Refit all levels of some parts, and write them."""
        subject, waiting = self.subject, dict[int, dict[str, Tensor]]()
        left = {
            at: set[str]().union(*(subject.consumers[group] for group in subject.parts[at]))
            for at in sorted(missing)
        }

        def look(held: Sequence[Matrix], statistics: Statistics) -> None:
            for at, weights in left.items():
                mine = [matrix for matrix in held if matrix.weight in weights]
                if not mine:
                    continue
                waiting.setdefault(at, {}).update(self._refitted(at, mine, statistics))
                weights.difference_update(matrix.weight for matrix in mine)
                if not weights:
                    self._write(at, waiting.pop(at))

        also = set[str]().union(*left.values())
        subject.refit(around, track=track, also=also, look=look, onwards=False)

    def _refitted(
        self, at: int, matrices: Sequence[Matrix], statistics: Statistics
    ) -> dict[str, Tensor]:
        """Return the weights of some matrices in all states of a part, by state and name."""
        part, found = self.subject.parts[at], dict[str, Tensor]()
        for counts in itertools.product(*(self.levels[group] for group in part)):
            plan = self.subject.plan(dict(zip(part, counts, strict=True)))
            removal = LostInputs.of(self.subject.program, plan, matrices)
            refits = removal.refitted(matrices, statistics, self.subject.damp)
            found |= {f"{_text(counts)} {name}": value for name, value in refits.items()}
        return found

    def _write(self, at: int, refits: Mapping[str, Tensor]) -> None:
        program, data = self.subject.program, self.subject.calibration
        write_cache(self._files[at], _WHAT, refits, program, data, key=self.key)

    def _read(self, file: Path) -> dict[str, dict[str, Tensor]]:
        """Return the refits of a part by state and name, where and as the program stores them."""
        program, data = self.subject.program, self.subject.calibration
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in read_cache(file, _WHAT, program, data, key=self.key).items():
            counts, _, name = key.partition(" ")
            found.setdefault(counts, {})[name] = value
        for counts, new in found.items():
            every = overlaid(program.weights, new, program.placement)
            found[counts] = {name: every[name] for name in new}
        return found


def _text(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))


def _bounded(subject: Subject, levels: Sequence[Sequence[int]], around: State) -> list[list[int]]:
    """Return as many levels of each group, the nearest, as its part has refits for."""
    found = list(map(list, levels))
    for part in subject.parts:
        most = int(_MOST ** (1 / len(part)) + 1e-9)
        for group in part:
            nearest = sorted(levels[group], key=lambda each: (abs(each - around[group]), each))
            found[group] = sorted(nearest[:most])
    return found
