"""Index maps: from units of a group to the indices that they hold in a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class IndexMap:
    """An affine map from the units of a group to indices of a dimension of a weight.

    Unit ``u`` holds ``offset + sum(o_k * stride_k) + u * width + i`` for every coordinate ``o_k``
    of the loops in `outer` and every ``0 <= i < width``. A weight that one unit owns, such as a
    matrix of one of several modules, is held by that one from end to end and by no other.

    Parameters
    ----------
    weight, dim
        The weight, by its name in the program, and its dimension.
    offset
        Where the first unit starts.
    width
        How many neighboring indices a unit holds.
    extent
        The size of the dimension.
    outer
        (size, stride) of the loops around the group, outermost first.
    outer_groups
        For every outer loop the name of the group that it walks, or None.
    owner
        The unit that owns the whole weight (`dim` is its first, `width` its `extent`), or None.
    """

    weight: str
    dim: int
    offset: int
    width: int
    extent: int
    outer: tuple[tuple[int, int], ...] = ()
    outer_groups: tuple[str | None, ...] = ()
    owner: int | None = None

    def indices(self, unit: int, parents: Mapping[str, int] | None = None) -> list[int]:
        """Return the sorted indices of `unit`, under the units of its `parents` (None: under all).

        Parameters
        ----------
        unit
            The unit.
        parents
            Name of a group that a loop walks -> its unit.
        """
        if self.owner is not None:
            return list(range(self.extent)) if unit == self.owner else []
        starts = [self.offset + unit * self.width]
        for (size, stride), group in zip(self.outer, self.outer_groups, strict=True):
            at = (parents or {}).get(group) if group is not None else None
            coordinates = range(size) if at is None else (at,)
            starts = [start + o * stride for start in starts for o in coordinates]
        return sorted(start + i for start in starts for i in range(self.width))
