"""Verbs that list what there is: `passes`, `operators`."""

from __future__ import annotations

from graphprune.cli.console import show
from graphprune.cli.session import Session, verb


@verb
def passes(session: Session) -> None:
    """List the passes with their options."""
    from rich.table import Table
    from rich.text import Text

    from graphprune.pipeline import registry

    table = Table.grid(padding=(0, 2, 0, 0))
    for info in registry.listing():
        table.add_row(Text(info.name, style="bold"), Text(info.summary))
        for option, description in info.options:
            default = "" if option.required else f"  [{option.name}={option.write(option.default)}]"
            table.add_row(
                Text(f"  {option.name}"), Text(f"{option.type_text}{default}\n{description}")
            )
        table.add_row()
    show(table)


@verb
def operators(session: Session) -> None:
    """List the operators that have a rule; every other one freezes what it touches."""
    from rich.table import Table
    from rich.text import Text

    from graphprune.analysis.operators import table

    rows = table()
    shown = Table(show_edge=False, pad_edge=False)
    for column in rows[0]:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row.values()))
    show(shown)
