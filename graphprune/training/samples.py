"""The samples that each step of a training sees: a function of the seed and the step."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import torch

from graphprune.calibration.data import Calibration
from graphprune.errors import TrainingError
from graphprune.training.trainable import Batch


class Samples:
    """Single samples, and the batches of every step.

    Parameters
    ----------
    rows
        Batches of one sample each.
    """

    def __init__(self, rows: Sequence[Batch]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def split(cls, calibration: Calibration, held_out: float, seed: int) -> tuple[Samples, Samples]:
        """Split into samples to train on and those (a part `held_out`, one at least) to measure on.

        Raises
        ------
        TrainingError
            When there are too few for both.
        """
        rows = list(calibration.singly())
        if not held_out:
            return cls(rows), cls(())
        count = max(1, round(len(rows) * held_out))
        if count >= len(rows):
            raise TrainingError(
                f"{len(rows)} samples are too few to hold out {held_out:g} of them and train"
            )
        order = torch.randperm(len(rows), generator=_generator(seed, "held out")).tolist()
        held = set(order[:count])
        kept = [row for at, row in enumerate(rows) if at not in held]
        return cls(kept), cls([rows[at] for at in sorted(held)])

    def steps(self, batch: int) -> int:
        """Return how many steps go through all of them once."""
        return -(-len(self.rows) // batch)

    def of_step(self, step: int, batch: int, micro: int, seed: int) -> list[Batch]:
        """Return the `batch` samples of a step, without repeats in an epoch, `micro` at once."""
        epoch, number = divmod(step, self.steps(batch))
        order = torch.randperm(len(self.rows), generator=_generator(seed, epoch)).tolist()
        return self._joined(order[number * batch : (number + 1) * batch], micro)

    def all(self, micro: int) -> list[Batch]:
        """Return all of them, `micro` at once."""
        return self._joined(range(len(self.rows)), micro)

    def _joined(self, indices: Sequence[int], micro: int) -> list[Batch]:
        joined: list[Batch] = []
        ordered = sorted(indices, key=self._shape)  # stable: only what cannot go together moves
        for _, alike in itertools.groupby(ordered, key=self._shape):
            held = list(alike)
            for first in range(0, len(held), micro):
                rows = [self.rows[at] for at in held[first : first + micro]]
                joined.append({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
        return joined

    def _shape(self, index: int) -> list[tuple[str, tuple[int, ...]]]:
        return sorted((name, tuple(each.shape)) for name, each in self.rows[index].items())


def seed_of(*parts: object) -> int:
    """Return a seed that is a function of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))
