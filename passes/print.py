"""Print what is known of the program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphprune.pipeline.pass_base import COUPLING, Analysis, Context, Outcome, Pass

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphprune.analysis.coupling import Coupling
    from graphprune.ir.program import Program
    from graphprune.plan.plan import Plan


@dataclass(frozen=True)
class Print(Pass):
    """Print the coupled groups, the axis types, the graph or the plan, to standard output.

    Before
    ------
    Any program.

    After
    -----
    The same program.

    Options
    -------
    what
        ``groups`` (each with its size, role and exactness), ``types`` (the axis type of every
        weight), ``graph`` (its operators with shapes) or ``plan`` (what the passes before removed
        and merged).

    Requires
    --------
    The coupling, for groups and types.

    Preserves
    ---------
    Everything.

    Refuses
    -------
    Nothing.

    Reference
    ---------
    LLVM's ``print`` passes.

    Example
    -------
    >>> str(Print(what="types"))
    'print{what=types}'
    """

    name: ClassVar[str] = "print"
    required: ClassVar[bool] = True
    preserves: ClassVar[frozenset[Analysis[Any]]] = frozenset({COUPLING})

    what: Literal["groups", "types", "graph", "plan"] = "groups"

    def run(self, program: Program, context: Context) -> Outcome:
        """Print, and return `program` as it is."""
        from rich.console import Console

        # Long lines are left to the terminal: this text is compared and searched.
        Console().print(self._text(program, context), soft_wrap=self.what != "groups")
        return Outcome(program)

    def _text(self, program: Program, context: Context) -> RenderableType:
        from rich.text import Text

        if self.what == "groups":
            from graphprune.report.overview import group_table

            return group_table(program, context.coupling(program))
        if self.what == "types":
            return _types(context.coupling(program), program)
        if self.what == "plan":
            return _plan(context.plan_so_far)
        from graphprune.ir.printer import program_text

        return Text(program_text(program))


def _types(coupling: Coupling, program: Program) -> RenderableType:
    from rich.text import Text

    width = max(map(len, program.weights), default=0)
    lines = (f"{name:{width}}  {coupling.type_of(name)}" for name in program.weights)
    return Text("\n".join(lines))


def _plan(plan: Plan) -> RenderableType:
    from rich.text import Text

    return Text(str(plan) if plan.steps else "the plan is empty")
