"""Making the key and value heads of each group equal before they are merged, by calibration data.

The edit leaves all sizes as they are: keys and values of a group become those of one shared head,
queries and outputs take the factor of their own head, and outputs are then refitted to give what
they gave. Merging equal heads is exact, so that all that the edit costs is what is measured here.
Layers follow each other: each sees what the layers before it give after their edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.matrices import contractions
from graphprune.analysis.types import Types
from graphprune.calibration.data import Calibration, own_batches
from graphprune.calibration.layerwise import BatchExecution, ChangedWeights, unpadded
from graphprune.calibration.segments import segments
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import Memory, Segment
from graphprune.ir.program import Program
from graphprune.plan.steps import Permutation
from graphprune.transforms.heads.attention_fit import AttentionFit
from graphprune.transforms.heads.grouping import group_by_weights
from graphprune.transforms.heads.kv_heads import Heads
from graphprune.transforms.heads.layout import HeadMap, Unmapped, map_heads
from graphprune.transforms.heads.merge import equal_heads


@dataclass(frozen=True)
class Aligned:
    """A program whose heads are equal within every group, and what that cost.

    Parameters
    ----------
    program
        The program at its old size, whose KV heads are equal within every group.
    reordering
        Name of the heads -> how they come to be neighbors of those that they are equal to.
    errors
        Name of the heads -> relative squared error of "keys" (their products with queries),
        "values" (what the outputs make of them, before they are fitted as they are attended to) and
        "outputs" (after the refit).
    notes
        Name of the heads -> of what only the mean was taken, or what else was not done, and why.
    """

    program: Program
    reordering: Mapping[str, tuple[Permutation, ...]]
    errors: Mapping[str, Mapping[str, float]]
    notes: Mapping[str, str]


@torch.no_grad()
def align(
    program: Program,
    types: Types,
    chosen: Sequence[Heads],
    groups: int,
    calibration: Calibration,
    *,
    similar: bool = True,
    damp: float = 0.01,
    track: Progress = no_progress,
) -> Aligned:
    """Make the KV heads of every group of `chosen` equal.

    Keys take the best shared head of what queries make of them; values, as they are then attended
    to, the shared heads from which outputs come nearest to what they were
    (`transforms.heads.sharing`); and each output projection is the least squares fit, damped
    towards its aligned self, of what it gave on the same inputs. Where keys or
    values are no linear map of the inputs (a norm of their own), or their heads cannot be told
    apart, they are averaged, with the reason.

    Parameters
    ----------
    program, types
        The program, and its axis types.
    chosen, groups
        KV heads that can be merged, and how many are to be left of each.
    calibration
        Batches to run it on.
    similar
        Whether to group the heads that cost the least to share, instead of neighbors.
    damp
        Damping of the refit, as a part of the mean second moment of its inputs.
    track
        Wraps the loop over layers in a progress bar.

    Raises
    ------
    CalibrationError
        When the batches do not fit the program, or what heads compute on them is not finite.
    """
    calibration.check(program)
    held, weights = contractions(program), program.operands
    maps: list[HeadMap] = []
    changed: dict[str, Tensor] = {}  # until their segment is done
    reordering: dict[str, tuple[Permutation, ...]] = {}
    notes: dict[str, str] = {}
    for heads in chosen:
        try:
            maps.append(map_heads(types, held, heads))
        except Unmapped as why:
            notes[heads.name] = f"keys and values: {why}"
            way = group_by_weights(program, types if similar else None, heads, groups)
            reordering[heads.name] = way.reordering
            changed |= equal_heads({**weights, **changed}, heads, way.groups)
    fits = [AttentionFit(program, types, found, groups, similar, damp) for found in maps]
    parted = [
        replace(projection.matrix, weight=found.heads.name)
        for found in maps
        for projection in found.projections
    ]
    batches = list(unpadded(calibration))
    own = [batches[at] for at in own_batches(batches)]
    parts = segments(program, parted)
    nodes, memory = [part.nodes for part in parts], Memory()
    executions = BatchExecution.of_all(program, own, nodes, memory=memory)
    done = ChangedWeights(program, nodes, memory)
    names = {node: name for name, node in program.weight_nodes()}

    def edit(change: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        stored = program.as_operands(done.weights)
        for name, weight in change({**weights, **stored, **changed}).items():
            changed[name] = weight.to(program.device)

    for execution in executions:
        execution.replace(changed)
    for segment in track(parts, "aligning heads"):
        inside = set(segment.nodes)
        here = [fit for fit in fits if fit.map.projections[3].node in inside]
        if here:
            _observe(executions, segment, [fit.observe for fit in here])
            for fit in here:
                edit(fit.share_keys)
            for execution in executions:
                execution.replace(changed)
            if attending := [fit.observe_attended for fit in here if fit.attends]:
                _observe(executions, segment, attending)
            for fit in here:
                edit(fit.share_values)
            for execution in executions:
                execution.replace(changed)
            _observe(executions, segment, [fit.observe_shared for fit in here])
            for fit in here:
                edit(fit.refit_output)
            for execution in executions:
                execution.replace(changed)
        for execution in executions:
            execution.advance(segment.nodes)
        used = {names[n] for each in segment.nodes for n in each.all_input_nodes if n in names}
        stored = done.store({name: changed.pop(name) for name in used & changed.keys()})
        for execution in executions[:1]:  # they share their weights
            execution.replace(stored)
    for fit in fits:
        name = fit.map.heads.name
        reordering[name] = fit.reordering
        if fit.notes:
            notes[name] = "; ".join(fit.notes)
    errors = {fit.map.heads.name: fit.errors for fit in fits}
    return Aligned(program.with_weights({**done.weights, **changed}), reordering, errors, notes)


def _observe(
    executions: Iterable[BatchExecution],
    segment: Segment,
    observers: Sequence[Callable[[Mapping[fx.Node, Any]], None]],
) -> None:
    """Compute a segment on every batch, and show the values to `observers`."""
    for execution in executions:
        values = execution.trial(segment)
        for observe in observers:
            observe(values)
        values.clear()
