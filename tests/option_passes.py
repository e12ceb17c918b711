"""Passes to read and write: every type of option, and what must be refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphprune.errors import UsageError
from graphprune.pipeline.pass_base import Context, Outcome, Pass


@dataclass(frozen=True)
class Every(Pass):
    """Have an option of every type.

    Options
    -------
    flag
        Whether to.
    ratio
        How much; must not exceed one, which takes
        two lines to say.
    """

    name: ClassVar[str] = "every"

    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    text: str = ""
    criterion: Literal["taylor", "magnitude"] = "taylor"
    limit: int | None = None
    label: str | None = "x"
    names: tuple[str, ...] = ()
    rows: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio > 1:
            raise UsageError(f"ratio {self.ratio} exceeds 1")

    def run(self, program: Any, context: Context) -> Outcome:
        return Outcome(program)


@dataclass(frozen=True)
class Needs(Pass):
    """Need an option."""

    name: ClassVar[str] = "needs"

    path: str

    def run(self, program: Any, context: Context) -> Outcome:
        return Outcome(program)


class NotAPass:
    pass
