"""Write the program as a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune.errors import UsageError
from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from graphprune.ir.program import Program


@dataclass(frozen=True)
class SavePretrained(Pass):
    """Write a directory that transformers loads with `from_pretrained`.

    Before
    ------
    A program captured from a transformers model.

    After
    -----
    The same program; the directory is complete, or was not written at all.

    Options
    -------
    path
        The directory, under the output folder of the run unless it is absolute.
    dtype
        Element type to store: "float32", "float16" or "bfloat16"; by default the one that the
        checkpoint had which the program was loaded from.

    Requires
    --------
    Nothing.

    Preserves
    ---------
    Everything.

    Refuses
    -------
    A program that no Hugging Face checkpoint can represent (`BackendError`), a directory that is
    not empty or cannot be written (`OutputError`), an empty path.

    Reference
    ---------
    `graphprune.backends.huggingface.save`.

    Example
    -------
    >>> str(SavePretrained(path="smaller"))
    'save-pretrained{path=smaller}'
    """

    name: ClassVar[str] = "save-pretrained"
    required: ClassVar[bool] = True
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    path: str
    dtype: Literal["float32", "float16", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise UsageError("save-pretrained: the path is empty")

    def run(self, program: Program, context: Context) -> Outcome:
        """Write the directory, and return `program` as it is."""
        with context.bar(f"writing {self.path}"):
            program.save_pretrained(context.path(self.path), dtype=self.dtype)
        return Outcome(program, details={"path": self.path})
