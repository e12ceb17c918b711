"""What is public is public on purpose: every new name shows in a golden text."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

from test_house import modules

import graphprune as gp


def public_names(path: Path) -> Iterator[str]:
    """Names that a module defines, not those that it imports, without a leading underscore."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.Assign(targets=targets):
                inner = [found for each in targets for found in ast.walk(each)]
                names = [found.id for found in inner if isinstance(found, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case _:
                names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_name_is_public_by_accident(golden: Callable[[str, str], None]) -> None:
    lines = [f"graphprune.__all__: {' '.join(sorted(gp.__all__))}"]
    for module, path in sorted(modules().items()):
        if names := sorted(public_names(path)):
            lines.append(f"{module}: {' '.join(names)}")
    golden("public-names", "\n".join(lines))
