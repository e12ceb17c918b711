"""What the page of a program holds; how it behaves is tried in a browser (test_page_browser)."""

from __future__ import annotations

import json
import re

import pytest
from architectures import coupling_of, program_of, random_plan

import graphprune as gp
from graphprune.errors import PlanError
from graphprune.report.html_page import bare_page, document, page


def held(text: str) -> dict[str, object]:
    """The document inside a page."""
    found = re.search(r'<script id="document"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def size_of(axis: object, data: dict) -> int:
    if isinstance(axis, int):
        return axis
    if "g" in axis:
        return data["groups"][axis["g"]]["s"]
    if "f" in axis:
        return axis["s"]
    sizes = [size_of(part, data) for part in axis.get("p", axis.get("+"))]
    if "+" in axis:
        return sum(sizes)
    product = 1
    for size in sizes:
        product *= size
    return product


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral", "bert", "t5", "resnet", "phi3"])
def test_the_axes_of_every_weight_have_its_sizes(name: str) -> None:
    data = document(coupling_of(name))
    assert [each["n"] for each in data["weights"]] == list(program_of(name).weights)
    for weight in data["weights"]:
        assert [size_of(axis, data) for axis in weight["t"]] == weight["s"], weight["n"]


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral"])
def test_members_and_savings_are_those_of_the_analysis(name: str) -> None:
    coupling = coupling_of(name)
    data = document(coupling)
    for group, found in zip(coupling.groups, data["groups"], strict=True):
        assert (found["n"], found["s"], found["x"]) == (group.name, group.size, group.exactness)
        names = [data["weights"][weight]["n"] for weight, *_ in found["m"]]
        assert names == [member.weight for member in group.members]
    ffn = next(group for group in data["groups"] if group["r"] == "ffn") if name != "mixtral" else 0
    assert not ffn or ffn["c"][0] == 3 * 32


def test_walks_lead_from_every_member_to_the_first() -> None:
    data = document(coupling_of("llama-gqa"))
    for group in data["groups"]:
        before = {value: other for value, _, other in group["t"]}
        for value in range(len({weight for weight, *_ in group["m"]})):
            for _ in range(10_000):
                if value == 0:
                    break
                value = before[value]
            assert value == 0


def test_the_page_is_one_file_that_asks_for_nothing() -> None:
    text = page(coupling_of("llama-gqa"), "tiny <llama>")
    assert held(text)["title"] == "tiny <llama>"
    assert "<title>tiny &lt;llama&gt; - graphprune</title>" in text
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:", text)


def test_a_name_that_ends_a_script_does_not_end_it() -> None:
    text = bare_page("x", {"</script><b>": (2,)}, "why")
    assert held(text.replace("<\\/", "</", 0))["weights"][0]["n"] == "</script><b>"


def test_a_plan_says_what_goes_and_what_is_left() -> None:
    coupling = coupling_of("llama-gqa")
    plan = random_plan(coupling)
    data = document(coupling, plan=plan)["plan"]
    after = gp.apply(program_of("llama-gqa"), plan)
    names = list(program_of("llama-gqa").weights)
    for index, shape in data["shapes"].items():
        assert list(after.weights[names[index]].shape) == shape
    for weight, dims in plan.removed.items():
        for dim, lost in dims.items():
            runs = data["gone"][names.index(weight)][dim]
            pairs = zip(runs[::2], runs[1::2], strict=True)
            assert [
                place for start, length in pairs for place in range(start, start + length)
            ] == lost
    assert data["costs"]["params"] == after.parameter_count()


def test_a_plan_for_another_program_is_refused() -> None:
    plan = random_plan(coupling_of("gpt2"))
    with pytest.raises(PlanError, match="the plan was made for program"):
        page(coupling_of("llama-gqa"), plan=plan)


def test_a_module_of_no_checkpoint_has_a_page_too() -> None:
    assert gp.analyze(program_of("resnet")).groups
    assert held(page(coupling_of("resnet")))["groups"]
