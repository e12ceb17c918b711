"""A program and a run show themselves in a notebook: a few lines, and nothing of their tensors."""

from __future__ import annotations

from architectures import program_of
from hypothesis import given
from hypothesis import strategies as st

import graphprune as gp
from graphprune.report.notebook import html_table


def test_a_program_is_a_few_lines_and_its_biggest_groups() -> None:
    program = program_of("llama-gqa")
    assert repr(program).startswith("LlamaForCausalLM: ")
    assert len(repr(program).splitlines()) < 6
    page = program._repr_html_()
    assert "model.layers.{0-1}.mlp:ffn" in page
    assert page.index("<pre>") < page.index("<table>")
    shown: list[str] = []

    class Printer:
        text = staticmethod(shown.append)

    program._repr_pretty_(Printer(), False)
    assert shown[0].startswith(repr(program))
    assert "model.layers.{0-1}.mlp:ffn" in shown[0]


def test_a_run_shows_program_plan_and_passes() -> None:
    result = gp.Pipeline([gp.Prune("ffn", 0.25, criterion="l2")]).run(program_of("llama-gqa"))
    for shown in (repr(result), result._repr_html_()):
        assert "LlamaForCausalLM" in shown
        assert "model.layers.1.mlp:ffn" in shown
        assert "prune{target=ffn ratio=0.25 criterion=l2}" in shown
        assert len(shown) < 5000
    assert repr(result.plan) == str(result.plan)
    many = gp.Plan(result.plan.steps * 30)
    assert repr(many).splitlines()[-1] == "  and 66 more lines"


@given(st.text())
def test_cells_are_escaped(text: str) -> None:
    assert html_table(["a"], [[text]]).count("<") == 14
