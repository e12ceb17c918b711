"""The layout holds: no two files import each other by any way, folders and files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parent.parent / "graphprune"

FILES_IN_A_FOLDER = 13
"""With its `__init__.py`. The folder of the passes is a list, a file for each, and has no bound."""

LINES_IN_A_FILE = 450


def modules() -> dict[str, Path]:
    """Module name -> file; the passes by the name under which they are imported."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ("graphprune", *path.relative_to(ROOT).with_suffix("").parts)
        if "data" not in parts:
            found[".".join(parts).removesuffix(".__init__")] = path
    for path in (ROOT / "passes").glob("*.py"):
        found[f"graphprune.passes.{path.stem}".removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """What `module` imports of `known`: at the top, inside functions, or for types alone."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], base]).strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                names.add(inner if inner in known else base)
    return (names & known.keys()) - {module}


def test_no_two_files_import_each_other_by_any_way() -> None:
    known = modules()
    graph = networkx.DiGraph()
    for module, path in known.items():
        graph.add_edges_from((module, other) for other in imported(module, path, known))
    parts = networkx.strongly_connected_components(graph)
    circles = [sorted(part) for part in parts if len(part) > 1]
    assert circles == []
    assert graph.number_of_edges() > 500  # the files were found, and what they import


def test_nothing_imports_the_facade() -> None:
    known = modules()
    assert [m for m, path in known.items() if "graphprune" in imported(m, path, known)] == []


def test_folders_and_files_stay_readable() -> None:
    known = modules()
    folders: dict[Path, int] = {}
    for path in known.values():
        if path.parent != ROOT / "passes":
            folders[path.parent] = folders.get(path.parent, 0) + 1
    assert {str(f): n for f, n in folders.items() if n > FILES_IN_A_FOLDER} == {}
    lines = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in known.items()}
    assert {module: n for module, n in lines.items() if n > LINES_IN_A_FILE} == {}
