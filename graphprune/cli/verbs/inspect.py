"""Verbs that look into a model: `inspect`, `page`, `plot`, `explain`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli.console import note, show
from graphprune.cli.inputs import read_plan, resolve
from graphprune.cli.options import AsJson, Checkpoint, NoCache
from graphprune.cli.session import Session, verb

if TYPE_CHECKING:
    from graphprune.ir.program import Program


class Format(StrEnum):
    """The forms in which `inspect` prints."""

    text = "text"
    json = "json"
    dot = "dot"
    graphml = "graphml"


@verb("graphprune inspect DIR")
def inspect(
    session: Session,
    directory: Checkpoint,
    format: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.text,
    group: Annotated[str | None, typer.Option(help="Print one group.")] = None,
    weight: Annotated[str | None, typer.Option(help="Print the dimensions of one weight.")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Print the weights by module.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    no_cache: NoCache = False,
    html: Annotated[Path | None, typer.Option(hidden=True, help="What 'page' writes.")] = None,
    plan: Annotated[Path | None, typer.Option(hidden=True, help="A plan to show.")] = None,
    scores: Annotated[Path | None, typer.Option(hidden=True, help="Scores to draw.")] = None,
    picture: Annotated[Path | None, typer.Option(hidden=True, help="What 'plot' draws.")] = None,
) -> None:
    """Print what can be pruned: the coupled groups and the axis types of the weights."""
    from graphprune.analysis.coupling import analyze
    from graphprune.report.coupling_paths import explanation_json
    from graphprune.report.coupling_text import group_data
    from graphprune.report.overview import module_tree, overview, overview_json

    parts = {"--group": group, "--weight": weight, "--tree": tree}
    if html is not None or picture is not None:
        _page_and_plot(session, directory, html, plan, scores, picture)
        return
    if plan is not None or scores is not None:
        raise typer.BadParameter("'page' and 'plot' show a plan, and 'plot' draws scores")
    format = Format.json if as_json else format
    part = next((name for name, of in parts.items() if of), None)
    if sum(map(bool, parts.values())) > 1 or (part == "--tree" and format is not Format.text):
        raise typer.BadParameter("give one of --group, --weight and --tree; a tree is text")
    if part and format not in (Format.text, Format.json):
        raise typer.BadParameter(f"{part} is printed as text or json")
    program = session.look(directory, cache=not no_cache)
    with session.working("analyzing"):
        coupling = analyze(program)
    if group is not None:
        found = coupling.group(group)
        print(json.dumps(group_data(found), indent=1) if format is Format.json else found)
    elif weight is not None:
        dims = range(program.weight(weight).ndim)
        if format is Format.json:
            print(json.dumps([explanation_json(coupling, weight, dim) for dim in dims], indent=1))
        else:
            print(*(coupling.explain(weight, dim) for dim in dims), sep="\n")
    elif tree:
        show(module_tree(directory, program, coupling))
    elif format is Format.text:
        show(overview(directory, program, coupling))
    else:
        written = {
            Format.json: lambda: overview_json(coupling),
            Format.dot: coupling.to_dot,
            Format.graphml: coupling.to_graphml,
        }
        print(written[format]())


@verb("graphprune page DIR -o page.html")
def page(
    session: Session,
    directory: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")],
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A plan.json: what goes, what is left.")
    ] = None,
) -> None:
    """Write all that 'inspect' knows as one page for a browser."""
    _page_and_plot(session, directory, output, plan, None, None)


@verb("graphprune plot DIR --plan OUT/plan.json -o sizes.svg")
def plot(
    session: Session,
    directory: Checkpoint,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf.")
    ],
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A plan.json: layers before and after it.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What 'prune{scores=FILE}' wrote: histograms of it."),
    ] = None,
) -> None:
    """Draw the sizes of layers around a plan, or histograms of scores."""
    _page_and_plot(session, directory, None, plan, scores, output)


@verb("graphprune explain DIR model.layers.0.mlp.up_proj.weight 0")
def explain(
    session: Session,
    directory: Checkpoint,
    weight: Annotated[str, typer.Argument(metavar="WEIGHT", help="A weight's dotted name.")],
    dim: Annotated[int, typer.Argument(metavar="DIM", help="Its dimension; -1 is the last.")],
    as_json: AsJson = False,
    no_cache: NoCache = False,
) -> None:
    """Say what one dimension of a weight is coupled with, or why it cannot be pruned."""
    from graphprune.analysis.coupling import analyze
    from graphprune.report.coupling_paths import explanation, explanation_json

    program = session.look(directory, cache=not no_cache)
    with session.working("analyzing"):
        coupling = analyze(program)
    if as_json:
        print(json.dumps(explanation_json(coupling, weight, dim), indent=1))
    else:
        print(explanation(coupling, weight, dim))


def _page_and_plot(
    session: Session,
    directory: str,
    html: Path | None,
    plan: Path | None,
    scores: Path | None,
    picture: Path | None,
) -> None:
    """Write a page, a picture or both; what cannot be captured has a page of its weights."""
    from graphprune.backends.huggingface.read import shapes_of
    from graphprune.errors import CaptureError
    from graphprune.report.html_page import bare_page

    if picture is not None and (plan is None) == (scores is None):
        raise typer.BadParameter("a picture is of a --plan or of --scores: give one of them")
    try:
        # Scores are of weights, and which checkpoint can hold a result depends on them.
        whole = scores is not None or (html is not None and plan is not None)
        program = session.load(directory) if whole else session.look(directory, cache=True)
    except CaptureError as error:
        if html is None:
            raise
        _write_page(html, bare_page(directory, shapes_of(resolve(directory)), str(error)))
        note(str(error))
        return
    if picture is not None:
        _draw(picture, program, plan, scores)
    if html is not None:
        from graphprune.analysis.coupling import analyze
        from graphprune.backends.huggingface.save import checkpoint_form
        from graphprune.report.html_page import page

        with session.working("analyzing"):
            coupling = analyze(program)
        with session.working("writing the page"):
            shown = read_plan(plan) if plan else None
            _write_page(html, page(coupling, directory, shown, checkpoint_form))


def _draw(picture: Path, program: Program, plan: Path | None, scores: Path | None) -> None:
    from graphprune.report.charts import draw_scores, draw_sizes

    if plan is not None:
        draw_sizes(picture, program, read_plan(plan))
    elif scores is not None:
        draw_scores(picture, scores, program)
    print(f"wrote {picture}")


def _write_page(path: Path, text: str) -> None:
    from graphprune.io.atomic import staged_file

    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
