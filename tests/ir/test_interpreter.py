"""The interpreter: the same as the compiled graph, with hooks, parts, segments and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from architectures import inputs_of, program_of
from torch import Tensor, fx, nn

import graphprune as gp
from graphprune.ir.interpreter import (
    Hooks,
    Interpreter,
    Memory,
    Segment,
    Values,
    ancestors,
    call,
    given_of,
    last_uses,
    run_part,
    run_program,
)
from graphprune.ir.program import Program


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of("llama-gqa")


@pytest.fixture(scope="module")
def inputs(program: Program) -> dict[str, Tensor]:
    return inputs_of(program)


def chain() -> Program:
    """``relu(x W) V`` with each step in a tensor of its own, of 400, 400 and 80 bytes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 50, bias=False), nn.ReLU(), nn.Linear(50, 10, bias=False))
    return gp.capture(module.eval(), example_inputs=(torch.randn(2, 5),))


def test_it_computes_what_the_graph_does(program: Program, inputs: dict[str, Tensor]) -> None:
    expected = program(**inputs)
    with torch.no_grad():
        found = run_program(program, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_other_weights_may_be_given(program: Program, inputs: dict[str, Tensor]) -> None:
    weights = {**program.weights, "lm_head.weight": 2 * program.weights["lm_head.weight"]}
    found = run_program(program, inputs, weights=weights)["logits"]
    assert torch.equal(found, 2 * program(**inputs)["logits"])


def test_hooks_see_what_a_node_reads_and_change_what_it_gives() -> None:
    program, x = chain(), torch.randn(3, 5)
    (relu,) = (node for node in program.graph.nodes if "relu" in str(node.target))
    seen: list[Tensor] = []

    def before(node: fx.Node, values: Mapping[fx.Node, Any]) -> Mapping[fx.Node, Any]:
        (source,) = relu.all_input_nodes
        return {source: -values[source]} if node is relu else {}

    def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(node, args, kwargs).double() if node is relu else call(node, args, kwargs)

    def after(node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        if node is relu:
            seen.append(value)
            assert torch.equal(value, (-values[relu.all_input_nodes[0]]).relu().double())
        return value.float()

    found = run_program(program, {program.inputs[0].name: x}, Hooks(before, compute, after))
    up, down = program.weights.values()
    torch.testing.assert_close(found["output"], (-x @ up.T).relu() @ down.T)
    assert len(seen) == 1


def test_a_part_is_run_from_what_is_given(program: Program, inputs: dict[str, Tensor]) -> None:
    values = Values(given_of(program, inputs))
    with torch.no_grad():
        Interpreter(values).run(program.graph.nodes)
    product = next(n for n in reversed(program.graph.nodes) if "linear" in str(n.target))
    source, weight = product.all_input_nodes
    assert ancestors([product], [source]) == {product, source, weight}
    (found,) = run_part(program, (product,), {source: 2 * values[source]})
    assert torch.equal(found, 2 * values[product])


def test_values_are_dropped_after_their_last_use() -> None:
    program = chain()
    values = Values(given_of(program, {program.inputs[0].name: torch.randn(2, 5)}))
    kept: list[int] = []

    def after(node: fx.Node, value: Any, held: Mapping[fx.Node, Any]) -> Any:
        kept.append(len(held))
        return value

    Interpreter(values, Hooks(after=after), last_uses(program.graph)).run(program.graph.nodes)
    assert kept == [3, 2, 2]  # two weights and the input; one weight and a result, twice
    assert not values


def test_memory_counts_what_is_held_at_once_and_no_weights() -> None:
    program = chain()
    memory = Memory(program.weights.values())
    given = given_of(program, {program.inputs[0].name: torch.randn(2, 5)})
    values = Values(given, memory)
    assert memory.bytes == 40
    Interpreter(values, last_uses=last_uses(program.graph)).run(program.graph.nodes)
    assert (memory.bytes, memory.peak) == (0, 800)


def test_memory_that_is_shared_counts_once() -> None:
    memory, graph, x = Memory(), fx.Graph(), torch.zeros(10)
    nodes = [graph.placeholder(name) for name in "abc"]
    values = Values({nodes[0]: x, nodes[1]: x.view(2, 5), nodes[2]: [x[:5], x[5:]]}, memory)
    assert memory.bytes == 40
    del values[nodes[0]], values[nodes[2]]
    assert memory.bytes == 40
    values[nodes[1]] = torch.zeros(3)
    assert (memory.bytes, memory.peak) == (12, 52)
    memory.reserve(100)
    values.clear()
    assert (memory.bytes, memory.peak) == (100, 112)


def test_a_segment_needs_its_inputs_and_no_more() -> None:
    """A program run segment by segment, each on the inputs that it names, is the program."""
    program = program_of("llama-gqa")
    inputs = inputs_of(program)
    nodes = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    parts = [Segment.of(nodes[at : at + 17]) for at in range(0, len(nodes), 17)]
    held: dict[fx.Node, Any] = dict(given_of(program, inputs))
    for part in parts:
        values = Values({node: held[node] for node in part.inputs})
        with torch.no_grad():
            Interpreter(values).run(part.nodes)
        held |= {node: values[node] for node in part.outputs}
    expected = program(**inputs)
    for value, node in program.output_nodes():
        assert torch.equal(held[node], expected[value.name])
