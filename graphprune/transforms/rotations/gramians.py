"""What the units of a group hold, and what is made of it: second moments, pair by pair.

Of values x that are multiplied with a matrix W one Gramian is E[x xᵀ], the other Wᵀ W. Where two
activations are multiplied, as queries with keys, each has the second moments of what makes it. With
no data, inputs of matrices are taken to be white.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.matrices import Matrix, bias_of, contractions
from graphprune.analysis.mixing.mixable import Mixable
from graphprune.calibration.data import Calibration
from graphprune.calibration.input_statistics import InputStatistics
from graphprune.calibration.statistics import Statistics, run_layerwise
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.program import Program
from graphprune.transforms.rotations.layout import Copies, along

Source = Literal["seen", "used", "made"]
"""What a Gramian is of: activations where they are multiplied with a matrix; that matrix; or what a
matrix makes."""


@dataclass(frozen=True, eq=False)
class _Part:
    """A matrix that holds a group: which of its sides, where, and the basis of the group there."""

    mixable: Mixable
    matrix: Matrix
    side: int
    place: Literal["in", "out"]
    copies: Copies
    position: Tensor
    """Index along the weight's dimension -> place in the matrix, or -1."""

    def blocks(self, total: Tensor, products: Tensor) -> None:
        """Add blocks of products of all pairs of inputs (or outputs) of the matrix."""
        placed = Copies(self.position[self.copies.indices], self.copies.parents)
        inside = (placed.indices >= 0).all(1)
        Copies(placed.indices[inside], placed.parents[inside]).add_blocks(total, products)


@dataclass(eq=False)
class Gramians:
    """The Gramians of groups, on either side, as far as they were added up.

    Parameters
    ----------
    coupling
        The analysis of the program that they are of.
    """

    coupling: Coupling
    _sums: dict[tuple[str, int, Source], Tensor] = field(default_factory=dict)

    def add(self, part: _Part, weight: Tensor, seen: InputStatistics | None) -> None:
        """Add what one matrix, `weight` as ``[parts, out, in]``, tells of a group."""
        count = 0 if seen is None else int(seen.count.sum())
        moments = None if seen is None or seen.gram is None or not count else seen.gram / count
        if part.place == "in":
            if moments is not None:
                self._add(part, -part.side, "seen", moments.sum(0))
            flat = weight.flatten(0, 1)
            self._add(part, part.side, "used", flat.mT @ flat)
            return
        made = weight @ (weight.mT if moments is None else moments @ weight.mT)
        name = bias_of(self.coupling.program, part.matrix)
        if name and moments is not None and len(weight) == 1:
            assert seen is not None
            bias = self.coupling.program.take([name])[name].double()
            mean = weight[0] @ seen.mean[0]
            made = made + torch.outer(mean + bias, mean + bias) - torch.outer(mean, mean)
        self._add(part, part.side, "made", made.sum(0))

    def _add(self, part: _Part, side: int, source: Source, products: Tensor) -> None:
        key = part.mixable.group.name, side, source
        if key not in self._sums:
            self._sums[key] = torch.zeros(self._shape(part.mixable), dtype=torch.float64)
        part.blocks(self._sums[key], products.to(self._sums[key].device))

    def _shape(self, mixable: Mixable) -> tuple[int, int, int]:
        *parents, units = self.coupling.sizes(mixable.group)
        return math.prod(parents), units, units

    def of(self, mixable: Mixable, side: int) -> Tensor:
        """Return one of the two, ``[parents, units, units]``; the identity where nothing tells."""
        name = mixable.group.name
        found = (self._sums.get((name, side, source)) for source in ("seen", "used", "made"))
        identity = torch.eye(mixable.group.size, dtype=torch.float64)
        return next((s for s in found if s is not None), identity.expand(self._shape(mixable)))


@torch.no_grad()
def gramians(
    program: Program,
    coupling: Coupling,
    chosen: Sequence[Mixable],
    calibration: Calibration | None,
    track: Progress = no_progress,
) -> Gramians:
    """Measure the Gramians of groups.

    Parameters
    ----------
    program, coupling
        The program and its analysis.
    chosen
        The groups.
    calibration
        Batches to run it on, or None.
    track
        Wraps the loop over layers in a progress bar.

    Raises
    ------
    CalibrationError
        As `run_layerwise`.
    """
    parts = _parts(program, coupling, chosen, measured=calibration is not None)
    found = Gramians(coupling)
    if calibration is None:
        for name, held in track(list(parts.items()), "looking at weights"):
            weight = program.take([name])[name]
            for part in held:
                found.add(part, part.matrix.read(weight).double(), None)
        return found
    matrices = list({id(p.matrix): p.matrix for held in parts.values() for p in held}.values())

    def look(
        nodes: Sequence[fx.Node], held: Sequence[Matrix], statistics: Statistics
    ) -> Iterator[Mapping[str, Tensor]]:
        for matrix in held:
            weight = matrix.read(program.take([matrix.weight])[matrix.weight]).double()
            for part in parts[matrix.weight]:
                if part.matrix is matrix:
                    found.add(part, weight, statistics[matrix.name])
        yield {}

    run_layerwise(program, matrices, calibration, "gram", look, track, replay=False)
    return found


def _parts(
    program: Program, coupling: Coupling, chosen: Sequence[Mixable], *, measured: bool
) -> dict[str, list[_Part]]:
    """Return the matrices that tell of the groups, by their weights.

    Where inputs of a matrix that sums over a group are measured, what makes them need not be.
    """
    matrices: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in contractions(program).matrices:
        matrices[matrix.weight].append(matrix)
    found: dict[str, list[_Part]] = defaultdict(list)
    for each in chosen:
        held = []
        for member, side in zip(each.group.members, each.sides, strict=True):
            shape = program.weights[member.weight].shape
            copies = Copies.of(coupling, each.group, member)
            for matrix in matrices[member.weight]:
                place, line = along(matrix, shape, member.dim)
                if place:
                    position = torch.full((shape[member.dim],), -1)
                    position[line] = torch.arange(len(line))
                    held.append(_Part(each, matrix, side, place, copies, position))
        sums = any(part.place == "in" for part in held)
        for part in held:
            if part.place == "in" or not (measured and sums):
                found[part.matrix.weight].append(part)
    return found
