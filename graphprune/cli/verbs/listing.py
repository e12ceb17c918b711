"""Verbs that list what there is: `passes`, `operators`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli.console import show
from graphprune.cli.options import AsJson
from graphprune.cli.session import Session, verb

if TYPE_CHECKING:
    from rich.table import Table

    from graphprune.pipeline.registry import PassInfo


@verb("graphprune passes prune")
def passes(
    session: Session,
    name: Annotated[
        str | None,
        typer.Argument(metavar="PASS", help="Describe this one.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the passes; with PASS, its options, their defaults and an example."""
    from rich.table import Table
    from rich.text import Text

    from graphprune.pipeline import registry

    infos = registry.listing() if name is None else [registry.describe(name)]
    if as_json:
        print(json.dumps([_plain(info) for info in infos], indent=1))
    elif name is not None:
        show(_described(infos[0]))
        if infos[0].example:
            print(f"Example: graphprune run DIR --passes '{infos[0].example}' -o OUT")
    else:
        table = Table.grid(padding=(0, 2, 0, 0))
        for info in infos:
            table.add_row(Text(info.name, style="bold"), Text(info.summary))
        show(table)
        print("\n'graphprune passes PASS' shows the options of one.")


@verb("graphprune operators")
def operators(session: Session, as_json: AsJson = False) -> None:
    """List the operators that have a rule; every other one freezes what it touches."""
    from rich.table import Table
    from rich.text import Text

    from graphprune.analysis.operators import table

    rows = table()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    shown = Table(show_edge=False, pad_edge=False)
    for column in rows[0]:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row.values()))
    show(shown)


def _described(info: PassInfo) -> Table:
    """Lay out one pass with its options."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(Text(info.name, style="bold"), Text(info.summary))
    for option, description in info.options:
        default = "needed" if option.required else f"{option.name}={option.write(option.default)}"
        table.add_row(
            Text(f"  {option.name}"), Text(f"{option.type_text}  [{default}]\n{description}")
        )
    return table


def _plain(info: PassInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "summary": info.summary,
        "example": info.example,
        "options": [
            {
                "name": option.name,
                "type": option.type_text,
                "needed": option.required,
                "default": None if option.required else option.default,
                "description": description,
            }
            for option, description in info.options
        ],
    }
