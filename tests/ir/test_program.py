from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from architectures import cache_after, inputs_of, program_of
from torch import nn

import graphprune as gp
from graphprune.errors import UsageError
from graphprune.frontend.capture import capture
from graphprune.ir.exported import own_exported_program, to_exported_program
from graphprune.ir.provenance import declared_length, module_path, source_line


def test_fingerprints_tell_graphs_and_shapes_but_not_values() -> None:
    program = program_of("llama-gqa")
    scaled = program.with_weights({"lm_head.weight": program.weights["lm_head.weight"] * 2})
    assert scaled.fingerprint() == program.fingerprint()
    names = ("llama-gqa", "llama-mha", "llama-eager", "gpt2")
    assert len({program_of(name).fingerprint() for name in names}) == len(names)


def test_fingerprints_are_the_same_in_another_process() -> None:
    code = (
        "import torch, graphprune as gp\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.ones(4))\n"
        "    def forward(self, x):\n"
        "        size = torch.sym_max(x.shape[0], 3) + torch.sym_float(x.shape[0])\n"
        "        return x * self.weight * size\n"
        "found = gp.capture(Model(), example_inputs=(torch.ones(5, 4),)).fingerprint()\n"
    )
    here: dict[str, str] = {}
    exec(code, here)
    command = [sys.executable, "-c", f"{code}print(found)"]
    there = subprocess.run(command, check=True, capture_output=True, text=True)
    assert there.stdout.strip() == here["found"]


def test_weights_are_found_by_tied_names_too() -> None:
    program = program_of("llama-mha")
    assert program.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert program.weight("lm_head.weight") is program.weights["model.embed_tokens.weight"]
    with pytest.raises(UsageError, match="no weight 'head'"):
        program.weight("head")


def test_weights_of_other_shapes_are_refused() -> None:
    program = program_of("llama-mha")
    with pytest.raises(UsageError, match=r"lm_head.weight is \(61, 32\), not \(2, 2\)"):
        program.with_weights({"lm_head.weight": torch.zeros(2, 2)})


def test_inputs_that_are_missing_or_unknown_are_named() -> None:
    program = program_of("llama-gqa")
    with pytest.raises(UsageError, match="no input 'ids'"):
        program(ids=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match="input 'input_ids' is missing"):
        program()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(UsageError, match="'input_ids' is of type list, and has to be a tensor"):
        program(input_ids=[1])
    short = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(UsageError, match="'attention_mask' is of 2 tokens, and 3 are given"):
        program(input_ids=ids.expand(1, 3), attention_mask=short)
    with pytest.raises(UsageError, match="'(input_ids|attention_mask)' (has 1 dim|is missing)"):
        program(input_ids=ids[0])
    with pytest.raises(UsageError, match="20 inputs are given, and the program takes input_ids, "):
        program(*[ids] * 20)


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (torch.ones(1, 4), "'input_ids' is of torch.float32; the program takes torch.int64"),
        (torch.ones(0, 4, dtype=torch.int64), "dimension 0 of input 'input_ids' is 0"),
        (torch.ones(2, 0, dtype=torch.int64), "dimension 1 of input 'input_ids' is 0"),
        (torch.tensor([[5, 61]]), "'input_ids' holds 61, and picks from 61 rows"),
        (torch.tensor([[5, -1]]), "'input_ids' holds -1, and picks from 61 rows"),
    ],
)
def test_tokens_that_are_none_are_refused_by_name(ids: torch.Tensor, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        program_of("llama-gqa")(input_ids=ids)


def test_numbers_of_another_type_are_named_where_a_run_fails_on_them() -> None:
    program = gp.capture(nn.Linear(3, 2), (torch.ones(4, 3),))
    with pytest.raises(UsageError, match=r"'input' is of torch.float64; the program takes .*32"):
        program(torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"'input' is of torch.int64; the program takes .*32"):
        program(torch.ones(4, 3, dtype=torch.int64))
    assert program(torch.ones(0, 3))["output"].shape == (0, 2)


def test_a_size_past_what_the_graph_takes_is_refused_by_name() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(9, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.places[: x.shape[1]]

    program = gp.capture(Placed(), (torch.zeros(2, 6, 3),))
    assert program(torch.zeros(2, 9, 3))["output"].shape[1] == 9
    with pytest.raises(UsageError, match="dimension 1 of input 'x' is 10, and .* to 9"):
        program(torch.zeros(2, 10, 3))


def test_sizes_of_parameters_and_caches() -> None:
    program = program_of("llama-gqa")
    assert program.parameter_count() == sum(
        w.numel() for name, w in program.weights.items() if "inv_freq" not in name
    )
    assert program.kinds["model.rotary_emb.inv_freq"] == "derived"
    assert (
        program.kv_bytes_per_token() == 2 * 2 * 2 * 8 * 4
    )  # layers, keys and values, heads, width
    assert program_of("bert").kv_bytes_per_token() == 0


def test_a_program_runs_with_other_weights_and_gradients() -> None:
    program = program_of("gpt2")
    weights = {
        name: weight.detach().clone().requires_grad_(weight.is_floating_point())
        for name, weight in program.weights.items()
    }
    outputs = program.run(weights, inputs_of(program))
    outputs["logits"].square().mean().backward()
    missing = [
        name
        for name, kind in program.kinds.items()
        if kind == "parameter" and weights[name].grad is None
    ]
    assert not missing
    assert not program(**inputs_of(program))["logits"].requires_grad


def test_positional_arguments_follow_the_inputs() -> None:
    program = program_of("gpt2")
    inputs = inputs_of(program)
    assert torch.equal(program(inputs["input_ids"])["logits"], program(**inputs)["logits"])


def test_an_exported_program_gives_the_same() -> None:
    program = program_of("llama-gqa")
    inputs = inputs_of(program, batch=2, length=4)
    first = program(**inputs)
    filled = program.fill({**inputs, **cache_after(first)})
    called = to_exported_program(program).module()(
        *(filled[value.name] for value in program.inputs)
    )
    assert torch.equal(called[0], program(**inputs, **cache_after(first))["logits"])


def test_training_what_was_exported_leaves_the_model_and_its_programs_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    program = gp.capture(model, (x,))
    result = gp.Pipeline.parse("prune{target=ffn ratio=0.5 criterion=l2}").run(program)
    before, smaller = model(x).detach(), result.program(x)["output"]
    student = own_exported_program(result.program).module()
    parameters = [parameter.requires_grad_() for parameter in student.parameters()]
    loss = sum(output.square().sum() for output in student(x))
    with torch.no_grad():
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.sub_(gradient)
    assert torch.equal(model(x), before)
    assert torch.equal(result.program(x)["output"], smaller)
    gp.verify(program, result.plan, result.program)


def test_nodes_know_their_module_and_line() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.GELU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x) * 2

    program = gp.capture(Model(), example_inputs=(torch.ones(2, 4),))
    found = {str(n.target): n for n in program.graph.nodes if n.op == "call_function"}
    assert module_path(found["aten.gelu.default"]) == "block.1"
    assert module_path(found["aten.mul.Tensor"]) == ""
    assert source_line(found["aten.mul.Tensor"]).startswith("test_program.py:")
    assert source_line(found["aten.linear.default"]).startswith("torch/nn/modules/linear.py:")


def test_sizes_stay_within_the_range_of_a_dynamic_one() -> None:
    import sympy
    from torch.utils._sympy.value_ranges import ValueRanges

    ranges = {sympy.Symbol("s0"): ValueRanges(7, sympy.oo), sympy.Symbol("s1"): ValueRanges(2, 9)}
    program = dataclasses.replace(capture(nn.Linear(3, 3), (torch.ones(2, 3),)), ranges=ranges)
    assert [program.within("s0", size) for size in (3, 7, 11)] == [7, 7, 11]
    assert [program.within("s1", size) for size in (1, 5, 11)] == [1, 5, 9]
    assert [program.within(4, 11), program.within("s2", 11)] == [4, 11]


def test_the_context_length_is_what_the_config_of_the_text_declares() -> None:
    assert program_of("llama-gqa").context_length == 64
    assert program_of("gpt2").context_length == 64  # which calls it n_positions
    assert program_of("t5").context_length is None  # its positions are relative
    assert declared_length({}, {"n_positions": 5}) == 5
    assert declared_length({"max_position_embeddings": 3}, {"n_positions": 5}) == 3


def test_the_context_length_of_a_model_of_images_and_text_is_that_of_its_text() -> None:
    from transformers import Gemma3Config

    program = program_of("llama-gqa")
    config = Gemma3Config(text_config={"max_position_embeddings": 77})
    source = dataclasses.replace(program.source, config=config)  # type: ignore[type-var]
    assert dataclasses.replace(program, source=source).context_length == 77
