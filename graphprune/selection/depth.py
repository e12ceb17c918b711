"""Which blocks or branches of a program go: those that change the stream, or the loss, least."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphprune import ranks
from graphprune.analysis.residual.branches import Branches, ResidualBranch
from graphprune.calibration.data import Calibration, inputs_of, own_batches
from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.losses import check_task
from graphprune.errors import PlanError, SelectionError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import Compute, call, zeroing
from graphprune.ir.program import Program
from graphprune.selection.allocation import mean_loss

Unit = Literal["block", "branch"]

TOKENS = 2048
"""Tokens of text by which losses of a whole model without a part are told apart."""

PREDICTIONS = 512
"""Predictions, spread over the text, on which units are compared, the same ones for each: where a
vocabulary is large its logits take longer than all layers."""


@dataclass(frozen=True)
class DepthUnit:
    """What goes at once: all branches of a block, or one branch."""

    name: str
    branches: tuple[ResidualBranch, ...]


def depth_units(branches: Branches, unit: Unit, skip: Iterable[str] = ()) -> list[DepthUnit]:
    """Return what may go of a program, in order.

    A block is a numbered layer of which nothing is left without its branches.

    Parameters
    ----------
    branches
        The branches of the program.
    unit
        Whether whole blocks go or single branches.
    skip
        Globs over names of blocks, branches and weights that stay.

    Raises
    ------
    SelectionError
        When there is nothing, with the reason; also for a `skip` pattern that matches nothing.
    """
    if unit == "branch":
        found = [DepthUnit(branch.name, (branch,)) for branch in branches.all]
        why = "nothing that owns a matrix is added to what it was computed from"
    else:
        found, why = _blocks(branches)
    if not found:
        raise SelectionError(f"no whole {unit} can go: {why}")
    for pattern in skip:
        left = [each for each in found if not _matches(each, pattern)]
        if len(left) == len(found):
            raise SelectionError(f"skip pattern {pattern!r} matches no {unit} that could go")
        found = left
    return found


def _matches(unit: DepthUnit, pattern: str) -> bool:
    inside = (name for branch in unit.branches for name in (branch.name, *branch.weights))
    return any(fnmatchcase(name, pattern) for name in (unit.name, *inside))


def _blocks(branches: Branches) -> tuple[list[DepthUnit], str]:
    """Return the whole blocks that can go, and why another cannot."""
    weights, found, why = branches.program.weights, list[DepthUnit](), "it has no numbered layers"
    for layer, group in itertools.groupby(branches.all, lambda branch: branch.layer):
        inside = tuple(group)
        if not layer:
            continue
        if len({branch.layer for branch in branches.all}) == 1:
            return [], f"{layer} is the only one"
        absence = branches.without(branch.name for branch in inside)
        left = {name for name in weights if name.startswith(f"{layer}.")}
        left -= set(branches.owned(absence.removal))
        if left:
            why = f"{layer} keeps {min(left)}, which is used without its branches, too"
            if branches.all:
                why += "; unit=branch takes those"
        else:
            found.append(DepthUnit(layer, inside))
    return found, why


# -- by how much the stream turns -----------------------------------------------------------------


def turns(program: Program, units: Sequence[DepthUnit], data: Calibration) -> dict[str, float]:
    """Return how far each of `units` turns the residual stream: 1 - cosine, as a mean.

    This is the Block Influence of ShortGPT (Men et al. 2403.03853, equation 1).

    Returns
    -------
    dict
        Name of a unit -> the mean over positions, in [0, 2].
    """
    ends = {unit.name: (unit.branches[0].sum.stream, unit.branches[-1].sum.node) for unit in units}
    watched = {node for pair in ends.values() for node in pair}
    totals, counts = torch.zeros(2, len(units), dtype=torch.float64)

    def watching() -> Compute:
        seen: dict[fx.Node, Tensor] = {}

        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = call(node, args, kwargs)
            if node in watched:
                seen[node] = value
                for at, (before, after) in enumerate(ends.values()):
                    if after is node:
                        turned = 1 - _cosines(seen[before], value)
                        totals[at] += turned.sum().item()
                        counts[at] += turned.numel()
            return value

        return compute

    batches = list(map(inputs_of, data.labeled()))
    own = [batches[at] for at in own_batches(batches)]
    for _ in logits_of_all(program, own, compute=watching):
        pass
    ranks.sum_of([totals, counts])
    return dict(zip(ends, (totals / counts).tolist(), strict=True))


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine at every position of a sequence, or for every sample of other forms."""
    if before.shape != after.shape:  # one of them has all positions in a row
        after = after.reshape(before.shape) if before.ndim == 3 else after
        before = before.reshape(after.shape)
    if before.ndim != 3:
        before, after = before.flatten(1), after.flatten(1)
    return functional.cosine_similarity(before.float(), after.float(), dim=-1)


def by_turn(
    branches: Branches, units: Sequence[DepthUnit], count: int, data: Calibration
) -> list[DepthUnit]:
    """Return the `count` units that turn the stream least, measured once.

    Raises
    ------
    SelectionError
        When so many cannot go.
    """
    measured = turns(branches.program, units, data)
    chosen: list[DepthUnit] = []
    for unit in sorted(units, key=lambda each: measured[each.name]):
        if len(chosen) < count and not _refusal(branches, [*chosen, unit]):
            chosen.append(unit)
    return _all_of(chosen, count, branches, units)


# -- by loss --------------------------------------------------------------------------------------


def by_loss(
    branches: Branches,
    units: Sequence[DepthUnit],
    count: int,
    data: Calibration,
    track: Progress = no_progress,
) -> tuple[list[DepthUnit], list[float]]:
    """Return `count` units, each the one whose loss is least beside those before, and the losses.

    The loss is measured without a unit on top of those chosen, on `PREDICTIONS` of the text or a
    few more. What a unit added to the loss before is taken for the least that it adds later, so
    that only units that could be the best are measured again (the lazy greedy algorithm, Minoux
    1978).

    Returns
    -------
    list of DepthUnit, list of float
        The units in the order in which they were chosen; the loss of the whole program and after
        each, in nats, as it was measured.

    Raises
    ------
    SelectionError
        When so many cannot go.
    CalibrationError
        When the program predicts nothing whose loss could be measured.
    """
    check_task(branches.program, next(iter(data.labeled())))
    every = max(1, data.tokens // PREDICTIONS)
    losses = [_loss_without(branches, [], data, every)]
    added = {
        unit.name: _loss_without(branches, [unit], data, every) - losses[0]
        for unit in track(units, "measuring the loss without each")
        if not _refusal(branches, [unit])
    }
    named, chosen = {unit.name: unit for unit in units}, list[DepthUnit]()
    for _ in track(range(count), "choosing what goes"):
        measured = dict(added) if not chosen else {}
        for name in sorted(added, key=added.__getitem__) if chosen else ():
            if measured and min(measured.values()) <= added[name]:
                break
            if _refusal(branches, [*chosen, named[name]]):
                continue
            loss = _loss_without(branches, [*chosen, named[name]], data, every)
            measured[name] = loss - losses[-1]
        if not measured:
            break
        best = min(measured, key=measured.__getitem__)
        added = {name: value for name, value in {**added, **measured}.items() if name != best}
        chosen.append(named[best])
        losses.append(losses[-1] + measured[best])
    return _all_of(chosen, count, branches, units), losses


def _loss_without(
    branches: Branches, units: Iterable[DepthUnit], data: Calibration, every: int
) -> float:
    terms = {branch.term for unit in units for branch in unit.branches}
    loss = mean_loss(branches.program, data, zeroing(terms), every)
    total = torch.tensor([loss], dtype=torch.float64)
    ranks.sum_of([total])
    return total.item()


# -- what can go at once --------------------------------------------------------------------------


def _all_of(
    chosen: list[DepthUnit], count: int, branches: Branches, units: Sequence[DepthUnit]
) -> list[DepthUnit]:
    if len(chosen) == count:
        return chosen
    rest = [unit for unit in units if unit not in chosen]
    why = _refusal(branches, [*chosen, *rest[:1]]) or "there are no more"
    raise SelectionError(f"{count} of {len(units)} cannot go, only {len(chosen)}: {why}")


def _refusal(branches: Branches, units: Collection[DepthUnit]) -> str:
    """Say why `units` cannot all go; "" where they can."""
    try:
        branches.without(branch.name for unit in units for branch in unit.branches)
    except PlanError as error:
        return str(error)
    return ""


def names_of(units: Iterable[DepthUnit]) -> list[str]:
    """Return the names of the branches of `units`, in their order."""
    return [branch.name for unit in units for branch in unit.branches]
