"""What stands where a path is expected and can be none is refused in a short line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from byte_llama import byte_tokenizer

import graphprune as gp
from graphprune.calibration.data import Calibration
from graphprune.errors import (
    CalibrationError,
    CheckpointError,
    GraphPruneError,
    OutputError,
    PlanError,
)
from graphprune.plan.plan import Plan

TEXT = "Once upon a time\nthere was a text.\n" * 200


def test_what_is_neither_a_text_nor_a_path_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a path is wanted, not None"):
        gp.load(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "holds"),
    [(TEXT, "a line break"), ("a\0b", "a null character"), ("a" * 300, "more than 255 bytes")],
)
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (gp.load, CheckpointError),
        (lambda given: Calibration.from_text(given, byte_tokenizer()), CalibrationError),
        (lambda given: Calibration.from_text(Path(__file__), given), CalibrationError),
        (Plan.load, PlanError),
        (Plan().save, OutputError),
    ],
)
def test_what_is_no_path_is_refused_in_a_short_line(
    call: Callable[[str], object], error: type[GraphPruneError], given: str, holds: str
) -> None:
    with pytest.raises(error) as caught:
        call(given)
    message = str(caught.value)
    assert "is no path" in message
    assert holds in message
    assert "\n" not in message
    assert len(message) < 200
