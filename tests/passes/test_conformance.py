"""What every pass promises, run on every pass: built in or from another distribution."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distributions import plugin_passes

import graphprune.passes
from graphprune.errors import PipelineError
from graphprune.pipeline import registry
from graphprune.pipeline.options import options_of
from graphprune.pipeline.pass_base import Pass
from graphprune.pipeline.pass_manager import Result
from graphprune.pipeline.pipeline import Pipeline

SECTIONS = [
    "Before",
    "After",
    "Options",
    "Requires",
    "Preserves",
    "Refuses",
    "Reference",
    "Example",
]

FILES = sorted(path.stem for path in Path(graphprune.passes.__path__[0]).glob("[!_]*.py"))
NAMES = [stem.replace("_", "-") for stem in FILES] + sorted(plugin_passes())

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture(params=NAMES)
def cls(request: pytest.FixtureRequest) -> type[Pass]:
    return registry.find(request.param)


@pytest.fixture(scope="module")
def program() -> Any:
    """A decoder that every pass has something to do on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from graphprune import capture

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    return capture(LlamaForCausalLM(config).eval())


def example(cls: type[Pass]) -> Pipeline:
    """The pipeline that the pass's own Example shows, as a quoted text."""
    quoted = re.search(rf"['\"]({cls.name}(\{{.*?\}})?)['\"]", registry.sections(cls)["Example"])
    assert quoted, f"the Example of {cls.name} shows no pipeline text such as '{cls.name}'"
    return Pipeline.parse(quoted[1])


def run(pipeline: Pipeline, program: Any, output: Path) -> Result:
    from graphprune import Calibration

    tokens = torch.arange(24).reshape(2, 12)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    calibration = Calibration.from_batches([batch])
    return pipeline.run(program, calibration=calibration, output=output)


def state(program: Any) -> tuple[str, dict[str, Any]]:
    """All of a program that a pass could edit."""
    text = program.graph_module.print_readable(print_output=False)
    weights = {name: weight.clone() for name, weight in program.weights.items()}
    return program.fingerprint() + text, weights


# -- what it is ------------------------------------------------------------------------------------


def test_every_file_is_registered_and_every_plugin_found() -> None:
    assert set(NAMES) <= set(registry.names())


def test_name_file_and_class_are_the_same(cls: type[Pass]) -> None:
    assert cls.__module__.rpartition(".")[2] == cls.name.replace("-", "_")
    assert cls.__name__ == "".join(part.capitalize() for part in cls.name.split("-"))


def test_it_is_a_frozen_dataclass_whose_fields_are_options(cls: type[Pass]) -> None:
    assert "__dataclass_params__" in vars(cls), "not decorated with @dataclass"
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert {field.name for field in dataclasses.fields(cls)} == set(options_of(cls))
    assert not {"name", "required", "preserves"} & set(options_of(cls))


def test_it_imports_no_other_pass_and_no_tensor_library_up_front(cls: type[Pass]) -> None:
    source = inspect.getsource(importlib.import_module(cls.__module__))
    imported = re.findall(r"^(?:from|import) (\S+)", source, flags=re.MULTILINE)
    assert not [name for name in imported if name.startswith("graphprune.passes")]
    assert not {"torch", "transformers", "onnx"} & {name.partition(".")[0] for name in imported}


# -- what it says ----------------------------------------------------------------------------------


def test_its_docstring_is_a_line_and_the_sections(cls: type[Pass]) -> None:
    summary, blank, *_ = inspect.getdoc(cls).splitlines()  # type: ignore[union-attr]
    assert re.fullmatch(r"[A-Z].*\.", summary) and not blank
    assert list(registry.sections(cls)) == SECTIONS
    assert all(registry.sections(cls).values())


def test_every_option_is_described(cls: type[Pass]) -> None:
    (info,) = [each for each in registry.listing() if each.name == cls.name]
    assert [option.name for option, text in info.options if not text] == []
    described = re.findall(r"^(\w+)(?: :.*)?\n\s", registry.sections(cls)["Options"], re.MULTILINE)
    assert described == list(options_of(cls))


# -- its options -----------------------------------------------------------------------------------


def test_its_example_reads_back_from_text_and_yaml(cls: type[Pass]) -> None:
    pipeline = example(cls)
    assert isinstance(pipeline.passes[0], cls)
    assert Pipeline.parse(pipeline.to_text()) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline
    assert hash(Pipeline.parse(pipeline.to_text())) == hash(pipeline)


def test_every_option_reads_back(cls: type[Pass]) -> None:
    (pass_,) = example(cls).passes
    for option in options_of(cls).values():
        values = {**pass_.values(), option.name: getattr(pass_, option.name)}
        options = options_of(cls)
        words = " ".join(f"{name}={options[name].write(value)}" for name, value in values.items())
        assert Pipeline.parse(f"{cls.name}{{{words}}}").passes == (pass_,)


def test_an_unknown_option_is_refused(cls: type[Pass]) -> None:
    with pytest.raises(PipelineError, match=f"pass '{cls.name}' has no option 'no-such-option'"):
        Pipeline.parse(f"{cls.name}{{no-such-option=1}}")


# -- what it does ----------------------------------------------------------------------------------


class Ran(NamedTuple):
    """The example of a pass, run once for all tests, and the program around it."""

    result: Result
    before: tuple[str, dict[str, Any]]
    after: tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs() -> dict[str, Ran]:
    return {}


@pytest.fixture
def ran(cls: type[Pass], program: Any, runs: dict[str, Ran], tmp_path: Path) -> Ran:
    if cls.name not in runs:
        before = state(program)
        result = run(example(cls), program, tmp_path / "first")
        runs[cls.name] = Ran(result, before, state(program))
    return runs[cls.name]


def test_its_example_runs_and_leaves_its_input_alone(
    cls: type[Pass], program: Any, ran: Ran
) -> None:
    (text, weights), (after, values) = ran.before, ran.after
    assert after == text
    assert values.keys() == weights.keys()
    assert all(torch.equal(values[name], weights[name]) for name in weights)
    made = ran.result.program
    if cls.required:
        assert made is program
    held = [name for name, weight in made.weights.items() if weight.grad_fn is not None]
    assert held == [], "these weights keep the graph that computed them alive"


def test_it_keeps_no_state_and_gives_the_same_again(
    cls: type[Pass], program: Any, ran: Ran, tmp_path: Path
) -> None:
    pipeline = example(cls)
    again = run(pipeline, program, tmp_path / "second")
    assert pipeline == example(cls)
    assert vars(pipeline.passes[0]) == vars(example(cls).passes[0])
    assert ran.result.plan.to_json() == again.plan.to_json()
    weights = ran.result.program.weights
    assert all(torch.equal(weight, again.program.weights[name]) for name, weight in weights.items())
    assert [each.details for each in ran.result.report.passes] == [
        each.details for each in again.report.passes
    ]


def test_its_report_is_json(cls: type[Pass], ran: Ran) -> None:
    report = ran.result.report
    assert type(report).from_json(report.to_json()).passes[0].name == cls.name
