"""Ablation: what a model loses by each unit, and by all units of a group but one.

The study of Michel et al., Are Sixteen Heads Really Better than One? (1905.10650, tables 1 to 3),
for the units of any group. A unit is removed by the masked reference (`verification`), which
equals its removal, so that the graph is captured and analyzed once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from graphprune.analysis.attention.attentions import attentions_of
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.matrices import Matrix
from graphprune.calibration.data import inputs_of
from graphprune.calibration.layerwise import logits_of_all
from graphprune.calibration.tokens import text_inputs
from graphprune.criteria import ScoringContext
from graphprune.errors import EvaluationError, SelectionError, refuse_other
from graphprune.evaluation.ablation_result import (
    SIGNIFICANT,
    Effect,
    GroupEffects,
    Sensitivity,
    Span,
)
from graphprune.evaluation.sample_measures import Batch, Run, measure_of, measured, runner
from graphprune.io.progress import DisplayFactory, progress_bar
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Cut, Step
from graphprune.selection.targets import target_groups
from graphprune.verification.masked_reference import MaskedReference

ALL_HEADS = "heads"
"""The target that means the query heads of every attention."""

SINGLES = 64
"""Units of a group that are removed one by one; those of a larger group go in so many runs."""


def sensitivity(
    coupling: Coupling,
    batches: Sequence[Batch],
    target: str = ALL_HEADS,
    *,
    blocks: int | None = None,
    keep_one: bool = True,
    progress: DisplayFactory | None = None,
) -> Sensitivity:
    """Remove the units of groups one after the other, each from the whole program.

    The loss is cross entropy where batches hold ``labels`` beside the inputs, as
    `calibration.data.task_loss` takes them; the next-token loss of a causal language model;
    and for any other program how far its output moves from that of the whole one: the
    Kullback-Leibler divergence of ``logits``, or the relative squared change.

    Parameters
    ----------
    coupling
        The analysis of the program.
    batches
        Inputs by name, the first dimension of each the samples.
    target
        "heads": every query head of every attention, under whichever KV head it is; where several
        attentions have to lose the same heads, those of each by themselves. Otherwise what
        `graphprune.selection.targets.target_groups` takes.
    blocks
        In how many runs of neighbors the units of each group go; by default one by one, and a
        group of more than `SINGLES` units in so many runs.
    keep_one
        Whether to also remove all but one.
    progress
        What makes a progress bar.

    Returns
    -------
    Sensitivity
        Effects in the unit of the loss: nats, or parts of the whole output's square.

    Raises
    ------
    SelectionError
        When nothing matches `target`, or `blocks` would remove more units than can go.
    EvaluationError
        When the loss of the whole program is not finite, or there are no batches.

    References
    ----------
    Michel et al., 1905.10650, sections 3.2 and 3.3.
    """
    refuse_other(coupling, than=Coupling, how="graphprune.analyze(program) makes one")
    program = coupling.program
    if not batches:
        raise EvaluationError("there are no batches to measure the loss on")
    parts = [(part, part.runs(blocks)) for part in _parts(coupling, target)]
    inputs = [inputs_of(batch) for batch in batches]
    measure, loss = measure_of(program, batches)
    whole = measured(runner(program, inputs), loss)
    if not bool(torch.isfinite(whole).all()):
        raise EvaluationError("the loss of the whole program is not finite")

    def effects(part: _Part, runs: Sequence[Span], keep: bool) -> Iterator[tuple[Span, Tensor]]:
        for run in runs:
            lost = [(run[0] <= at < run[1]) != keep for at in range(part.total)]
            yield run, measured(part.without(lost, inputs), loss) - whole
            advance(1)

    rows = []
    total = sum(len(runs) for _, runs in parts) * (1 + keep_one)
    with progress_bar(progress, "removing units", total=total) as advance:
        for part, runs in parts:
            removed = tuple(_effect(*each) for each in effects(part, runs, False))
            enough = [run for run in runs if run[1] - run[0] >= part.group.min_units]
            kept = _best(list(effects(part, enough, True))) if keep_one else None
            rows.append(GroupEffects(part.name, part.group.role, part.shape, removed, kept))
    return Sensitivity(measure, float(whole.mean()), len(whole), tuple(rows))


def text_batches(program: Program, windows: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Make what `program` takes of windows of tokens ``[windows, length]``.

    An encoder and a decoder get the same windows.

    Raises
    ------
    EvaluationError
        When it takes something that cannot be made of them, naming it.
    """
    chunks = windows.split(batch_size)
    return [text_inputs(program, {"input_ids": chunk}, EvaluationError) for chunk in chunks]


# -- which units go -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A group that loses units, or what one matrix reads of a group that attentions share."""

    coupling: Coupling
    group: Group
    reader: tuple[Matrix, Tensor] | None = None

    @property
    def name(self) -> str:
        return self.group.name if self.reader is None else self.reader[0].weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.coupling.sizes(self.group)

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    def runs(self, blocks: int | None) -> list[Span]:
        """Return runs of neighboring units, counted over all parents."""
        count = min(self.total, SINGLES if blocks is None else max(blocks, 1))
        bounds = [self.total * at // count for at in range(count + 1)]
        runs = list(itertools.pairwise(bounds))
        stay = self.total - max(end - first for first, end in runs)
        if stay < self.group.min_units:
            raise SelectionError(
                f"{self.name}: {self.group.min_units} of its {self.total} units must stay, and "
                f"{count} blocks leave {stay}"
            )
        return runs

    def without(self, lost: Sequence[bool], inputs: Sequence[Batch]) -> Run:
        """Return the program without some units, counted over all parents, run on `inputs`."""
        program = self.coupling.program
        if self.reader is not None:
            matrix, units = self.reader
            gone = torch.tensor([*lost, False])[units]  # -1 is a column of no unit
            weight = program.weights[matrix.weight]
            clear = matrix.read(weight).masked_fill(gone[:, None], 0)
            cleared = program.with_weights({matrix.weight: matrix.write(weight, clear)})
            return runner(cleared, inputs)
        units_of: dict[tuple[int, ...], list[int]] = {}
        for (*parents, unit), goes in zip(
            itertools.product(*map(range, self.shape)), lost, strict=True
        ):
            if goes:
                units_of.setdefault(tuple(parents), []).append(unit)
        group, cut_units = self.group, {at: tuple(units) for at, units in units_of.items()}
        cut = Cut(group.name, group.size, group.role, cut_units, group.parents, group.members)
        plan = Plan((Step(program.fingerprint(), (cut,)),))
        reference = MaskedReference(program, plan, self.coupling.types)
        return lambda output: logits_of_all(
            program, inputs, output, weights=reference.weights, compute=reference.computing
        )


def _parts(coupling: Coupling, target: str) -> list[_Part]:
    if target != ALL_HEADS:
        return [_Part(coupling, group) for group in target_groups(coupling, target)]
    heads = [group for group in coupling.groups if group.role in ("kv-head", "query-slot")]
    if not heads:
        roles = ", ".join(sorted({group.role for group in coupling.groups})) or "none"
        raise SelectionError(f"the program has no heads that can be pruned; its groups are {roles}")
    parents = {parent for group in heads for parent in group.parents}
    return [
        part
        for group in heads
        if group.name not in parents
        for part in _by_attention(coupling, group)
    ]


def _by_attention(coupling: Coupling, group: Group) -> list[_Part]:
    """Return a part for each attention of those that must lose the same heads."""
    if len(attentions_of(coupling.types, coupling.atom(group.name))) < 2:
        return [_Part(coupling, group)]
    readers = ScoringContext(coupling.program, coupling, [group]).consumers(ALL_HEADS)[group.name]
    return [_Part(coupling, group, reader) for reader in readers]


# -- effects --------------------------------------------------------------------------------------


def _effect(run: Span, differences: Tensor) -> Effect:
    mean, count = float(differences.mean()), len(differences)
    if count == 1:
        return Effect(run, mean, None, None)
    error = float(differences.std()) / math.sqrt(count)
    if not math.isfinite(error):
        return Effect(run, mean, None, None)
    if error == 0:
        return Effect(run, mean, error, float(mean == 0), mean)
    p = float(2 * stdtr(count - 1, -abs(mean / error)))
    return Effect(run, mean, error, p, mean + error * float(stdtrit(count - 1, 1 - SIGNIFICANT)))


def _best(kept: Sequence[tuple[Span, Tensor]]) -> Effect | None:
    """Choose the best run to keep on every other sample, and measure it on the rest."""
    if not kept:
        return None
    run, differences = min(kept, key=lambda each: float(each[1][::2].mean()))
    return _effect(run, differences[1::2] if len(differences) > 1 else differences)
