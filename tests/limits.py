"""Programs with hardly more memory than the weights of one segment take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from graphprune.calibration import layerwise
from graphprune.ir.program import Program
from graphprune.weights.placement import Placement


def least_memory(program: Program, room: Callable[[Program], int | None]) -> int:
    """Return the bytes of weights that `room` leaves out, where nothing is read ahead."""
    roomy = dataclasses.replace(program, placement=Placement(memory=2**40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "can_read_ahead", lambda _: False)
        left = room(roomy)
    assert left is not None
    return 2**40 - left
