from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakePlan, Shrink, fake_program

from graphprune.errors import UsageError, VerificationError
from graphprune.passes.verify import Verify
from graphprune.pipeline.pass_base import Context
from graphprune.pipeline.pass_manager import PassManager


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def verify(*args: Any, tolerance: float | None = None) -> Any:
        calls.append((*args, tolerance))
        if tolerance is not None and tolerance < 1e-6:
            raise VerificationError("logits differ by 1e-6")
        found = {"max_relative_error": 1e-6}
        return SimpleNamespace(to_dict=lambda: found, **found)

    monkeypatch.setitem(
        sys.modules, "graphprune.verification.verify", SimpleNamespace(verify=verify)
    )
    return calls


def run(*passes: Any) -> Any:
    program: Any = fake_program()
    return PassManager(passes).run(Context(program, FakePlan()))  # type: ignore[arg-type]


def test_it_verifies_against_the_original_and_reports(calls: list[Any]) -> None:
    result = run(Shrink(), Verify(tolerance=0.01))
    original, plan, program, tolerance = calls[-1]
    assert original.weights["up"].shape == (16, 8)
    assert (plan, program, tolerance) == (result.plan, result.program, 0.01)
    assert result.report.passes[-1].details == {"max_relative_error": 1e-6}


def test_a_difference_names_the_pass(calls: list[Any]) -> None:
    with pytest.raises(VerificationError, match=r"^pass 2 \(verify\): logits differ"):
        run(Shrink(), Verify(tolerance=1e-7))


@pytest.mark.parametrize("tolerance", [0, -1])
def test_a_tolerance_is_positive(tolerance: float) -> None:
    with pytest.raises(UsageError, match="verify: tolerance .* is not positive"):
        Verify(tolerance=tolerance)
