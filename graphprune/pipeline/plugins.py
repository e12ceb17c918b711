"""Load passes and criteria from a Python file that no installed distribution holds."""

from __future__ import annotations

import hashlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from graphprune.errors import UsageError, first_line
from graphprune.pipeline import registry
from graphprune.pipeline.pass_base import Pass


def load_plugin(path: str | PathLike[str]) -> list[str]:
    """Run a Python file, and make the passes and criteria that it defines known by their names.

    Parameters
    ----------
    path
        The file. What it defines is known for as long as this process runs.

    Returns
    -------
    list
        Their names, sorted.

    Raises
    ------
    UsageError
        When the file cannot be read or run, defines neither, or a name is taken; then nothing that
        it defines is known.
    """
    from graphprune.criteria import CRITERIA, Criterion

    before = dict(CRITERIA)
    try:
        module = _run(Path(path).resolve())
        passes = _defined(module, Pass)
        criteria = _defined(module, Criterion)
        if not passes and not criteria:
            raise UsageError("it defines no pass and no criterion")
        for name in criteria:
            if name in before and before[name].__module__ != module.__name__:
                raise UsageError(f"criterion {name!r} is there already")
        for cls in passes.values():
            registry.check_free(cls)
    except (Exception, SystemExit) as error:
        CRITERIA.clear()
        CRITERIA.update(before)
        reason = first_line(error)
        if not isinstance(error, UsageError):
            reason = f"{type(error).__name__}: {reason}"
        raise UsageError(f"plugin {path}: {reason}") from error
    for cls in passes.values():
        registry.register(cls)
    return sorted([*passes, *criteria])


def _run(path: Path) -> ModuleType:
    """Import a file as a module of its own."""
    name = f"graphprune_plugin_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError("it cannot be read as a Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def _defined(module: ModuleType, base: Any) -> dict[str, Any]:
    """Return the subclasses of `base` that a module defines and names, by name."""
    found = (each for each in vars(module).values() if isinstance(each, type))
    own = (each for each in found if each.__module__ == module.__name__)
    return {each.name: each for each in own if issubclass(each, base) and hasattr(each, "name")}
