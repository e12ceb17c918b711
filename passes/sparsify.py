"""Set single weights to zero: unstructured and n-of-m sparsity."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune import ranks
from graphprune.errors import SelectionError
from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from graphprune.analysis.coupling import Coupling
    from graphprune.analysis.matrices import Matrix
    from graphprune.calibration.statistics import Statistics
    from graphprune.ir.program import Program
    from graphprune.transforms.sparsity import Pattern


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set the least important elements of matrices to zero; no size changes.

    Before
    ------
    ::

        up[112, 64]  7168 elements

    After
    -----
    With ``pattern=2:4``, in every four neighbors along the 64 inputs::

        up[112, 64]  3584 elements that are not zero

    Options
    -------
    pattern
        A ratio of zeros such as 0.5, or n:m, which keeps n of every m neighbors along the axis
        that is summed over.
    criterion
        How elements are scored: wanda, wanda-variant (rows lose the same share of their score),
        ria (relative importance and activations), magnitude, random (the baseline); or sparsegpt
        or alps, which also update what stays.
    scope
        What elements are compared within: row (an output's inputs), layer (a matrix) or global;
        none takes row for wanda, and layer for ria and without data, as their papers do.
    permute
        Of n:m: whether channels are brought into the order in which n of m neighbors lose least,
        before anything becomes zero, wherever their order is free: FFN units, the width of heads,
        the residual stream. What makes them is permuted as well, so that this by itself changes
        nothing that the program gives.
    sequential
        Whether a layer is scored on what the sparse layers before it give.
    target
        Which weights: layers (those of numbered layers, but routers), all, or a glob over names.
    skip
        Globs over weights that stay as they are.
    statistics
        A file of what was measured (safetensors): read where it exists, so that another pattern
        takes seconds and no data; else written. With sequential=false.
    memory
        The most MiB that what is measured may take at once; a layer that takes more is run
        several times.

    Requires
    --------
    Calibration data, but for the criteria magnitude and random, and where the file of statistics
    exists; the coupling of the program.

    Preserves
    ---------
    The coupling.

    Refuses
    -------
    A pattern whose m does not divide the inputs of a matrix, a target or pattern that matches
    nothing, a scope that the criterion does not have, weights that are not finite, integers with
    sparsegpt or alps (`SelectionError`); statistics of another program, other weights or other
    data, and such as do not fit the memory (`CalibrationError`).

    Reference
    ---------
    Sun et al., Wanda, 2306.11695, equation 1 and section 3; Frantar and Alistarh, SparseGPT,
    2301.00774, algorithm 1; Meng et al., ALPS, 2406.07831, algorithms 1 and 2; Zhang et al., RIA,
    ICLR 2024.

    Example
    -------
    >>> str(Sparsify(pattern="2:4"))
    'sparsify{pattern=2:4}'
    """

    name: ClassVar[str] = "sparsify"
    resizes: ClassVar[bool] = False
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    pattern: str
    criterion: Literal[
        "wanda", "wanda-variant", "ria", "magnitude", "sparsegpt", "alps", "random"
    ] = "wanda"
    scope: Literal["row", "layer", "global"] | None = None
    permute: bool = False
    sequential: bool = True
    target: str = "layers"
    skip: tuple[str, ...] = ()
    statistics: str | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from graphprune.transforms.sparsity import Pattern

        pattern = Pattern.parse(self.pattern)
        if self.scope is not None and (self.criterion == "wanda-variant" or self._updates):
            raise SelectionError(f"sparsify: {self.criterion} has no scope to choose")
        if pattern.of and (self.criterion == "wanda-variant" or self.scope is not None):
            raise SelectionError(
                f"sparsify: {self.pattern} is chosen block by block: give no scope"
            )
        if self.scope == "global" and self.sequential and self._looks:
            raise SelectionError(
                "sparsify: scope=global compares all matrices at once: give sequential=false"
            )
        if self.statistics is not None and self.sequential:
            raise SelectionError(
                "sparsify: statistics are of the program as it is, not of what sparse layers give: "
                "give sequential=false"
            )
        if not self._looks and (self.statistics is not None or self.memory is not None):
            raise SelectionError(
                f"sparsify: {self.criterion} measures nothing: give neither statistics nor memory"
            )
        if self.permute and not pattern.of:
            raise SelectionError(f"sparsify: permute is of n:m, and pattern is {self.pattern}")
        if self.permute and (self.criterion == "random" or self.statistics is not None):
            what = "a file of statistics" if self.statistics else "criterion=random"
            raise SelectionError(f"sparsify: permute looks at the program itself: not with {what}")
        if self.memory is not None and not self.memory > 0:
            raise SelectionError(f"sparsify: memory {self.memory:g} is not positive")

    @property
    def _looks(self) -> bool:
        return self.criterion not in ("magnitude", "random")

    @property
    def _updates(self) -> bool:
        return self.criterion in ("sparsegpt", "alps")

    @property
    def requires_calibration(self) -> bool:
        """Return whether the criterion looks at data that no file of statistics stands for."""
        return self._looks and not (self.statistics and Path(self.statistics).exists())

    @property
    def instead_of_calibration(self) -> str:
        """Scores of the weights alone."""
        return "criterion=magnitude"

    def calibration_tokens(self, program: Program) -> int:
        """Return what least squares need, where there are some."""
        from graphprune.calibration.statistics import tokens_for_gram

        return tokens_for_gram(program) if self._updates else 0

    def run(self, program: Program, context: Context) -> Outcome:
        """Find the matrices, score them, and set zeros."""
        from graphprune.analysis.matrices import contractions
        from graphprune.transforms.sparsity import Pattern, check_values

        pattern = Pattern.parse(self.pattern)
        found = contractions(program)
        matrices = self._targets(found.matrices, context.coupling(program))
        for matrix in matrices:
            pattern.check(matrix.name, matrix.channels)
            check_values(matrix.name, program.weights[matrix.weight], moved=self._updates)
        if pattern.ratio == 0:
            return Outcome(program, details={"note": "ratio 0: nothing becomes zero"})
        permuted: dict[str, Any] = {}
        if self.permute:
            program, permuted = self._permuted(program, matrices, pattern, context)
        work = _Work(self, program, pattern, context.seed)
        new, taken = self._new(program, matrices, work, context)
        elements = sum(program.weights[name].numel() for name in new)
        zeros = sum(int((weight == 0).sum()) for weight in new.values())
        details = {
            "weights": len(new),
            "elements": elements,
            "zeros": zeros,
            "sparsity": round(zeros / elements, 4),
            "scored by magnitude": work.unseen,
            "untouched": dict(found.others),
            **permuted,
            **taken,
        }
        if pattern.of and 4 % pattern.of == 0 and 2 * pattern.kept <= pattern.of:
            details["hardware"] = _hardware(matrices, new)
        promised = dict.fromkeys(new, self.pattern) if pattern.of else {}
        sparse = program.with_weights(new)
        return Outcome(sparse, details=details, edited=True, patterns=promised)

    def _permuted(
        self, program: Program, matrices: Sequence[Matrix], pattern: Pattern, context: Context
    ) -> tuple[Program, dict[str, Any]]:
        """Return the same program with channels in a better order, and what that keeps more."""
        import torch

        from graphprune.calibration.statistics import observe
        from graphprune.plan.steps import Permutation
        from graphprune.transforms.heads.deinterleave import permute_weights
        from graphprune.transforms.permute_channels import best_order, free_axes, kept, reordered

        coupling = context.coupling(program)
        statistics: Statistics = {}
        if self._looks:
            assert context.calibration is not None, "the pass manager has asked for it"
            bound = None if self.memory is None else int(self.memory * 2**20)
            data, track = context.calibration, context.track
            statistics = observe(program, matrices, data, track=track, memory=bound)
        work = _Work(self, program, pattern, context.seed)
        found, told = list[Permutation](), dict[str, list[float]]()
        for axis in context.track(free_axes(coupling, matrices, pattern), "permuting channels"):
            scores = axis.rows(lambda matrix: work.scores(matrix, statistics), pattern)
            order = best_order(scores, pattern)
            found += reordered(coupling, axis, order)
            both = (kept(scores, at, pattern) for at in (torch.arange(len(order)), order))
            told[axis.name] = [round(each / len(axis.matrices), 4) for each in both]
        new = program.with_weights(permute_weights(program.weights, found))
        return new, {"score kept, in order and permuted": told}

    def _new(
        self, program: Program, matrices: Sequence[Matrix], work: _Work, context: Context
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Return the sparse weights, and what finding them took."""
        from graphprune.calibration.layerwise import ChangedWeights
        from graphprune.calibration.statistics import (
            load_or_observe,
            observe,
            run_layerwise,
            statistics_bytes,
        )

        changed = ChangedWeights(program)
        if not self._looks:
            for held in context.track(self.together(matrices), "setting zeros"):
                changed.store_all(work((), held, {}))
            return changed.weights, {}
        data, track = context.calibration, context.track
        bound = None if self.memory is None else int(self.memory * 2**20)
        needed = {"statistics bytes": statistics_bytes(matrices, work.kind)}
        if self.statistics is not None:
            read = "read from" if Path(self.statistics).exists() else "written to"
            given = self.statistics, program, matrices, data, work.kind, track, bound
            seen = load_or_observe(*given)
            for held in track(self.together(matrices), "setting zeros"):
                changed.store_all(work((), held, seen))
            return changed.weights, {**needed, "statistics": f"{read} {self.statistics}"}
        assert data is not None, "the pass manager has asked for it"
        if self.scope == "global":
            seen = observe(program, matrices, data, work.kind, track, bound)
            changed.store_all(work((), matrices, seen))
            return changed.weights, needed
        layerwise = run_layerwise(
            program, matrices, data, work.kind, work, track, replay=self.sequential, memory=bound
        )
        return layerwise.weights, {
            "calibration bytes": layerwise.peak_bytes,
            "statistics bytes": layerwise.statistics_bytes,
        }

    def together(self, matrices: Sequence[Matrix]) -> list[list[Matrix]]:
        """Group the matrices that are compared with each other or lie in one weight."""
        found: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            found.setdefault("" if self.scope == "global" else matrix.weight, []).append(matrix)
        return list(found.values())

    def _targets(self, matrices: Sequence[Matrix], coupling: Coupling) -> list[Matrix]:
        """Return the matrices that the options name."""
        from graphprune.ir.provenance import layer_of

        names = {matrix.weight for matrix in matrices}
        for pattern in self.skip:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SelectionError(f"skip pattern {pattern!r} matches no matrix")
        if self.target == "layers":
            routers = _routers(coupling)
            names = {n for n in names if layer_of(n) and n not in routers}
        elif self.target != "all":
            names = {name for name in names if fnmatchcase(name, self.target)}
        names = {n for n in names if not any(fnmatchcase(n, pattern) for pattern in self.skip)}
        if not names:
            raise SelectionError(f"target {self.target!r} matches no matrix")
        return [matrix for matrix in matrices if matrix.weight in names]


def _routers(coupling: Coupling) -> set[str]:
    """Return the weights whose outputs are scores of experts."""
    weights = coupling.program.weights
    return {
        member.weight
        for group in coupling.groups
        if group.role == "expert"
        for member in group.members
        if weights[member.weight].ndim == 2 and member.dim == 0
    }


def _hardware(matrices: Sequence[Matrix], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what sparse tensor cores would gain in 16 bits, in theory."""
    import torch

    from graphprune.backends.semi_structured import SemiStructured

    linear = torch.ops.aten.linear.default
    others = {
        matrix.name: "it is not the weight of a linear layer"
        for matrix in matrices
        if any(use.node.target is not linear for use in matrix.uses)
    }
    found = SemiStructured.of(
        (matrix.name, weights[matrix.weight].to(torch.bfloat16))
        for matrix in matrices
        if matrix.name not in others
    )
    return {
        "note": "stored as dense zeros; graphprune.backends.semi_structured.to_semi_structured "
        "converts a loaded model, whose 2:4 products are then up to twice as fast in theory",
        "semi-structured": f"{len(found.layers)} of {len(matrices)} matrices, in 16 bits",
        "dense bytes": found.dense_bytes,
        "semi-structured bytes": found.bytes,
        "others": {**found.others, **others},
    }


class _Work:
    """Makes new weights of matrices and their statistics; notes what no data was seen for."""

    def __init__(self, options: Sparsify, program: Program, pattern: Pattern, seed: int) -> None:
        import torch

        self.options, self.program, self.pattern = options, program, pattern
        self.kind: Literal["moments", "gram"] = "gram" if options._updates else "moments"
        self.unseen: list[str] = []
        self._drawn = torch.Generator().manual_seed(seed)

    def __call__(
        self, nodes: Sequence[Node], matrices: Sequence[Matrix], statistics: Statistics
    ) -> Iterator[Mapping[str, Tensor]]:
        from graphprune.transforms.sparse_updates import UPDATES

        groups = self.options.together(matrices)
        for matrix in matrices if statistics else ():
            parts = (statistics[matrix.name].count == 0).nonzero().flatten().tolist()
            self.unseen += [f"{matrix.name}, part {part}" for part in parts]
        if update := UPDATES.get(self.options.criterion):

            def solve(matrix: Matrix) -> Tensor:
                return update(self._read(matrix), statistics[matrix.name], self.pattern)[0]

            solved = ranks.each_once([m for held in groups for m in held], solve)
            for held in groups:
                yield self._written(held, itertools.islice(solved, len(held)))
            return
        for held in groups:
            yield self._with_zeros(held, self._zeros(held, statistics))

    def _read(self, matrix: Matrix) -> Tensor:
        return matrix.read(self.program.take([matrix.weight])[matrix.weight])

    def _written(self, matrices: Sequence[Matrix], values: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the weights of `matrices` with other values."""
        new: dict[str, Tensor] = {}
        for matrix, value in zip(matrices, values, strict=True):
            name = matrix.weight
            weight = new[name] if name in new else self.program.take([name])[name]
            new[name] = matrix.write(weight, value)
        return new

    def _with_zeros(self, matrices: Sequence[Matrix], zeros: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the weights of `matrices`, as they are stored, with zeros."""
        from graphprune.weights.deferred import made

        new: dict[str, Tensor] = {}
        for matrix, zero in zip(matrices, zeros, strict=True):
            name = matrix.weight
            weight = new[name] if name in new else made(self.program.weights[name])
            zero = zero.to(weight.device)
            new[name] = matrix.write(weight, matrix.read(weight).masked_fill_(zero, 0))
        return new

    def _zeros(self, matrices: Sequence[Matrix], statistics: Statistics) -> list[Tensor]:
        """Return which elements go of matrices that are compared with each other."""
        from graphprune.transforms.sparsity import zeros_by_score, zeros_by_share

        scores = [self.scores(matrix, statistics) for matrix in matrices]
        if self.options.criterion == "wanda-variant":
            return [zeros_by_share(score, self.pattern.ratio) for score in scores]
        by_row = statistics and self.options.criterion != "ria"
        scope = self.options.scope or ("row" if by_row else "layer")
        return zeros_by_score(scores, self.pattern, scope)

    def scores(self, matrix: Matrix, statistics: Statistics) -> Tensor:
        """Return the scores of the elements of a matrix, ``[parts, out, in]``."""
        import torch

        from graphprune.transforms.sparsity import ria_scores, wanda_scores

        if statistics:
            scores = ria_scores if self.options.criterion == "ria" else wanda_scores
            return scores(self._read(matrix), statistics[matrix.name])
        if self.options.criterion == "random":
            device = self.program.weights[matrix.weight].device
            return torch.rand(matrix.shape, generator=self._drawn).to(device)
        return self._read(matrix).float().abs()
