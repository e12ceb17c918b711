"""Processor time of every test, listed at the end; a test of the gate that takes too much fails.

`slow` is decided by this measure. Processor time and not time on the wall, which says how busy the
machine was.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

MOST = 60.0
"""Seconds that a test may take that is not marked `slow`, with its fixtures and children."""

LISTED = 25

_began = pytest.StashKey[float]()


def seconds() -> float:
    """Processor time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_began] = seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown" and _began in item.stash:
        taken = seconds() - item.stash[_began]
        report.user_properties.append(("cpu", taken))
        if taken > MOST and item.get_closest_marker("slow") is None and report.passed:
            report.outcome = "failed"
            report.longrepr = f"took {taken:.0f} s of processor time: over {MOST:.0f} s is slow"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    taken = {
        report.nodeid: dict(report.user_properties)["cpu"]
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "teardown" and "cpu" in dict(report.user_properties)
    }
    if len(taken) < 2:
        return
    terminalreporter.section(f"{sum(taken.values()):.0f} s of processor time in {len(taken)} tests")
    for nodeid in sorted(taken, key=taken.__getitem__, reverse=True)[:LISTED]:
        terminalreporter.write_line(f"{taken[nodeid]:7.1f} s  {nodeid}")
