"""Refitting what stays, so that a matrix gives what it gave before columns of it were removed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.matrices import Matrix, bias_of, contractions
from graphprune.calibration.damping import validated_damp, without_columns
from graphprune.calibration.data import Calibration
from graphprune.calibration.input_statistics import InputStatistics
from graphprune.calibration.statistics import Statistics, run_layerwise
from graphprune.errors import CalibrationError, PlanError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.interpreter import call
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.transforms.joint.addends import behind_cuts, experts_of
from graphprune.transforms.joint.refit import refit_together
from graphprune.transforms.sparsity import check_values
from graphprune.verification.masked_reference import MaskedReference

Look = Callable[[Sequence[Matrix], Statistics], None]
"""Sees matrices and the statistics of their inputs."""


@dataclass(frozen=True)
class Refitted:
    """A program whose weights make up for what is going to go.

    Parameters
    ----------
    program
        The program at its first size, on which the plan can be applied.
    names
        What was refitted.
    errors
        Group of experts -> the error behind them, as `Fitted` has it.
    peak_bytes, statistics_bytes
        The most that activations and statistics took together, and statistics alone.
    """

    program: Program
    names: list[str]
    errors: Mapping[str, tuple[float, float]]
    peak_bytes: int
    statistics_bytes: int


def refit(
    program: Program,
    coupling: Coupling,
    plan: Plan,
    calibration: Calibration,
    *,
    damp: float | None = None,
    track: Progress = no_progress,
    memory: int | None = None,
    also: Collection[str] = (),
    look: Look | None = None,
    onwards: bool = True,
) -> Refitted:
    """Return `program` with the units of `plan` at zero and their consumers refitted.

    For a matrix W whose columns R go and K stay, with the second moments C of its inputs on the
    calibration data, the least squares solution is W' = W C[:, K] (C[K, K] + lambda I)^-1, where
    lambda is `damp` times the mean of the diagonal. Where the contraction has a bias of its own, C
    is the covariance, and the bias takes up the mean of what is gone. Layers follow each other: the
    inputs are those that the refitted layers before give. In the end experts that stay are fitted
    together, where others go, and then, `onwards`, all that the units that go reach, towards what
    it gave in `program` (`behind_cuts`, `refit_together`).

    Parameters
    ----------
    program
        The program that `plan` was made for.
    coupling
        Its analysis.
    plan
        Cuts of groups whose removal equals zeroing, or of experts; no merges, and no branches.
    calibration
        Batches to run it on.
    damp
        As above; None for what rows that a fit did not see ask for, matrix by matrix.
    track
        Wraps the loop over layers in a progress bar.
    memory
        The most bytes that second moments may take at once.
    also
        Weights whose matrices `look` is to see beside those that are refitted.
    look
        Sees matrices, layer after layer. Rows of units that go stay as they are for it, also in
        what is returned.
    onwards
        As above.

    Raises
    ------
    PlanError
        When the plan merges, takes branches, or cuts units whose removal is no zeroing.
    SelectionError
        When a matrix that is to be refitted holds integers, or values that are not finite; when
        outputs of experts cannot be followed.
    CalibrationError
        When a matrix of second moments is singular in spite of the damping, or `memory` is too
        little for those of one.
    """
    _check(coupling, plan)
    weights = program.operands
    experts = experts_of(program, coupling, plan)
    later = {name for each in experts for name in each.weights}
    every = contractions(program).matrices
    others = [each for each in every if each.weight not in later]
    removal = LostInputs.of(program, plan, others)
    matrices = [each for each in others if each in removal.columns or each.weight in also]
    if not matrices and not experts:
        raise PlanError("no matrix lost a column: there is nothing to refit")
    gone = removal.gone
    for matrix in removal.columns:
        check_values(matrix.name, program.weights[matrix.weight], moved=True)
    names = {node: name for name, node in program.weight_nodes()}
    done: set[str] = set()
    biases: dict[str, Tensor] = {}
    refitted: list[str] = []

    def edit(
        nodes: Sequence[fx.Node], held: Sequence[Matrix], statistics: Statistics
    ) -> Iterator[Mapping[str, Tensor]]:
        new = removal.refitted(held, statistics, damp, biases)
        if look is None:
            used = {names[other] for n in nodes for other in n.all_input_nodes if other in names}
            new = {name: weights[name] for name in used & gone.keys() - done} | new
            new = {n: w.masked_fill(gone[n], 0) if n in gone else w for n, w in new.items()}
        else:  # it may ask for units that go, so these are still computed, and count for nothing
            look(held, statistics)
        refitted.extend(matrix.name for matrix in held if matrix in removal.columns)
        done.update(new)
        yield new

    compute = MaskedReference(program, plan).computing if experts else lambda: call
    layerwise = run_layerwise(
        program, matrices, calibration, "gram", edit, track, memory=memory, compute=compute
    )
    rest = {
        name: weights[name].masked_fill(mask, 0)
        for name, mask in gone.items()
        if name not in layerwise.weights
    }
    fitted = program.with_weights({**rest, **layerwise.weights})
    bytes_taken = layerwise.peak_bytes, layerwise.statistics_bytes
    reached = behind_cuts(program, every, gone, removal.columns) if onwards else []
    if not (together := [*experts, *reached]):
        return Refitted(fitted, refitted, {}, *bytes_taken)
    reference = MaskedReference(fitted, plan) if experts else None
    found = refit_together(
        fitted, program, together, calibration, reference=reference, damp=damp, track=track
    )
    peak = max(bytes_taken[0], found.peak_bytes)
    refitted = list(dict.fromkeys(refitted + found.names))
    return Refitted(found.program, refitted, found.errors, peak, bytes_taken[1])


@dataclass(frozen=True, eq=False)
class LostInputs:
    """What a plan takes of weights, and the inputs that matrices lose by it.

    Parameters
    ----------
    program
        The program that the plan was made for.
    gone
        Weight name -> boolean mask of what goes.
    columns
        Matrices that lose inputs -> which, boolean, ``[parts, in]``.
    """

    program: Program
    gone: Mapping[str, Tensor]
    columns: Mapping[Matrix, Tensor]

    @classmethod
    def of(cls, program: Program, plan: Plan, matrices: Sequence[Matrix]) -> LostInputs:
        """Return what `plan` takes of `program` and of those of its `matrices` that lose inputs."""
        masks = plan.masks(program.weights)
        gone = {name: mask.to(program.device) for name, mask in masks.items()}
        found = {m: _columns(m.read(gone[m.weight])) for m in matrices if m.weight in gone}
        return cls(program, gone, {m: lost for m, lost in found.items() if bool(lost.any())})

    def refitted(
        self,
        held: Sequence[Matrix],
        statistics: Statistics,
        damp: float | None = None,
        biases: MutableMapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the weights and biases of `held` once what stays makes up for what goes.

        Parameters
        ----------
        held
            All matrices of their weights; those that lose nothing are left out.
        statistics
            Of their inputs, of kind "gram".
        damp
            As in `refit`.
        biases
            Takes the biases, and holds those that earlier matrices have moved.

        Returns
        -------
        dict
            Names -> values at their first sizes, with zeros for inputs that go.

        Raises
        ------
        CalibrationError
            As `refit`.
        """
        weights, biases = self.program.operands, {} if biases is None else biases
        new: dict[str, Tensor] = {}
        lost = [matrix for matrix in held if matrix in self.columns]

        def solve(matrix: Matrix) -> tuple[Tensor, Tensor]:
            dense = matrix.read(weights[matrix.weight]).double()
            seen, centered = statistics[matrix.name], bool(bias_of(self.program, matrix))
            return _least_squares(matrix.name, dense, self.columns[matrix], seen, damp, centered)

        for matrix, (best, shift) in zip(lost, ranks.each_once(lost, solve), strict=True):
            name, bias = matrix.weight, bias_of(self.program, matrix)
            new[name] = matrix.write(new.get(name, weights[name]), best)
            if bias:
                old = biases.get(bias, weights[bias])
                biases[bias] = (old.double() + shift.reshape(old.shape)).to(old.dtype)
                new[bias] = biases[bias]
        return new


def _check(coupling: Coupling, plan: Plan) -> None:
    if any(step.merges for step in plan.steps):
        raise PlanError("heads that were merged in one step with cuts cannot be refitted")
    if any(step.branches for step in plan.steps):
        raise PlanError("what branches went after cannot be refitted: refit before prune-depth")
    for cut in (cut for step in plan.steps for cut in step.cuts):
        group = coupling.group(cut.group)
        if not group.is_zeroing and group.role != "expert":
            raise PlanError(
                f"{cut.group} ({group.role}, {group.exactness}): its removal is no zeroing of "
                "weights, so what stays cannot be refitted"
            )


def _columns(gone: Tensor) -> Tensor:
    """Return a boolean mask, ``[parts, in]``, of the columns that go in rows that stay."""
    rows = gone.all(2, keepdim=True)
    return (gone | rows).all(1) & ~rows.all(1)


def _least_squares(
    name: str,
    dense: Tensor,
    columns: Tensor,
    seen: InputStatistics,
    damp: float | None,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """Return the best matrix without `columns`, and what a bias takes up, ``[parts, out]``."""
    assert seen.gram is not None
    best = dense.clone()
    for part, gram in enumerate(seen.gram):
        gone, count = columns[part], int(seen.count[part])
        best[part][:, gone] = 0
        if not count or bool(gone.all()) or not bool(gone.any()):
            continue
        moments = gram / count
        if centered:
            moments = moments - torch.outer(seen.mean[part], seen.mean[part])
        own = damp
        if own is None:
            own = validated_damp(dense[part], seen, part, gone, centered=centered)
        try:
            best[part] = without_columns(dense[part], moments, gone, own)
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}") from error
    shift = ((dense - best) @ seen.mean[..., None])[..., 0]
    return best, shift
