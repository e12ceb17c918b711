"""What the units of a group hold, and what is made of it: second moments, pair by pair.

Of values x that are multiplied with a matrix W one Gramian is E[x xᵀ], the other Wᵀ W. Where two
activations are multiplied, as queries with keys, each has the second moments of what makes it. With
no data, inputs of matrices are taken to be white. Where only lengths are kept, both sides are one,
and values alone count.
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
from graphprune.analysis.mixing.places import Basis
from graphprune.calibration.data import Calibration
from graphprune.calibration.input_statistics import InputStatistics
from graphprune.calibration.statistics import Statistics, run_layerwise
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.program import Program
from graphprune.transforms.rotations.layout import Copies, Diagonal, along

Source = Literal["seen", "used", "made"]
"""What a Gramian is of: activations where they are multiplied with a matrix; that matrix; or what a
matrix makes."""


@dataclass(frozen=True, eq=False)
class _Part:
    """A matrix that holds a group: in which basis, and where its units are in it."""

    mixable: Mixable
    matrix: Matrix
    basis: Basis
    place: Literal["in", "out"]
    copies: Copies
    diagonal: Diagonal


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
                self._add(part, -1, "seen", moments.sum(0))
            if not part.mixable.orthogonal:  # there it is what is held that counts
                flat = weight.flatten(0, 1)
                self._add(part, 1, "used", flat.mT @ flat)
            return
        made = weight @ (weight.mT if moments is None else moments @ weight.mT)
        name = bias_of(self.coupling.program, part.matrix)
        if name and moments is not None and len(weight) == 1:
            assert seen is not None
            bias = self.coupling.program.take([name])[name].double()
            mean = weight[0] @ seen.mean[0]
            made = made + torch.outer(mean + bias, mean + bias) - torch.outer(mean, mean)
        self._add(part, 1, "made", made.sum(0))

    def _add(self, part: _Part, side: int, source: Source, products: Tensor) -> None:
        """Add products of all pairs of indices, on the side of the matrix or (-1) on the other."""
        on = 1 if part.mixable.orthogonal else side * part.basis.side
        key = part.mixable.group.name, on, source
        if key not in self._sums:
            self._sums[key] = torch.zeros(self._shape(part.mixable), dtype=torch.float64)
        scale = part.diagonal.power(part.basis.powers, side)
        part.copies.add_blocks(self._sums[key], products.to(scale.device), scale)

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
    chosen: Mapping[Mixable, Diagonal],
    calibration: Calibration | None,
    track: Progress = no_progress,
) -> Gramians:
    """Measure the Gramians of groups.

    Parameters
    ----------
    program, coupling
        The program and its analysis.
    chosen
        The groups, and their gains.
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
    program: Program, coupling: Coupling, chosen: Mapping[Mixable, Diagonal], *, measured: bool
) -> dict[str, list[_Part]]:
    """Return the matrices that tell of the groups, by their weights.

    Where inputs of a matrix that sums over a group are measured, what makes them need not be.
    """
    matrices: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in contractions(program).matrices:
        matrices[matrix.weight].append(matrix)
    found: dict[str, list[_Part]] = defaultdict(list)
    for each, diagonal in chosen.items():
        held = []
        for member, basis in zip(each.group.members, each.bases, strict=True):
            shape = program.weights[member.weight].shape
            copies = Copies.of(coupling, each.group, member)
            for matrix in matrices[member.weight] if basis is not None else ():
                place, line = along(matrix, shape, member.dim)
                inside = copies.within(line, shape[member.dim])
                if place and len(inside.indices):
                    assert basis is not None
                    held.append(_Part(each, matrix, basis, place, inside, diagonal))
        sums = any(part.place == "in" for part in held)
        for part in held:
            if part.place == "in" or not (measured and sums):
                found[part.matrix.weight].append(part)
    return found
