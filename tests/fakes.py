"""Programs, plans and passes that need no tensor library, to test what runs passes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from graphprune.pipeline.pass_base import Analysis, Context, Outcome, Pass
from graphprune.pipeline.pipeline import Pipeline


@dataclass(frozen=True, eq=False)
class FakeTensor:
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FakeProgram:
    """As much of a Program as the pass manager looks at."""

    weights: dict[str, FakeTensor]
    graph: str = "graph"
    kinds: ClassVar[dict[str, str]] = {}
    stand_ins: ClassVar[dict[int, str]] = {}

    @property
    def graph_module(self) -> object:
        """Another one each time: every edit changed the graph, and nobody looks at values."""
        return object()

    def parameter_count(self) -> int:
        return sum(math.prod(weight.shape) for weight in self.weights.values())

    def kv_bytes_per_token(self) -> int:
        return 8 * self.weights["k"].shape[0]

    def fingerprint(self) -> str:
        return f"{self.graph} {[(name, w.shape) for name, w in self.weights.items()]}"

    def resized(self, **shapes: tuple[int, ...]) -> FakeProgram:
        tensors = {name: FakeTensor(shape) for name, shape in shapes.items()}
        return dataclasses.replace(self, weights={**self.weights, **tensors})


def fake_text(program: FakeProgram) -> str:
    """What stands in for `graphprune.ir.printer`."""
    shapes = (f"{name}: {list(weight.shape)}" for name, weight in program.weights.items())
    return "\n".join([program.graph, *shapes])


def fake_program() -> FakeProgram:
    return FakeProgram({"k": FakeTensor((4, 8)), "up": FakeTensor((16, 8))})


@dataclass(frozen=True)
class FakePlan:
    """As much of a Plan as the pass manager looks at."""

    steps: tuple[str, ...] = ()
    edits: Any = None
    calibration: Any = None

    def __add__(self, other: FakePlan) -> FakePlan:
        return FakePlan(self.steps + other.steps, calibration=self.calibration)


@dataclass(frozen=True)
class Shrink(Pass):
    """Remove rows of ``up``."""

    name: ClassVar[str] = "shrink"
    rows: int = 4

    def run(self, program: Any, context: Context) -> Outcome:
        height, width = program.weights["up"].shape
        smaller = program.resized(up=(height - self.rows, width))
        return Outcome(smaller, FakePlan((f"up {self.rows}",)), {"removed": self.rows})


@dataclass(frozen=True)
class Look(Pass):
    """Change nothing, as a pass that checks or writes does."""

    name: ClassVar[str] = "look"
    required: ClassVar[bool] = True

    def run(self, program: Any, context: Context) -> Outcome:
        return Outcome(program, details={"rows": program.weights["up"].shape[0]})


@dataclass(frozen=True)
class Do(Pass):
    """Do what the test says."""

    name: ClassVar[str] = "do"

    def run(self, program: Any, context: Context) -> Outcome:
        return self.action(program, context)

    @staticmethod
    def action(program: Any, context: Context) -> Outcome:
        raise NotImplementedError


def doing(action: Callable[[Any, Context], Any], **members: Any) -> Pass:
    """A pass that runs `action`, of a class with these further members."""
    return type("Do", (Do,), {"action": staticmethod(action), **members})()


@dataclass(frozen=True)
class Needy(Look):
    """Need calibration data when it is asked to."""

    name: ClassVar[str] = "needy"
    needs: bool = True

    @property
    def requires_calibration(self) -> bool:
        return self.needs


@dataclass
class Counting:
    """An analysis that counts how often it is computed."""

    count: int = 0
    analysis: Analysis[str] = field(init=False)

    def __post_init__(self) -> None:
        self.analysis = Analysis("graph", self.compute, str)

    def compute(self, program: Any) -> str:
        self.count += 1
        return program.graph


def pipelines_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the pipelines that are run from here on, in their order."""
    ran: list[str] = []
    run = Pipeline.run

    def counted(pipeline: Pipeline, *args: Any, **options: Any) -> Any:
        ran.append(str(pipeline))
        return run(pipeline, *args, **options)

    monkeypatch.setattr(Pipeline, "run", counted)
    return ran
