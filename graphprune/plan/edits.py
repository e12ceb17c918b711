"""Edits of values that a plan brings along beside its steps.

The plan itself holds which pass edited which weights; the values lie beside it in a file of the
safetensors format. That file is called ``plan.edits``, since loaders of checkpoints take every
``*.safetensors`` of a directory for weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.errors import CheckpointError, PlanError, first_line
from graphprune.io.atomic import staged_file

if TYPE_CHECKING:
    from os import PathLike

    from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """The changes of one pass to values.

    Parameters
    ----------
    by
        The pass, as a pipeline writes it.
    weights
        The weights that it gave other values.
    patterns
        Weight -> the n:m pattern of zeros, such as "2:4", that it promises of its matrices.
    graph
        Whether it changed the graph too, which no plan brings along.
    """

    by: str
    weights: tuple[str, ...] = ()
    patterns: Mapping[str, str] = field(default_factory=dict)
    graph: bool = False


@dataclass(frozen=True)
class Edits:
    """All edits of a plan, with the values that weights have after its last step.

    Parameters
    ----------
    made
        What each pass did, in order.
    digest
        Of the values, where they were written to a file.
    values
        The values by name, the file that holds them, or None where only the plan's text is known.
    """

    made: tuple[Edit, ...]
    digest: str = ""
    values: Mapping[str, Tensor] | Path | None = field(default=None, compare=False, repr=False)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights that any pass gave other values, sorted."""
        return tuple(sorted({name for edit in self.made for name in edit.weights}))

    @property
    def changed_graph(self) -> str:
        """The pass that changed the graph itself, or ""."""
        return next((edit.by for edit in self.made if edit.graph), "")

    @property
    def passes(self) -> str:
        """The passes, for messages."""
        return ", ".join(dict.fromkeys(edit.by for edit in self.made))

    def read(self) -> dict[str, Tensor]:
        """Return the values by name.

        Raises
        ------
        PlanError
            When they are not at hand, naming the file; when it has changed; and when the graph was
            edited too.
        """
        if by := self.changed_graph:
            raise PlanError(f"{by} changed the graph itself, which a plan cannot bring along")
        what = f"what {self.passes} made of {len(self.weights)} weights"
        if self.values is None:
            raise PlanError(f"the plan comes without the file that holds {what}")
        if not isinstance(self.values, Path):
            return dict(self.values)
        if not self.values.is_file():
            raise PlanError(f"{self.values} is missing; it holds {what}")
        from graphprune.weights.files import TensorFile
        from graphprune.weights.tensors import digest

        try:
            found = TensorFile(self.values).tensors()
        except CheckpointError as error:
            raise PlanError(first_line(error)) from error
        if digest([found]) != self.digest:
            raise PlanError(f"{self.values} has changed since the plan was written; it held {what}")
        return found

    def write(self, path: Path) -> Edits:
        """Write the values to `path`, and return the edits that know it."""
        from graphprune.weights.tensors import digest
        from graphprune.weights.writing import write_file

        values = self.read()
        with staged_file(path, overwrite=True) as file:
            write_file(values, file)
        return dataclasses.replace(self, digest=digest([values]), values=path)


def edits_beside(path: str | PathLike[str]) -> Path:
    """Return where the values of edited weights lie for a plan at `path`."""
    return Path(path).with_suffix(".edits")
