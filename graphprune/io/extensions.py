"""What installed distributions provide by name: passes, back ends, renderers, criteria.

What graphprune brings itself is found in the same way as what others add. Nothing is imported until
its name is asked for.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graphprune.errors import UsageError, nearest


def provided(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of `group` by name; imports none.

    Raises
    ------
    UsageError
        When two distributions provide different things of one name.
    """
    entries: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = entries.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise UsageError(
                f"two distributions provide {entry.name!r} in {group}: {other.value}, {entry.value}"
            )
    return entries


def extension(group: str, name: str) -> Any:
    """Load what is called `name` in the entry-point `group`.

    Raises
    ------
    UsageError
        When there is none (names the nearest), or it cannot be loaded.
    """
    entries = provided(group)
    if name not in entries:
        hint = nearest(name, entries) or f"; known are {', '.join(sorted(entries)) or 'none'}"
        raise UsageError(f"{group} has no {name!r}{hint}")
    try:
        return entries[name].load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{entries[name].value} cannot be loaded: {reason}") from error
