"""Changed weights in front of those that lie in files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.errors import UsageError
from graphprune.weights.deferred import Deferred
from graphprune.weights.files import is_finite
from graphprune.weights.placement import Placement
from graphprune.weights.scratch import spill
from graphprune.weights.tensors import type_name


def overlaid(
    weights: Mapping[str, Tensor], changed: Mapping[str, Tensor], placement: Placement
) -> dict[str, Tensor]:
    """Return `weights` with those `changed` in their place, of the types and devices of the old.

    They go to a scratch file where all that is held would go past the limit of memory.

    Raises
    ------
    UsageError
        When a value is too large for its type.
    OutputError
        When there is no room for a scratch file.
    """
    given = {
        name: _stored(name, new, weights[name].dtype).to(weights[name].device)
        for name, new in changed.items()
    }
    if placement.memory is not None and held_bytes({**weights, **given}) > placement.memory:
        given = spill(given)
    return {**weights, **given}


def held_bytes(weights: Mapping[str, Tensor]) -> int:
    """Return the bytes of the weights that are held in memory, not in files."""
    return sum(w.nbytes for w in weights.values() if not isinstance(w, Deferred))


def _stored(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` in the type in which it is stored, where that can hold it."""
    if weight.dtype is dtype:
        return weight
    found = weight.to(dtype)
    if found.is_floating_point() and not is_finite(found) and is_finite(weight):
        short = type_name(dtype)
        raise UsageError(f"{name} has values that are too large for {short}, which it is stored in")
    return found
