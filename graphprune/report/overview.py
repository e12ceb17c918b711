"""The text of ``graphprune inspect``: coupled groups, speed hints and axis types, layers folded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

from graphprune.ir.devices import RUNTIMES
from graphprune.ir.provenance import module_path
from graphprune.selection.kernel_sizes import speed_hints

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree

    from graphprune.analysis.coupling import Coupling
    from graphprune.analysis.groups import Group
    from graphprune.ir.program import Program
    from graphprune.selection.kernel_sizes import Hint

_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])")
"""A number that stands alone between dots, as those of layers do."""

_REASONS = 5
"""Reasons of frozen axes that the overview shows."""


def overview(title: str, program: Program, coupling: Coupling) -> RenderableType:
    """Return sizes, coupled groups, speed hints and axis types of weights, for people.

    Parameters
    ----------
    title
        What to call the program.
    program
        The program.
    coupling
        Its analysis.
    """
    return Stack(
        *_sizes(title, program),
        "",
        group_table(program, coupling),
        *_reasons(coupling),
        *_unruled(program, coupling),
        *_frozen(coupling),
        "",
        *_hints(coupling),
        "",
        _types(program, coupling),
    )


def overview_json(coupling: Coupling) -> str:
    """Return what `Coupling.to_json` has, and the speed hints of every runtime, as JSON text."""
    hints = [
        {
            "where": hint.where,
            "what": hint.what.format(hint.size),
            "reasons": {why: list(runtimes) for why, runtimes in hint.reasons},
        }
        for hint in speed_hints(coupling)
    ]
    return json.dumps(json.loads(coupling.to_json()) | {"speed_hints": hints}, indent=1)


def group_table(program: Program, coupling: Coupling) -> Table:
    """Return the coupled groups as a table, those of repeated layers in one row."""
    table = Table(title="coupled groups", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("groups", justify="right")
    table.add_column("name", overflow="fold")
    for column in ("units", "weights", "per unit"):
        table.add_column(column, justify="right")
    table.add_column("removal is")
    rows: dict[tuple[str, ...], list[str]] = {}
    for group in coupling.groups:
        rows.setdefault((layer_pattern(group.name), *_cells(program, group)), []).append(group.name)
    for (_, *cells), names in rows.items():
        table.add_row(str(len(names)), *map(Text, (collapse_names(names), *cells)))
    return table


def notes_of(program: Program) -> list[str]:
    """Return what a person has to know of a program that is looked into, weights or none."""
    return [note.text for note in program.notes if note.kind != "stand-ins"]


def hint_lines(hints: Iterable[Hint]) -> list[str]:
    """Speed hints as lines, those of repeated layers in one; of many sizes it names three."""
    rows: dict[tuple[str, str, str], list[Hint]] = {}
    for hint in hints:
        rows.setdefault((layer_pattern(hint.where), hint.what, hint.why), []).append(hint)
    lines = []
    for (_, what, why), found in rows.items():
        sizes = list(dict.fromkeys(hint.size for hint in found))
        if len(sizes) > 3:
            sizes[3:] = [f"{len(sizes) - 3} more"]
        *first, last = sizes
        size = f"{', '.join(first)} or {last}" if first else last
        lines.append(f"{collapse_names(hint.where for hint in found)}: {what.format(size)} {why}")
    return lines


def module_tree(title: str, program: Program, coupling: Coupling) -> Tree:
    """Return the weights by module with their axis types, repeated modules in one branch."""
    from rich.tree import Tree

    tree = Tree(Text(title, style="bold"))
    branches: dict[str, Tree] = {"": tree}
    rows: dict[tuple[str, str], list[str]] = {}
    for name in program.weights:
        kind = str(coupling.type_of(name))
        rows.setdefault((layer_pattern(name), layer_pattern(kind)), []).append(name)
    for (_, kind), names in rows.items():
        *path, leaf = collapse_names(names).split(".")
        for depth in range(1, len(path) + 1):
            here = ".".join(path[:depth])
            if here not in branches:
                branches[here] = branches[".".join(path[: depth - 1])].add(Text(path[depth - 1]))
        branches[".".join(path)].add(Text.assemble(leaf, (f"  {kind}", "dim")))
    return tree


def collapse_names(names: Iterable[str]) -> str:
    """Names that differ in standing numbers only as one, with the ranges of those numbers.

    Examples
    --------
    >>> collapse_names(["layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "layers.5.mlp"])
    'layers.{0-2,5}.mlp'
    >>> collapse_names(["layers.3.mlp"])
    'layers.3.mlp'
    """
    names = list(names)
    columns = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    ranges = iter([_ranges({int(number) for number in column}) for column in columns])
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _ranges(numbers: set[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if runs == [[min(numbers)]]:
        return str(runs[0][0])
    texts = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{{{','.join(texts)}}}"


def layer_pattern(name: str) -> str:
    """`name` with its standing numbers replaced: equal for the weights of repeated layers."""
    return _NUMBER.sub("#", name)


def _cells(program: Program, group: Group) -> tuple[str, ...]:
    per_unit = f"{_parameters_per_unit(program, group):,}"
    return f"{group.size:,}", str(len(group.weights())), per_unit, group.exactness


def _reasons(coupling: Coupling) -> Iterator[Text]:
    """Return why some groups are not exact, once for groups that differ in numbers only."""
    inexact = {(layer_pattern(g.name), layer_pattern(g.why)): g for g in coupling.groups if g.why}
    for group in reversed(inexact.values()):
        yield Text(f"{group.name} is {group.exactness}: {group.why}")


def _frozen(coupling: Coupling) -> Iterator[Text]:
    """Return why axes are frozen, the reasons that hold most weights first."""
    held: dict[tuple[str, str], tuple[set[str], dict[str, None]]] = {}
    for weight, _, reason in coupling.frozen():
        place = module_path(reason.node)
        weights, places = held.setdefault((reason.why, layer_pattern(place)), (set(), {}))
        weights.add(weight)
        places[place] = None
    rows = sorted(held.items(), key=lambda row: -len(row[1][0]))
    for (why, _), (weights, places) in rows[:_REASONS]:
        count = f"{len(weights)} weights" if len(weights) > 1 else next(iter(weights))
        where = collapse_names(places)
        yield Text(f"frozen in {count}: {why}" + (f" ({where})" if where else ""))
    if rows[_REASONS:]:
        yield Text(f"and {len(rows) - _REASONS} more reasons: 'explain' says them weight by weight")


def _hints(coupling: Coupling) -> Iterator[Text]:
    lines = hint_lines(speed_hints(coupling))
    yield Text("speed hints", style="italic")
    if not lines:
        yield Text(f"every size is on the fast path ({', '.join(RUNTIMES)})")
    yield from map(Text, lines)


def _unruled(program: Program, coupling: Coupling) -> Iterator[Text]:
    """Operators without a rule, and how many parameters lie along the axes that they freeze."""
    frozen: dict[str, set[str]] = {}
    nodes = coupling.types.facts.unruled
    for node in nodes:
        frozen.setdefault(str(node.target), set())
    for weight, _, reason in coupling.frozen():
        if reason.node in nodes:
            frozen[str(reason.node.target)].add(weight)
    for operator, weights in sorted(frozen.items()):
        cost = sum(program.weights[weight].numel() for weight in weights)
        yield Text(f"{operator} has no rule: it freezes axes of {cost:,} parameters")


def _parameters_per_unit(program: Program, group: Group) -> int:
    """Return how many parameters go with one unit, if nothing else goes."""
    total = 0
    for member in group.members:
        if program.kinds.get(member.weight) != "parameter":
            continue
        weight = program.weights[member.weight]
        total += len(member.indices(0)) * weight.numel() // weight.shape[member.dim]
    return total


def _sizes(title: str, program: Program) -> Iterator[Text]:
    name = program.source.model_class.__name__ if program.source else "program"
    yield Text(f"{title}: {name}", style="bold")
    cache = program.kv_bytes_per_token()
    yield Text(
        f"{program.parameter_count():,} parameters in {len(program.weights)} weights"
        + (f", {cache:,} bytes of KV cache per token" if cache else "")
    )
    names = [value.name for value in program.inputs]
    repeated: dict[str, list[str]] = {}
    for each in names:
        repeated.setdefault(layer_pattern(each), []).append(each)
    yield Text(f"takes {', '.join(map(collapse_names, repeated.values()))}")
    yield from (Text(f"note: {note}") for note in notes_of(program))


def _types(program: Program, coupling: Coupling) -> Table:
    table = Table(title="axis types", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("weight", overflow="fold")
    table.add_column("shape")
    table.add_column("type", overflow="fold")
    rows: dict[tuple[str, str, str], tuple[list[str], list[str]]] = {}
    for name, weight in program.weights.items():
        shape = " x ".join(map(str, weight.shape))
        kind = str(coupling.type_of(name))
        names, kinds = rows.setdefault((layer_pattern(name), shape, layer_pattern(kind)), ([], []))
        names.append(name)
        kinds.append(kind)
    for (_, shape, _), (names, kinds) in rows.items():
        table.add_row(Text(collapse_names(names)), Text(shape), Text(collapse_names(kinds)))
    return table
