"""Lists of modules that became shorter: the names that weights take then, and the config.

A list without some of its modules, such as layers or experts, counts those that are left anew. What
counts layers in a config is not known by name: it is the integer that, set to the new number, gives
the model so many of them; the lists beside it that have as many entries as there were layers keep
those of the layers that are left.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from graphprune.backends.huggingface.config_search import Builder, Changes
from graphprune.ir.nodes import copy_of
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path

Kept = Mapping[str, Sequence[int]]
"""Path of a list of modules -> which of them are left, counted from 0."""

_NUMBERED = re.compile(r"\D*\d+")


def renumbered(program: Program, names: Iterable[str]) -> Program:
    """`program` as if the modules that it lost of lists of modules had never been there.

    A list of three experts that has lost its first holds ``experts.1`` and ``experts.2``, and a
    model that is built with two calls them ``experts.0`` and ``experts.1``. So whatever is numbered
    takes the first of the numbers, in order, in the names of weights and of modules.

    Parameters
    ----------
    program
        The program, which is left as it is.
    names
        The names of all weights and buffers of the model before it lost any.
    """
    moved = _moved(names, {*program.weights, *program.aliases})
    if not moved:
        return program

    def rename(name: str) -> str:
        return _renamed(name, moved)

    graph, _ = copy_of(program.graph)
    for node in graph.nodes:
        if (path := module_path(node)) and (found := rename(path)) != path:
            node.meta["nn_module_stack"] = {found: (found, "")}
    return dataclasses.replace(
        program,
        graph_module=fx.GraphModule(program.graph_module, graph),
        weights={rename(name): weight for name, weight in program.weights.items()},
        kinds={rename(name): kind for name, kind in program.kinds.items()},
        aliases={rename(alias): rename(name) for alias, name in program.aliases.items()},
    )


def counted_as_before(program: Program, names: Iterable[str], gone: Collection[str]) -> Program:
    """`program`, read from a checkpoint, with the names that its weights had before lists shrank.

    Parameters
    ----------
    program
        The program.
    names
        The names of all weights before.
    gone
        Those of them that are gone.
    """
    names = tuple(names)
    left = [name for name in names if name not in gone]
    moved = _moved(names, left)
    before = {_renamed(name, moved): name for name in left}

    def rename(name: str) -> str:
        return before.get(name, name)

    return dataclasses.replace(
        program,
        weights={rename(name): weight for name, weight in program.weights.items()},
        kinds={rename(name): kind for name, kind in program.kinds.items()},
        aliases={rename(alias): rename(name) for alias, name in program.aliases.items()},
    )


def numbered(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the paths of lists of modules -> the last parts of the paths of theirs, in order.

    The modules of a list are numbered from 0. One inside another list is taken for one where all
    of its modules hold the same, as experts do: the two norms of a layer are no list, nor are its
    attention and its MLP, whatever their names.
    """
    held: dict[str, dict[str, set[str]]] = {}
    for name in names:
        for path in _modules(name):
            parent, _, last = path.rpartition(".")
            if _NUMBERED.fullmatch(last):
                inside = held.setdefault(parent, {}).setdefault(last, set())
                inside.add(name.removeprefix(f"{path}."))
    lists: dict[str, list[str]] = {}
    for parent in sorted(held, key=len):
        first, *others = held[parent].values()
        outer = (path.rpartition(".") for path in _modules(f"{parent}."))
        inner = any(last in lists.get(path, ()) for path, _, last in outer)
        from_zero = any(re.fullmatch(r"\D*0", last) for last in held[parent])
        if from_zero and not (inner and any(each != first for each in others)):
            lists[parent] = list(held[parent])
    return lists


def _moved(names: Iterable[str], left: Iterable[str]) -> dict[str, str]:
    """Path of a numbered module -> its new last part, where modules before it are not `left`."""
    alive = {path for name in left for path in _modules(name)}
    found = {}
    for parent, each in numbered(names).items():
        paths = {_member(parent, last): last for last in each}
        kept = [path for path in paths if path in alive]
        for path, last in zip(kept, each, strict=False):
            if paths[path] != last:
                found[path] = last
    return found


def _member(parent: str, last: str) -> str:
    return f"{parent}.{last}" if parent else last


def _modules(name: str) -> Iterator[str]:
    """Yield the paths of the modules that a weight is in, from the outside in."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def _renamed(name: str, moved: Mapping[str, str]) -> str:
    parts = name.split(".")
    paths = itertools.accumulate(parts, "{}.{}".format)
    return ".".join(moved.get(path, part) for path, part in zip(paths, parts, strict=True))


# -- configs --------------------------------------------------------------------------------------


def shortened(before: Iterable[str], left: Iterable[str]) -> dict[str, list[int]]:
    """Return the lists of modules that lost some, and which of each are left.

    Parameters
    ----------
    before
        The names of all weights of the model before.
    left
        Those that are left, by the same names.
    """
    alive = {path for name in left for path in _modules(name)}
    lists = numbered(before)
    found = {
        path: [at for at, last in enumerate(lasts) if _member(path, last) in alive]
        for path, lasts in lists.items()
    }
    return {path: kept for path, kept in found.items() if 0 < len(kept) < len(lists[path])}


def depth_changes(builder: Builder, kept: Kept) -> Iterator[Changes]:
    """Yield changes of a config that give its model's lists of modules their new lengths.

    The likeliest first: with all lists of one entry a layer shortened, then with one of them left
    as it was. Lists whose length follows another size, such as a number of experts, are left out.
    """
    seen: list[Changes] = []
    for spared in (None, *_lists(builder.fields)):
        changes: Changes = {}
        for path, left in kept.items():
            if _length(builder, changes, path) != len(left):
                changes |= _counting(builder, changes, path, left, spared)
        if changes not in seen:
            seen.append(changes)
            yield changes


def _counting(
    builder: Builder, base: Changes, path: str, left: Sequence[int], spared: str | None
) -> Changes:
    """Return the change of the field that counts the modules of a list; none where no field does.

    `spared` is a list of the config that stays as it is.
    """
    count = _length(builder, {}, path)
    for name, value in builder.integers().items():
        if value != count or name.rpartition(".")[2].isdigit():
            continue
        inside = name.rpartition(".")[0]
        lists = {
            each: [entries[at] for at in left]
            for each, entries in _lists(builder.fields).items()
            if each.rpartition(".")[0] == inside and len(entries) == count and each != spared
        }
        changes: Changes = {name: len(left), **lists}
        if _length(builder, {**base, **changes}, path) == len(left):
            return changes
    return {}


def _length(builder: Builder, changes: Changes, path: str) -> int:
    """Return how many modules a list of the model has; -1 where the model cannot be built."""
    sizes = builder.sizes(changes)
    return -1 if sizes is None else len(numbered(sizes).get(path, ()))


def _lists(fields: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Return the lists of a config by their dotted paths."""
    found: dict[str, list[Any]] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= _lists(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value:
            found[f"{prefix}{name}"] = copy.deepcopy(list(value))
    return found
