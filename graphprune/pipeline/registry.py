"""Passes by name, through the entry-point group ``graphprune.passes``.

The built-in passes are found in the same way as those of any other installed distribution. Nothing
is imported until a name is asked for.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from graphprune.errors import GraphPruneError, PipelineError, UsageError, nearest
from graphprune.io.extensions import provided
from graphprune.pipeline.options import Option
from graphprune.pipeline.pass_base import Pass

GROUP = "graphprune.passes"

_REGISTERED: dict[str, type[Pass]] = {}
"""Passes of no distribution, made known by `register`."""


@dataclass(frozen=True)
class PassInfo:
    """A pass as a listing shows it.

    Parameters
    ----------
    name
        The name in pipelines.
    summary
        The first line of its docstring, or why it cannot be loaded.
    options
        Its options with what its docstring says of each.
    example
        A pipeline with it, from its docstring; empty where that has none.
    """

    name: str
    summary: str
    options: tuple[tuple[Option, str], ...] = ()
    example: str = ""


def names() -> list[str]:
    """Return the names of all passes that are known, sorted; imports none."""
    return sorted({*provided(GROUP), *_REGISTERED})


def register(cls: type[Pass]) -> None:
    """Make a pass of no distribution known for as long as this process runs.

    Raises
    ------
    UsageError
        When a distribution has one of its name.
    """
    check_free(cls)
    _REGISTERED[cls.name] = cls


def check_free(cls: type[Pass]) -> None:
    """Refuse (`UsageError`) a pass whose name is that of a distribution's."""
    if cls.name in provided(GROUP):
        raise UsageError(f"pass {cls.name!r} is there already")


def find(name: str) -> type[Pass]:
    """Return the pass called `name`.

    Raises
    ------
    PipelineError
        When there is none (names the nearest), or it cannot be loaded.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    entries = provided(GROUP)
    if name not in entries:
        hint = nearest(name, names()) or f"; known are {', '.join(names()) or 'none'}"
        raise PipelineError(f"unknown pass {name!r}{hint}")
    entry = entries[name]
    try:
        found = entry.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PipelineError(f"pass {name!r} ({entry.value}) cannot be loaded: {reason}") from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PipelineError(f"pass {name!r} ({entry.value}) is not a graphprune Pass")
    if found.name != name:
        raise PipelineError(f"pass {name!r} ({entry.value}) calls itself {found.name!r}")
    return found


def listing() -> list[PassInfo]:
    """Describe every known pass; one that fails to load says so."""
    infos = []
    for name in names():
        try:
            infos.append(describe(name))
        except GraphPruneError as error:
            infos.append(PassInfo(name, str(error)))
    return infos


def sections(cls: type) -> dict[str, str]:
    """Return the underlined sections of a class's docstring by title, in order.

    Examples
    --------
    >>> class Nothing:
    ...     '''Do nothing.
    ...
    ...     Options
    ...     -------
    ...     None.
    ...     '''
    >>> sections(Nothing)
    {'Options': 'None.'}
    """
    parts = re.split(r"^([A-Z]\w*)\n-+\n", inspect.getdoc(cls) or "", flags=re.MULTILINE)
    return {title: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def describe(name: str) -> PassInfo:
    """Describe the pass called `name`, as its docstring does.

    Raises
    ------
    PipelineError
        When there is none (names the nearest), or it cannot be loaded.
    """
    cls = find(name)
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    parts = sections(cls)
    helps = _definitions(parts.get("Options", ""))
    options = tuple((each, helps.get(each.name, "")) for each in cls.options().values())
    example = re.search(rf"^'({re.escape(name)}\b.*)'$", parts.get("Example", ""), re.MULTILINE)
    return PassInfo(name, summary, options, example[1] if example else "")


def _definitions(text: str) -> dict[str, str]:
    """Read a list of terms, each with its indented description on the lines below."""
    parts = re.split(r"^(\w+)(?: :.*)?\n(?=\s)", text, flags=re.MULTILINE)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {term: " ".join(body.split()) for term, body in pairs}
