"""What an evolution has measured, in a folder: it goes on from there, and can be watched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError, OutputError
from graphprune.evolution.generations import State
from graphprune.io.atomic import as_json, staged_file, writing
from graphprune.ir.program import Program
from graphprune.report.plots import Point, curves
from graphprune.weights.tensors import digest

MEASURED, SECONDS = "measured.jsonl", "seconds.json"
PROGRESS, PICTURE = "progress.json", "progress.svg"

_WHAT = "evolution"


@dataclass(frozen=True)
class Milestone:
    """A generation as it is written down.

    Parameters
    ----------
    step, generation
        Which one, of which step; counted from 0. Generation 0 is the state that a step begins with.
    fitness
        How far the best state is from the original.
    lost
        What each group loses in it, by name.
    """

    step: int
    generation: int
    fitness: float
    lost: dict[str, int]


class Record:
    """The measurements of an evolution, a line of JSON for each, and its progress.

    Parameters
    ----------
    folder
        A directory that is empty, absent, or of an evolution of the same program and data.
    program, calibration
        What is measured, on what.
    tokens
        How many tokens of it, as `graphprune.evolution.fitness.Departures` takes them.

    Raises
    ------
    OutputError
        When the folder holds something else, or cannot be written.
    CalibrationError
        When it holds measurements of another program, other weights or other data.
    """

    def __init__(
        self, folder: Path, program: Program, calibration: Calibration, tokens: int
    ) -> None:
        self.folder, self._path = folder, folder / MEASURED
        self.generations: list[Milestone] = []
        about = {
            "what": _WHAT,
            "fingerprint": program.fingerprint(),
            "weights": digest([program.weights]),
            "data": calibration.sha256,
            "tokens": tokens,
        }
        self._values: dict[tuple[str, int, State], float] = {}
        with writing(folder):
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder} is a file, not a directory")
            lines = self._lines()
            if lines:
                self._check(json.loads(lines[0]), about)
                self._read(lines[1:])
            elif folder.is_dir() and any(folder.iterdir()):
                raise OutputError(f"{folder} is not empty, and holds no {_WHAT}")
            folder.mkdir(parents=True, exist_ok=True)
            if not lines:
                self._path.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def scores_file(self, criterion: str, groups: Sequence[str]) -> Path:
        """Return where the scores of groups, by name, are kept."""
        key = hashlib.sha256("\n".join(groups).encode()).hexdigest()[:16]
        return self.folder / f"scores-{criterion}-{key}.safetensors"

    def find(self, ladder: str, batches: int, state: State) -> float | None:
        """Return what was measured of a state with refits of a ladder, by its key."""
        return self._values.get((ladder, batches, state))

    def add(self, ladder: str, batches: int, state: State, value: float) -> None:
        """Write down what was measured."""
        self._values[ladder, batches, state] = value
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(as_json([ladder, batches, state, value]) + "\n")

    def show(self, generation: Milestone) -> None:
        """Write down how far it is: all generations so far, as JSON."""
        self.generations.append(generation)
        with staged_file(self.folder / PROGRESS, overwrite=True) as file:
            data = [asdict(each) for each in self.generations]
            file.write_text(as_json(data, indent=1) + "\n", encoding="utf-8")

    def draw(self) -> None:
        """Draw the fitness of the best state over all generations, a curve for each step."""
        series: dict[str, list[Point]] = {}
        for number, each in enumerate(self.generations):
            point = Point(number, max(each.fitness, 1e-12))
            series.setdefault(f"step {each.step + 1}", []).append(point)
        labels = "generation", "distance from the original"
        with staged_file(self.folder / PICTURE, overwrite=True) as file:
            curves(file, series, marks={}, labels=labels)

    def _lines(self) -> Sequence[str]:
        """Return the whole lines; the last one may have been cut off, and goes."""
        if not self._path.is_file():
            return []
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole, encoding="utf-8")
        return whole.splitlines()

    def _read(self, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines, 2):
            try:
                ladder, batches, state, value = json.loads(line)
                found = float("inf") if value is None else float(value)
                self._values[str(ladder), int(batches), tuple(map(int, state))] = found
            except (ValueError, TypeError) as error:
                raise OutputError(f"{self._path}:{number} is no measurement: {error}") from error

    def _check(self, found: Any, about: dict[str, Any]) -> None:
        if not isinstance(found, dict) or found.get("what") != _WHAT:
            raise OutputError(f"{self._path} is of no {_WHAT}: give another folder")
        says = {
            "fingerprint": "of another program",
            "weights": "of this program with other weights",
            "data": "on other calibration data",
            "tokens": f"of tokens={found.get('tokens')}, not {about['tokens']}",
        }
        for key, what in says.items():
            if found.get(key) != about[key]:
                raise CalibrationError(f"{self.folder} holds an {_WHAT} {what}")
