"""The base of all criteria, and the program, groups and data that they score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.matrices import Matrix, contractions
from graphprune.analysis.roles import Role
from graphprune.calibration.data import Calibration
from graphprune.criteria.units import consumers
from graphprune.errors import CalibrationError, SelectionError, UsageError, nearest
from graphprune.io.extensions import extension, provided
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.program import Program

Aggregate = Literal["sum", "mean", "max", "product", "last"]
"""How the scores of a unit in the weights of its group become one; "last" is the score in the
weight that the graph uses last, such as an output or down projection."""

Scores = dict[str, Tensor]
"""Group name -> float64 scores, shape ``[*parents' sizes, size]``."""


@dataclass(frozen=True)
class ScoringContext:
    """A program, its groups to score and the data to score them on.

    Parameters
    ----------
    program, coupling
        The program and its analysis.
    groups
        The groups to score.
    calibration
        Batches to run the program on, or None.
    aggregate
        How members are combined.
    seed
        Seed of whatever is random.
    track
        Wraps long loops in a progress bar.
    """

    program: Program
    coupling: Coupling
    groups: Sequence[Group]
    calibration: Calibration | None = None
    aggregate: Aggregate = "sum"
    seed: int = 0
    track: Progress = no_progress

    def sizes(self, group: Group) -> tuple[int, ...]:
        """Return the shape of the scores of `group`: the sizes of its parents, and its own."""
        return self.coupling.sizes(group)

    def data(self) -> Calibration:
        """Return the calibration batches.

        Raises
        ------
        CalibrationError
            When there are none, or they do not fit the program.
        """
        if self.calibration is None:
            raise CalibrationError("this criterion needs calibration data, and none was given")
        self.calibration.check(self.program)
        return self.calibration

    def weight(self, name: str) -> Tensor:
        """Return the weight called `name` as the program computes with it, on its device."""
        return self.program.take([name])[name].detach()

    def consumers(self, criterion: str) -> dict[str, list[tuple[Matrix, Tensor]]]:
        """Return the matrices that sum over each group, and the unit of each of their columns.

        `criterion` names who asks. Units are ``[parts, in]``, counted over all parents, -1 for a
        column of none.

        Raises
        ------
        SelectionError
            When nothing sums over a group.
        """
        matrices = contractions(self.program).matrices
        found = {
            group.name: consumers(self.program.weights, self.sizes(group), group, matrices)
            for group in self.groups
        }
        if lonely := [name for name, each in found.items() if not each]:
            raise SelectionError(
                f"{lonely[0]}: {criterion} scores what consumes it, and nothing does"
            )
        return found

    def parameters(self) -> list[str]:
        """Return the names of the parameters that the groups reach into, each once."""
        kinds = self.program.kinds
        names = dict.fromkeys(name for group in self.groups for name in group.weights())
        return [name for name in names if kinds[name] == "parameter"]


class Criterion(ABC):
    """Scores units of groups.

    A subclass with a `name` is known by it wherever its module is imported: at once in Python, by
    the entry-point group ``graphprune.criteria`` in an installed distribution, by ``--plugin FILE``
    on the command line. An object will do in place of a name, such as one with settings.

    Examples
    --------
    >>> import graphprune as gp
    >>> from graphprune.passes.prune import Prune
    >>> class LastUnits(Criterion):
    ...     name = "last-units"
    ...
    ...     def scores(self, context):
    ...         return {g.name: -torch.arange(g.size).double() for g in context.groups}
    >>> layers = torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    >>> program = gp.capture(torch.nn.Sequential(*layers), (torch.zeros(2, 4),))
    >>> pipeline = gp.Pipeline.parse("prune{target=* ratio=0.25 criterion=last-units}")
    >>> pipeline.run(program, quiet=True).plan.steps[0].cuts[0].units
    {(): (6, 7)}
    >>> str(Prune("*", 0.25, LastUnits()))
    'prune{target=* ratio=0.25 criterion=last-units}'
    """

    name: ClassVar[str]
    requires_calibration: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    """Whether scores estimate one thing in all groups, such as the loss: the units that are missed
    least can then be looked for in all of them."""

    only: ClassVar[frozenset[Role]] = frozenset()
    """The roles of the groups that it scores; none for groups of any role."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            CRITERIA[cls.name] = cls

    @property
    def settings(self) -> dict[str, str]:
        """The attributes of the object: scores depend on them beside the name."""
        return {key: repr(value) for key, value in vars(self).items()}

    def tokens_needed(self, program: Program) -> int:
        """Return how many tokens of calibration text tell one unit from another; 0 for any number.

        A gradient needs few: the default is as many as are drawn where nobody asks for a number.
        """
        return 0

    @abstractmethod
    def scores(self, context: ScoringContext) -> Scores:
        """Return the score of every unit of ``context.groups``; higher is more important."""


CRITERIA: dict[str, type[Criterion]] = {}
"""Every criterion whose module is imported, by name."""

GROUP = "graphprune.criteria"
"""The entry points of criteria in other distributions."""


def criterion(name: str) -> Criterion:
    """Return the criterion called `name`.

    Raises
    ------
    UsageError
        When there is none, with the nearest name; or a distribution's cannot be loaded, or is none.
    """
    if name not in CRITERIA:
        entries = provided(GROUP)
        if name not in entries:
            raise UsageError(
                f"there is no criterion {name!r}{nearest(name, [*CRITERIA, *entries])}"
            )
        found = extension(GROUP, name)
        if not (isinstance(found, type) and issubclass(found, Criterion)):
            raise UsageError(f"criterion {name!r} ({entries[name].value}) is no Criterion")
        if found.name != name:
            raise UsageError(
                f"criterion {name!r} ({entries[name].value}) calls itself {found.name!r}"
            )
    return CRITERIA[name]()


def check_scores(scores: Mapping[str, Tensor], context: ScoringContext) -> None:
    """Refuse scores that are missing, misshapen or not finite.

    Raises
    ------
    SelectionError
        Naming the group.
    """
    for group in context.groups:
        found = scores.get(group.name)
        if found is None or tuple(found.shape) != context.sizes(group):
            raise SelectionError(f"{group.name}: the criterion gave no scores of the right shape")
        if not bool(torch.isfinite(found).all()):
            raise SelectionError(f"{group.name}: the criterion gave scores that are not finite")
