"""Plans: which units of which groups go or merge, as plain data.

A plan holds, beside the units, the index map of every weight that a group reaches into. It can so
be printed, saved, reviewed, checked against a program and verified without the analysis that made
it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.errors import PlanError
from graphprune.io.atomic import staged_file
from graphprune.io.paths import path_of
from graphprune.plan.checks import check_step
from graphprune.plan.drawn import drawn_text
from graphprune.plan.edits import Edits, edits_beside
from graphprune.plan.json_form import from_data, to_data
from graphprune.plan.steps import Step, WeightDim

if TYPE_CHECKING:
    from os import PathLike

    from graphprune.ir.program import Program

Removed = dict[str, dict[int, list[int]]]
"""Weight name -> dimension -> sorted indices."""


_SHOWN = 24
"""Lines of a plan that `repr` shows."""


@dataclass(frozen=True, repr=False)
class Plan:
    """The units that go or merge, step by step, and the edits of values beside them.

    Parameters
    ----------
    steps
        What goes and merges.
    edits
        The weights that have other values than those steps leave, or None.
    calibration
        How the data was drawn that scores or values came from, as `Calibration.describe` tells it;
        None where there was none, and in plans of earlier releases.
    """

    steps: tuple[Step, ...] = ()
    edits: Edits | None = None
    calibration: Mapping[str, Any] | None = field(default=None, compare=False)

    def __add__(self, other: Plan) -> Plan:
        if self.edits is not None and other:
            raise PlanError("edits are of weights after the last step: no step can follow them")
        steps, edits = (*self.steps, *other.steps), self.edits or other.edits
        return Plan(steps, edits, self.calibration or other.calibration)

    def __bool__(self) -> bool:
        return bool(self.steps) or self.edits is not None

    def without_edits(self) -> Plan:
        """Return the steps alone: what says which sizes come out, not which values."""
        return dataclasses.replace(self, edits=None)

    # -- in the coordinates of the first program --------------------------------------------------

    @property
    def removed(self) -> Removed:
        """Weight name -> dimension -> sorted indices that go, as the first program counts them.

        Merged heads are not removed; of a head that was merged and then removed all parts are.
        """
        origin: dict[WeightDim, list[list[int]]] = {}
        removed: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for step in self.steps:
            for at, extent in step.extents().items():
                origin.setdefault(at, [[index] for index in range(extent)])
            for (weight, dim), lost in step.removed().items():
                for index in lost:
                    removed[weight][dim].update(origin[weight, dim][index])
            _advance(step, origin)
        return {
            weight: {dim: sorted(found) for dim, found in sorted(dims.items())}
            for weight, dims in removed.items()
        }

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, for those of `weights` in which something goes, a boolean mask of what does.

        For groups whose removal is exact, a program with these elements at zero is the reference
        for the program without them.
        """
        found = {}
        for name, dims in self.removed.items():
            mask = torch.zeros(weights[name].shape, dtype=torch.bool)
            for dim, indices in dims.items():
                mask.index_fill_(dim, torch.tensor(indices), True)
            found[name] = mask.to(weights[name].device)
        return found

    def masked(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `weights` in which something goes, with zeros there."""
        return {n: weights[n].masked_fill(m, 0) for n, m in self.masks(weights).items()}

    # -- checking -------------------------------------------------------------------------------

    def check(self, program: Program) -> None:
        """Refuse a program that the plan was not made for.

        Raises
        ------
        PlanError
            Naming both fingerprints, or a weight that is not as the plan says.
        """
        if self.steps and self.steps[0].fingerprint != program.fingerprint():
            raise PlanError(
                f"the plan was made for program {self.steps[0].fingerprint}, "
                f"this one is {program.fingerprint()}"
            )
        sizes = {(n, d): s for n, w in program.weights.items() for d, s in enumerate(w.shape)}
        for step in self.steps:
            check_step(step, sizes)

    # -- as text --------------------------------------------------------------------------------

    def to_json(self, indent: int | None = 1) -> str:
        """Return the plan as JSON text, without the values of weights that were edited."""
        return json.dumps(to_data(self.steps, self.edits, self.calibration), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises
        ------
        PlanError
            When the text is no plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not a plan, since it is no JSON: {error}") from error
        return cls(*from_data(data))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON; a file that is there is replaced.

        The values of edited weights go into a file beside it, ``plan.edits`` for ``plan.json``.

        Raises
        ------
        OutputError
            When it cannot be written.
        PlanError
            When the plan was read from a file, and the values beside it are gone or changed.
        """
        plan = self
        if self.edits is not None and not self.edits.changed_graph:
            plan = dataclasses.replace(self, edits=self.edits.write(edits_beside(path)))
        with staged_file(path, overwrite=True) as file:
            file.write_text(plan.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan from a file.

        Raises
        ------
        PlanError
            When the file is missing or holds no plan.
        """
        try:
            text = path_of(path, PlanError).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot be read: {error}") from error
        try:
            plan = cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
        if plan.edits is None:
            return plan
        edits = dataclasses.replace(plan.edits, values=edits_beside(path))
        return dataclasses.replace(plan, edits=edits)

    def __repr__(self) -> str:
        lines = str(self).splitlines()
        more = len(lines) - _SHOWN
        return "\n".join(lines if more < 2 else [*lines[:_SHOWN], f"  and {more} more lines"])

    def __str__(self) -> str:
        if not self:
            return "an empty plan"
        lines = []
        for number, step in enumerate(self.steps, start=1):
            lines.append(f"step {number}, for program {step.fingerprint}")
            for cut in step.cuts:
                each = f" per unit of {', '.join(cut.parents)}" if cut.parents else ""
                share = f"{cut.count} of {cut.size}"
                lines.append(f"  remove {share:>12} {cut.role} of {cut.group}{each}")
            for merge in step.merges:
                moved = ", reordered" if merge.reordering else ""
                share = f"{merge.size:>6} into {merge.groups}"
                lines.append(f"  merge {share} KV heads of {merge.group}{moved}")
            for branch in step.branches:
                held = f"{len(branch.weights)} weights"
                lines.append(f"  remove the branch {branch.name}, with {held}")
        for edit in self.edits.made if self.edits else ():
            lines.append(f"other values in {len(edit.weights)} weights, by {edit.by}")
        if self.calibration:
            lines.append(f"calibrated with {drawn_text(self.calibration)}")
        return "\n".join(lines)


def _advance(step: Step, origin: dict[WeightDim, list[list[int]]]) -> None:
    """Bring the record of the first program's indices past `step`."""
    for at, lost in step.removed().items():
        origin[at] = [o for index, o in enumerate(origin[at]) if index not in lost]
    for each in step.permutations:
        before = origin[each.weight, each.dim]
        origin[each.weight, each.dim] = [before[index] for index in each.sources]
    for merge in step.merges:
        for weight, dim, runs in merge.runs():
            before = origin[weight, dim]
            fused = {run[0]: sorted(i for j in run for i in before[j]) for run in runs}
            later = {index for run in runs for index in run[1:]}
            origin[weight, dim] = [
                fused.get(index, old) for index, old in enumerate(before) if index not in later
            ]
