"""The names that weights take in a checkpoint where lists of modules became shorter."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

from torch import fx

from graphprune.ir.nodes import copy_of
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path

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


def _moved(names: Iterable[str], left: Iterable[str]) -> dict[str, str]:
    """Path of a numbered module -> its new last part, where modules before it are not `left`."""
    alive = {path for name in left for path in _modules(name)}
    lists: dict[str, dict[str, None]] = {}
    for name in names:
        for path in _modules(name):
            parent, _, last = path.rpartition(".")
            if _NUMBERED.fullmatch(last):
                lists.setdefault(parent, {})[last] = None
    found = {}
    for parent, each in lists.items():
        paths = {f"{parent}.{last}" if parent else last: last for last in each}
        kept = [path for path in paths if path in alive]
        for path, last in zip(kept, each, strict=False):
            if paths[path] != last:
                found[path] = last
    return found


def _modules(name: str) -> Iterator[str]:
    """Yield the paths of the modules that a weight is in, from the outside in."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def _renamed(name: str, moved: Mapping[str, str]) -> str:
    parts = name.split(".")
    paths = itertools.accumulate(parts, "{}.{}".format)
    return ".".join(moved.get(path, part) for path, part in zip(paths, parts, strict=True))
