"""What passes and the lowering to ONNX make of a graph: the lines that change, as golden texts."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import pytest
from architectures import printed, program_of

from graphprune.backends.onnx.attention.forms import Target
from graphprune.backends.onnx.attention.lower import lower_attention
from graphprune.ir.program import Program
from graphprune.pipeline.pipeline import Pipeline

Golden = Callable[[str, str], None]


def difference(before: Program, after: Program) -> str:
    lines = difflib.unified_diff(*(printed(p).splitlines() for p in (before, after)), n=0)
    return "\n".join(line for line in lines if line[:2] not in ("--", "++", "@@"))


def zeros(program: Program) -> str:
    return "\n".join(
        f"{name}: {int((weight == 0).sum())} of {weight.numel()} are zero"
        for name, weight in program.weights.items()
        if program.kinds[name] == "parameter"
    )


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("merged", "merge-kv-heads{groups=1 init=mean}"),
        (
            "merged-and-pruned",
            "merge-kv-heads{groups=2 init=mean},prune{target=kv-heads ratio=0.5 criterion=l1}",
        ),
    ],
)
def test_the_graph_of_merged_heads(name: str, passes: str, golden: Golden) -> None:
    program = program_of("llama-mha")
    golden(f"graph-{name}", difference(program, Pipeline.parse(passes).run(program).program))


def test_sparsity_is_in_the_weights_and_not_in_the_graph(golden: Golden) -> None:
    program = program_of("llama-gqa")
    sparse = Pipeline.parse("sparsify{pattern=2:4 criterion=magnitude}").run(program).program
    assert difference(program, sparse) == ""
    golden("zeros-llama-gqa", zeros(sparse))


@pytest.mark.parametrize(
    ("name", "target"), [("llama-gqa", "cpu"), ("gpt2", "portable"), ("bert", "cpu")]
)
def test_the_graph_of_lowered_attention(name: str, target: Target, golden: Golden) -> None:
    lowered, forms = lower_attention(program_of(name), target, 23)
    said = [f"# {form.form}: {form.why}" for form in forms]
    graph = [line for line in printed(lowered).splitlines() if not line.startswith("weight ")]
    golden(f"lowered-{name}", "\n".join([*said, *graph]))
