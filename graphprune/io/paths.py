"""Paths as users give them."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from graphprune.errors import GraphPruneError

_LONGEST = 255
"""Bytes that file systems take in a name."""

_SHOWN = 40


def path_of(given: str | PathLike[str], error: type[GraphPruneError]) -> Path:
    """Return `given` as a path; refuse what can be none, such as a text in place of its file.

    Parameters
    ----------
    given
        What stands where a path is expected.
    error
        The class of errors to raise.

    Raises
    ------
    GraphPruneError
        Of the class `error`, when it is neither a text nor a path, or holds a line break, a null
        character, or a name that is longer than file systems take.

    Examples
    --------
    >>> path_of("plans/plan.json", GraphPruneError).name
    'plan.json'
    """
    if not isinstance(given, str | PathLike):
        raise error(f"a path is wanted, not {given!r}")
    text = str(given)
    reason = ""
    if "\n" in text or "\r" in text:
        reason = "a line break"
    elif "\0" in text:
        reason = "a null character"
    elif any(len(os.fsencode(name)) > _LONGEST for name in text.split(os.sep)):
        reason = f"a name of more than {_LONGEST} bytes"
    if reason:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise error(f"{shown!r} is no path: it holds {reason}")
    return Path(text)
