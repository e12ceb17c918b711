"""Units of groups replaced by combinations of them, so that a cut of the last ones loses least."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.mixing.mixable import Mixable, mixable
from graphprune.analysis.mixing.places import Unmixable
from graphprune.calibration.data import Calibration
from graphprune.calibration.layerwise import ChangedWeights
from graphprune.errors import VerificationError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.program import PRESENT, Program, caches_of
from graphprune.ir.sample_inputs import continuation, random_inputs
from graphprune.transforms.rotations.balance import balanced, principal
from graphprune.transforms.rotations.gramians import gramians
from graphprune.transforms.rotations.layout import Copies, Diagonal
from graphprune.verification.draws import Draws
from graphprune.verification.walks import Walk


@dataclass(frozen=True)
class Rotated:
    """A program that gives what it gave, whose units are ordered by how much they matter.

    Parameters
    ----------
    program
        The program, at its old sizes; the one that came in, where nothing could be rotated.
    shares
        Group -> how much each unit matters, of all together: the mean over the group's parents.
    others
        Group -> why it stays as it is.
    """

    program: Program
    shares: Mapping[str, Tensor]
    others: Mapping[str, str]


@torch.no_grad()
def rotate(
    program: Program,
    coupling: Coupling,
    groups: Sequence[Group],
    calibration: Calibration | None = None,
    track: Progress = no_progress,
) -> Rotated:
    """Rotate those of `groups` that the graph allows, under each unit of their parents by itself.

    Parameters
    ----------
    program, coupling
        The program and its analysis.
    groups
        Groups of it.
    calibration
        Batches to measure on; None looks at weights alone.
    track
        Wraps loops in a progress bar.

    Raises
    ------
    CalibrationError
        When the batches do not fit the program.
    """
    chosen, others = dict[Mixable, Diagonal](), dict[str, str]()
    for group in groups:
        try:
            found = mixable(coupling, group)
            chosen[found] = Diagonal.of(program, coupling, found)
        except Unmixable as reason:
            others[group.name] = str(reason)
    measured = gramians(program, coupling, chosen, calibration, track)
    edits: dict[str, list[_Edit]] = defaultdict(list)
    shares = {}
    for each, diagonal in chosen.items():
        held, used = measured.of(each, 1), measured.of(each, -1)
        mixing, values = principal(held) if each.orthogonal else balanced(held, used)
        sides = {1: mixing, -1: torch.linalg.inv(mixing).mT}
        shares[each.group.name] = (values.square() / values.square().sum(1, keepdim=True)).mean(0)
        for member, basis in zip(each.group.members, each.bases, strict=True):
            by = None
            if basis is not None:
                by = diagonal.power(basis.powers)[..., None] * sides[basis.side]
            copies = Copies.of(coupling, each.group, member)
            edits[member.weight].append(_Edit(member.dim, copies, by, each))
    changed = ChangedWeights(program)
    changed.store_all(_edited(program, edits, track))
    return Rotated(program.with_weights(changed.weights) if chosen else program, shares, others)


@dataclass(frozen=True, eq=False)
class _Edit:
    """What becomes of a weight along a dimension: it is mixed, or a gain that becomes neutral."""

    dim: int
    copies: Copies
    by: Tensor | None
    mixable: Mixable


def _edited(
    program: Program, edits: Mapping[str, Sequence[_Edit]], track: Progress
) -> Iterator[Mapping[str, Tensor]]:
    """Yield every weight that holds what is mixed, with its new values."""
    for name, held in track(list(edits.items()), "rotating"):
        old = program.take([name])[name]
        new = old.double().clone()
        for edit in held:
            if edit.by is None:
                new[edit.copies.indices] = 1 - edit.mixable.gains[name]
            else:
                edit.copies.mix(new, edit.dim, edit.by.to(new.device))
        yield {name: new.to(old.dtype)}


def difference(original: Program, rotated: Program, seed: int = 0) -> float:
    """Return how far outputs are apart on random inputs, and on a cache that these leave.

    Raises
    ------
    VerificationError
        When that is more than rounding makes of it.
    """
    inputs = [random_inputs(original, seed=seed)]
    if original.is_decoder:
        inputs.append(continuation(original, inputs[0], seed=seed + 1))
    caches: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = {}, {}
    worst = 0.0
    for given in inputs:
        draws = Draws()
        expected = Walk(original, {**given, **caches[0]}, compute=draws.compute).to_end()
        again = Draws(draws.again).compute
        found = Walk(rotated, {**given, **caches[1]}, compute=again).to_end()
        caches = caches_of(expected), caches_of(found)
        for name, output in expected.items():
            if not name.startswith(PRESENT):
                worst = max(worst, relative_error(output, found[name]))
    parameters = [name for name, kind in original.kinds.items() if kind == "parameter"]
    types = {original.weights[name].dtype for name in parameters}
    types |= {original.compute_types[name] for name in parameters}
    allowed = max(map(tolerance_of, types))
    if not worst <= allowed:
        raise VerificationError(
            f"the rotated program is {worst:.1e} (relative) away from what it gave, past the "
            f"tolerance of {allowed:.0e}"
        )
    return worst
