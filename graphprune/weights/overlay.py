"""Changed weights in front of those that lie in files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphprune.errors import UsageError
from graphprune.weights.deferred import Deferred, converted
from graphprune.weights.files import is_finite
from graphprune.weights.placement import Placement
from graphprune.weights.scratch import spill
from graphprune.weights.tensors import type_name


def overlaid(
    weights: Mapping[str, Tensor], changed: Mapping[str, Tensor], placement: Placement
) -> dict[str, Tensor]:
    """Return `weights` with those `changed` in their place, of the types and devices of the old.

    Where all that is held would go past the limit of memory, they go to a scratch file; those that
    are deferred stay so.

    Raises
    ------
    UsageError
        When a value is too large for its type.
    OutputError
        When there is no room for a scratch file.
    """
    given = {name: _stored(name, new, weights[name]) for name, new in changed.items()}
    if placement.memory is not None and held_bytes({**weights, **given}) > placement.memory:
        held = {name: new for name, new in given.items() if not isinstance(new, Deferred)}
        for name, new in spill(held).items() if held else ():
            given[name] = converted(new, new.dtype, weights[name].device)
    return {**weights, **given}


def held_bytes(weights: Mapping[str, Tensor]) -> int:
    """Return the bytes of the weights that are held in memory, not in files."""
    return sum(w.nbytes for w in weights.values() if not isinstance(w, Deferred))


def _stored(name: str, weight: Tensor, old: Tensor) -> Tensor:
    """Return `weight` on the device and in the type of the `old` one, where that can hold it."""
    dtype = old.dtype
    if weight.dtype is dtype:
        deferred = isinstance(weight, Deferred)
        return converted(weight, dtype, old.device) if deferred else weight.to(old.device)
    found = weight.to(old.device, dtype)
    if found.is_floating_point() and not is_finite(found) and is_finite(weight):
        short = type_name(dtype)
        raise UsageError(f"{name} has values that are too large for {short}, which it is stored in")
    return found
