"""The axis types of real architectures as golden texts: what the whole analysis comes to.

Weights of repeated layers are folded into one line where their types are the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import pytest
from architectures import ARCHITECTURES, coupling_of

from graphprune.analysis.coupling import Coupling


def folded(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """One line for all of a name's numbers and one text, in the order of the first of them."""
    counts = Counter((re.sub(r"\.\d+(?=[.:])", ".*", name), text) for name, text in lines)
    width = max(len(name) for name, _ in counts)
    for (name, text), count in counts.items():
        times = f"  ({count} times)" if count > 1 else ""
        yield f"{name:{width}}  {text}{times}"


def weights_of(coupling: Coupling) -> Iterator[tuple[str, str]]:
    for name in coupling.program.weights:
        kind = coupling.program.kinds[name]
        yield name, f"{coupling.type_of(name)}{'' if kind == 'parameter' else f' {kind}'}"


def groups_of(coupling: Coupling) -> Iterator[tuple[str, str]]:
    for group in coupling.groups:
        parents = [parent.rpartition(":")[2] for parent in group.parents]
        each = f" per {', '.join(parents)}" if parents else ""
        yield group.name, f"{group.size:3} {group.role}, {group.exactness}{each}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_types_of_an_architecture(name: str, golden: Callable[[str, str], None]) -> None:
    coupling = coupling_of(name)
    lines = (*folded(weights_of(coupling)), "", *folded(groups_of(coupling)))
    golden(f"types-{name}", "\n".join(lines))
