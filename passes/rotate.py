"""Rotate units into an order of importance before they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class Rotate(Pass):
    """Replace units by combinations of them, so that the last ones matter least; no size changes.

    Before
    ------
    ::

        v[(kv d), hidden]  o[hidden, (kv q d)]  every d matters

    After
    -----
    Under each KV head its values v become v T and what reads them T⁻¹ o, which gives the same::

        v[(kv d), hidden]  o[hidden, (kv q d)]  the first d matter most, the last ones hardly

    so that `prune{target=head-dim criterion=order}` then leaves the best product of so many
    columns. With ``target=hidden`` the whole residual stream is turned into its principal
    directions, where norms only divide by its length; their gains go into what reads them.

    Options
    -------
    target
        Which groups, as `prune` names them. Of these the ones are rotated whose units only pass
        linearly through the graph: the width of values, that of queries and keys where no rotary
        embedding turns them, and a residual stream (hidden) with root mean square norms before its
        branches and a head that is not tied to the embedding. The report has the reason for each of
        the others.
    skip
        Globs over names of groups or weights that stay as they are.

    Requires
    --------
    The coupling of the program. Calibration data, if there is some, says how much units matter;
    else the weights do.

    Preserves
    ---------
    The coupling.

    Refuses
    -------
    A target or pattern that matches nothing (`SelectionError`); a result that differs by more than
    rounding (`VerificationError`).

    Reference
    ---------
    Lin et al., MoDeGPT, 2408.09632, section 3.2 (type III, values and outputs, by singular value
    decomposition); queries and keys likewise, where nothing turns them. Ashkboos et al., SliceGPT,
    2401.15024, section 3 (principal components of the stream), with one rotation for all layers,
    so that the checkpoint keeps its form.

    Example
    -------
    >>> str(Rotate(skip=("*.0.*",)))
    'rotate{skip=*.0.*}'
    """

    name: ClassVar[str] = "rotate"
    resizes: ClassVar[bool] = False
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    target: tuple[str, ...] = ("head-dim",)
    skip: tuple[str, ...] = ()

    def calibration_tokens(self, program: Program) -> int:
        """Return what products of all pairs of inputs need."""
        from graphprune.calibration.statistics import tokens_for_gram

        return tokens_for_gram(program)

    def run(self, program: Program, context: Context) -> Outcome:
        """Find what may be rotated, measure it, rotate it, and compare with what it gave."""
        from graphprune.selection.targets import target_groups
        from graphprune.transforms.rotations.rotate import difference, rotate

        coupling = context.coupling(program)
        every = (target_groups(coupling, target, self.skip) for target in self.target)
        groups = list({group.name: group for found in every for group in found}.values())
        made = rotate(program, coupling, groups, context.calibration, context.track)
        details: dict[str, Any] = {"rotated": {}, "not rotated": dict(made.others)}
        if made.program is program:
            return Outcome(program, details=details)
        details["rotated"] = {name: _kept(share.tolist()) for name, share in made.shares.items()}
        error = difference(program, made.program, context.seed)
        return Outcome(made.program, details=details, edited=True, verified=error)


def _kept(shares: list[float]) -> list[float]:
    """Return the parts of all that matters that three quarters and a half of the units have."""
    return [round(sum(shares[: len(shares) * part // 4]), 4) for part in (3, 2)]
