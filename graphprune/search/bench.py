"""Candidates measured on data that nothing was fitted to, each once, within a limit of time."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphprune.analysis.coupling import Coupling
from graphprune.calibration.data import inputs_of
from graphprune.criteria import ScoringContext, criterion
from graphprune.criteria.score_cache import load_or_score
from graphprune.errors import GraphPruneError, SelectionError, first_line
from graphprune.evaluation.journal import Journal
from graphprune.evaluation.sample_measures import measure_of, measured, runner
from graphprune.evolution.generations import work_of
from graphprune.io.progress import DisplayFactory, progress_bar
from graphprune.io.version import __version__
from graphprune.passes.evolve import Evolve
from graphprune.passes.prune import Prune
from graphprune.passes.reconstruct import Reconstruct
from graphprune.search.candidates import Candidate
from graphprune.search.draws import Draw
from graphprune.search.latency import Latency
from graphprune.selection.allocation import LEVELS
from graphprune.selection.targets import target_groups
from graphprune.training.local import samples_of_a_step
from graphprune.weights.tensors import digest

_REFITTING = 20
"""Runs over the data that take as long as refitting all levels of all groups once."""


@dataclass(frozen=True)
class Figures:
    """What was measured of a program.

    Parameters
    ----------
    values
        The measure of every sample, in order; the lower, the better.
    parameters, kv_bytes_per_token
        Its size.
    seconds
        What it took to make the program and to measure it.
    latency
        The seconds that its kernels take, where that is asked for.
    """

    values: tuple[float, ...]
    parameters: int
    kv_bytes_per_token: int
    seconds: float
    latency: float | None = None

    @property
    def mean(self) -> float:
        """The mean over the samples."""
        return math.fsum(self.values) / len(self.values)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figures:
        """Read what JSON kept of one, which has null for what is not finite."""
        values = tuple(math.inf if each is None else float(each) for each in data["values"])
        return cls(**{**data, "values": values})


@dataclass(frozen=True)
class Tried:
    """A candidate and its figures, or why there are none."""

    candidate: Candidate
    figures: Figures | None
    reason: str = ""


class Bench:
    """Measures candidates, and keeps what it measured.

    Parameters
    ----------
    coupling
        The analysis of the program that candidates start from.
    targets
        What any of them prunes: scores are taken of all of it at once.
    draw
        What they are fitted to and compared on.
    folder
        Where scores and figures are kept: a directory that is empty, absent, or of a search. What
        lies there of the same program, data and recipe is not measured again.
    seed
        Of whatever is random.
    latency
        A budget that every candidate has to meet as it comes out; None for none.
    limit
        Seconds that all of it may take, what follows the choice included; None for any number.
    progress
        Makes a progress display.

    Raises
    ------
    OutputError
        When `folder` holds something else, or cannot be written.
    EvaluationError
        When the program cannot be measured.
    """

    def __init__(
        self,
        coupling: Coupling,
        targets: Sequence[str],
        draw: Draw,
        folder: Path,
        *,
        seed: int = 0,
        latency: Latency | None = None,
        limit: float | None = None,
        progress: DisplayFactory | None = None,
    ) -> None:
        self.began = time.monotonic()
        self.coupling, self.program, self.draw = coupling, coupling.program, draw
        self.targets = targets
        self.seed, self.limit, self.progress = seed, limit, progress
        self.latency = latency
        self.journal = Journal(folder, "search", Figures.from_json)
        self.measure_name, _ = measure_of(self.program, draw.choosing)
        self._identity = {
            "graphprune": __version__,
            "program": self.program.fingerprint(),
            "weights": digest([self.program.weights]),
            "calibration": draw.fitted.sha256,
            "choosing": digest(draw.choosing),
            "seed": seed,
            **({"latency": latency.times.provider} if latency else {}),
        }
        self._key = hashlib.sha256(repr(self._identity).encode()).hexdigest()[:12]
        self._failed: dict[str, GraphPruneError] = {}
        self._alone: set[str] = set()
        self.scoring: dict[str, float] = {}
        self.tried: dict[tuple[str, int], Tried] = {}
        self.left_out: list[Candidate] = []

    def whole(self, samples: int) -> Figures:
        """Measure the program itself."""
        identity = self._of("", samples)
        found = self.journal.find(identity)
        if found is None:
            found = self._figures(Candidate(None, None), samples)
            self.journal.add(identity, found, "")
        return found

    def measure(self, candidates: Iterable[Candidate], samples: int, what: str) -> list[Tried]:
        """Measure candidates on the first samples; the best first, those that failed left out.

        One that there is no time for is left out, and noted; the first of all never is.
        """
        chosen = list(dict.fromkeys(candidates))
        with progress_bar(self.progress, what, len(chosen)) as advance:
            found = []
            for each in chosen:
                if self._has_time(each, samples):
                    found.append(self._one(each, samples))
                advance(1)
        return ranked(found)

    def _one(self, candidate: Candidate, samples: int) -> Tried:
        text = str(candidate)
        if (text, samples) in self.tried:
            return self.tried[text, samples]
        figures, reason = self.journal.find(self._of(text, samples)), ""
        if figures is None:
            try:
                figures = self._figures(candidate, samples)
                if not math.isfinite(figures.mean):
                    figures, reason = None, "what was measured is not finite"
            except (GraphPruneError, RuntimeError, MemoryError) as error:
                reason = first_line(error)
            self.journal.add(self._of(text, samples), figures, reason)
        if self.latency is not None and figures is not None and figures.latency is not None:
            reason = self.latency.refusal(figures.latency)
            figures = None if reason else figures
        tried = Tried(candidate, figures, reason)
        self.tried[text, samples] = tried
        return tried

    def _figures(self, candidate: Candidate, samples: int) -> Figures:
        kept = self._kept(candidate)
        began = time.monotonic()
        made = candidate.pipeline(kept).run(
            self.program, calibration=self.draw.fitted, seed=self.seed, quiet=self.progress is None
        )
        batches = self.draw.first(samples)
        _, measure = measure_of(self.program, batches)
        run = runner(made.program, [inputs_of(batch) for batch in batches])
        values = measured(run, measure)
        return Figures(
            tuple(values.tolist()),
            made.program.parameter_count(),
            made.program.kv_bytes_per_token(),
            time.monotonic() - began,
            None if self.latency is None else self.latency.seconds(made.program),
        )

    def _kept(self, candidate: Candidate) -> str | None:
        """Return where the first pass of a candidate keeps what it measures; None for nowhere."""
        if candidate.search is not None:
            return str(self.journal.folder / f"evolve-{self._key}")
        return self._scores(candidate)

    def _scores(self, candidate: Candidate) -> str | None:
        """Return the file with the scores of what a candidate prunes first, made where it is not.

        One look at the data serves all candidates of a criterion. None where a candidate has to
        score its own units.
        """
        first = next(iter(candidate.passes), None)
        if not isinstance(first, Prune):
            return None
        name = str(first.criterion)
        path = self.journal.folder / f"scores-{name}-{self._key}.safetensors"
        if name in self._failed:
            raise self._failed[name]
        if path.exists() or name in self._alone:
            return str(path) if path.exists() else None
        began = time.monotonic()
        try:
            load_or_score(path, criterion(name), self._scored())
        except SelectionError:  # of groups that this criterion cannot score
            self._alone.add(name)
            return None
        except GraphPruneError as error:
            self._failed[name] = error
            raise
        self.scoring[name] = time.monotonic() - began
        return str(path)

    def _scored(self) -> ScoringContext:
        found = (group for each in self.targets for group in target_groups(self.coupling, each))
        groups = list({group.name: group for group in found}.values())
        data = self.draw.fitted
        return ScoringContext(self.program, self.coupling, groups, data, seed=self.seed)

    # -- time -------------------------------------------------------------------------------------

    @property
    def left(self) -> float:
        """Seconds that are left, once the best so far is made anew."""
        if self.limit is None:
            return math.inf
        return self.limit - (time.monotonic() - self.began) - self._again()

    @property
    def seconds_by_loss(self) -> float:
        """Return about what it takes to measure the loss of ever less of each group."""
        found = (g for name in self.targets for g in target_groups(self.coupling, name))
        runs = LEVELS * len({group.name for group in found})
        return self._seconds_of_a_sample * self.draw.fitted.samples * runs

    def seconds_by_search(self, search: Evolve) -> float:
        """Return about what it takes to search for what each group loses.

        Levels of all groups are refitted in each step, and children measured; both are taken to be
        as long as running the data so often.
        """
        tokens = min(self.draw.fitted.tokens or math.inf, search.tokens or math.inf)
        share = min(tokens / self.draw.fitted.tokens, 1.0) if self.draw.fitted.tokens else 1.0
        runs = _REFITTING + search.generations * share * work_of(search.children)
        return self._seconds_of_a_sample * self.draw.fitted.samples * runs * search.steps

    @property
    def seconds_by_training(self) -> float:
        """Return about what it takes to train the branches of a program one after the other."""
        samples = samples_of_a_step(map(inputs_of, self.draw.choosing))
        # Backwards it takes twice as long as forwards.
        return self._seconds_of_a_sample * samples * Reconstruct.steps * 3

    @property
    def _seconds_of_a_sample(self) -> float:
        whole = self.whole(self.draw.samples)
        return whole.seconds / len(whole.values)

    def _again(self) -> float:
        """Return the seconds that it takes to make the best so far anew, scores included."""
        best = next(iter(ranked(self.tried.values())), None)
        if best is None or best.figures is None:
            return 0.0
        return best.figures.seconds + self.scoring.get(best.candidate.criterion, 0.0)

    def _has_time(self, candidate: Candidate, samples: int) -> bool:
        """Return whether there is time for a candidate, as long as others like it took."""
        if not self.tried or (str(candidate), samples) in self.tried:
            return True
        alike = [
            each.figures.seconds
            for each in self.tried.values()
            if each.figures and _kind(each.candidate) == _kind(candidate)
        ]
        if max(alike, default=0.0) <= self.left:
            return True
        self.left_out.append(candidate)
        return False

    # -- what was measured before -----------------------------------------------------------------

    def _of(self, text: str, samples: int) -> dict[str, Any]:
        return {**self._identity, "pipeline": text, "samples": samples}


def _kind(candidate: Candidate) -> tuple[str, bool]:
    """Return what candidates have in common that take about the same time."""
    return candidate.refit, candidate.search is not None


def ranked(tried: Iterable[Tried]) -> list[Tried]:
    """Return those that have figures, the best first."""
    found = [(each.figures.mean, each) for each in tried if each.figures is not None]
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]
