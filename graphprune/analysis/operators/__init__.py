"""The rule table: how each ATen operator types its result, and what follows from a size.

An operator without a rule freezes every axis that it touches, with itself as the reason.
"""

from __future__ import annotations

from graphprune.analysis.operators import (
    contraction,
    elementwise,
    indexing,
    layout,
    reduction,
    slicing,
)
from graphprune.analysis.operators.rule import RULES, Rule

__all__ = [
    "RULES",
    "Rule",
    "contraction",
    "elementwise",
    "indexing",
    "layout",
    "markdown",
    "reduction",
    "slicing",
    "table",
]


_OWN = ("delta_recurrence.default", "linear_recurrence.default", "max_recurrence.default")
"""Operators of `graphprune.frontend.recurrences`; all others are those of ATen."""


def table() -> list[dict[str, str]]:
    """Return every ruled operator with its rule, for people.

    Returns
    -------
    list of dict
        Keys ``operator``, ``typing`` and ``zero`` (where the result is zero when the weights of
        a unit are zeroed), sorted by operator.
    """
    return [
        {
            "operator": f"{'graphprune' if name in _OWN else 'aten'}.{name}",
            "typing": entry.summary,
            "zero": entry.zero.value,
        }
        for name, entry in sorted(RULES.items())
    ]


def markdown() -> str:
    """Return the table as the text of ``analysis/operators/README.md``, a line for each rule."""
    rules: dict[str, list[str]] = {}
    for name, entry in RULES.items():
        rules.setdefault(f"{entry.summary} | {entry.zero.value}", []).append(name)
    lines = [
        "# Operator rules",
        "",
        "Made from the code (`graphprune.analysis.operators.markdown`); a test compares the two.",
        "An operator that is not here freezes every axis that it touches. In-place forms (`add_`)",
        "follow the rule of the plain one.",
        "",
        f"{len(RULES)} operators, {len(rules)} rules.",
        "",
        "| operators | typing | zero, when weights are zeroed |",
        "|---|---|---|",
    ]
    for rule, names in sorted(rules.items(), key=lambda item: min(item[1])):
        lines.append(f"| {', '.join(f'`{name}`' for name in sorted(names))} | {rule} |")
    return "\n".join([*lines, ""])
