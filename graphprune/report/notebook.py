"""What a notebook shows of a program and of a run: a few lines, as text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from graphprune.analysis.coupling import analyze
from graphprune.errors import GraphPruneError
from graphprune.report.overview import collapse_names, layer_pattern

if TYPE_CHECKING:
    from graphprune.ir.program import Program

_SHOWN = 6
"""Kinds of groups."""


def program_card(program: Program, *, as_html: bool = False) -> str:
    """Return what `repr` says of a program, and the biggest of its coupled groups.

    Groups of one kind in many layers are one row; biggest is what has most parameters in a unit
    times units.
    """
    try:
        rows = _group_rows(program)
    except GraphPruneError as error:
        rows = [(str(error), "", "", "")]
    head = ("groups", "units", "role", "exactness")
    if as_html:
        return f"<pre>{html.escape(repr(program))}</pre>{html_table(head, rows)}"
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )
    return "\n".join([repr(program), *(f"  {line}" for line in lines)])


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as HTML, its cells escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _group_rows(program: Program) -> list[tuple[str, str, str, str]]:
    kinds: dict[tuple[str, ...], list[str]] = {}
    biggest: dict[tuple[str, ...], int] = {}
    for group in analyze(program).groups:
        key = (layer_pattern(group.name), f"{group.size:,}", group.role, group.exactness)
        kinds.setdefault(key, []).append(group.name)
        held = sum(program.weights[name].numel() for name in group.weights())
        biggest[key] = biggest.get(key, 0) + held
    order = sorted(kinds, key=lambda key: -biggest[key])
    rows = [(collapse_names(kinds[key]), *key[1:]) for key in order[:_SHOWN]]
    if left := len(order) - len(rows):
        rows.append((f"and {left} other kinds", "", "", ""))
    return [(name, size, role, exactness) for name, size, role, exactness in rows]
