"""Adapters of a graph's matrices against peft's own on the model, and against what is merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import (
    build,
    inputs_of,
    program_of,
    relative_error,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import graphprune as gp
from graphprune.analysis.matrices import contractions
from graphprune.ir.program import Program
from graphprune.ir.provenance import layer_of
from graphprune.training.lora import Adapters

NAMES = ("llama-mha", "llama-gqa", "phi3", "gpt2", "mixtral", "bert", "t5", "vit", "resnet")
"""One of every way in which a matrix is used, tied and transposed ones among them."""

INSIDE = {"mixtral": 4, "vit": 1, "resnet": 14}
"""How many matrices are adapted as a sum with the weight: packed experts and convolutions."""


def adapters_of(program: Program, layers: bool = False, **options: Any) -> Adapters:
    matrices = contractions(program).matrices
    return Adapters(program, [m for m in matrices if layer_of(m.weight) or not layers], **options)


def stir(adapters: Adapters) -> Adapters:
    """Give every adapter something to say: B starts at zero."""
    torch.manual_seed(1)
    for each in adapters.parameters.values():
        each.data.normal_(0, 0.05)
    return adapters


@pytest.mark.parametrize("name", NAMES)
def test_what_is_merged_is_what_was_trained(name: str) -> None:
    program = program_of(name)
    adapters = stir(adapters_of(program))
    assert len(adapters._inside) == INSIDE.get(name, 0)
    batch, main = inputs_of(program), program.outputs[0].name
    trained = adapters.logits(batch, main, training=False).all().detach()
    merged = program.with_weights(adapters.weights())(**batch)[main]
    assert relative_error(merged, trained) < 1e-5
    assert relative_error(program(**batch)[main], trained) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_reaches_every_adapter(name: str) -> None:
    program = program_of(name)
    adapters = stir(adapters_of(program))
    output = adapters.logits(inputs_of(program), program.outputs[0].name, training=True).all()
    output.square().mean().backward()
    assert [n for n, p in adapters.parameters.items() if p.grad is None or not p.grad.any()] == []


def test_before_training_nothing_is_changed() -> None:
    program = program_of("mixtral")
    merged = adapters_of(program).weights()
    assert merged
    assert all(torch.equal(weight, program.weights[name]) for name, weight in merged.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gpt2"])
def test_peft_on_the_model_gives_the_same(name: str, dropout: float) -> None:
    """Outputs, dropout included, and gradients; GPT-2's Conv1D is transposed, and told so."""
    program = program_of(name)
    ours = adapters_of(program, layers=True, rank=4, alpha=8, dropout=dropout)
    model = build(name).requires_grad_(False)
    modules = [m.weight.removesuffix(".weight") for m in ours._layers]
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=modules,
        fan_in_fan_out=name == "gpt2",
    )
    peft: Any = get_peft_model(model, config)
    stir(ours)
    for matrix, layer in ours._layers.items():
        theirs = peft.base_model.model.get_submodule(matrix.weight.removesuffix(".weight"))
        for side in ("lora_A", "lora_B"):
            weight = getattr(layer, side).default.weight
            getattr(theirs, side).default.weight.data.copy_(weight)
    batch = inputs_of(program)
    peft.train(False)
    for module in peft.modules():
        if "lora_dropout" in dict(module.named_children()):
            module.lora_dropout.train()
    torch.manual_seed(3)
    expected = peft(**batch).logits
    torch.manual_seed(3)
    found = ours.logits(batch, "logits", training=True).all()
    assert relative_error(expected.detach(), found.detach()) < 1e-5
    for output in (expected, found):
        output.square().mean().backward()
    for matrix, layer in ours._layers.items():
        theirs = peft.base_model.model.get_submodule(matrix.weight.removesuffix(".weight"))
        for side in ("lora_A", "lora_B"):
            wanted = getattr(theirs, side).default.weight.grad
            assert torch.allclose(
                getattr(layer, side).default.weight.grad, wanted, rtol=1e-3, atol=1e-6
            )
    peft.merge_adapter()
    merged = ours.weights()
    for matrix in ours._layers:
        theirs = peft.base_model.model.get_submodule(matrix.weight.removesuffix(".weight"))
        assert torch.allclose(merged[matrix.weight], theirs.get_base_layer().weight, atol=1e-6)


def test_dropout_is_of_training_only() -> None:
    program = program_of("llama-gqa")
    adapters = stir(adapters_of(program, dropout=0.5))
    batch = inputs_of(program)
    first, second = (adapters.logits(batch, "logits", training=False).all() for _ in range(2))
    third, fourth = (adapters.logits(batch, "logits", training=True).all() for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(third, fourth)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral", "resnet"])
def test_zeros_stay_in_training_and_after(name: str) -> None:
    program = program_of(name)
    torch.manual_seed(0)
    matrices = contractions(program).matrices
    zeros = {m.weight: torch.rand(program.weights[m.weight].shape) < 0.5 for m in matrices}
    sparse = {name: program.weights[name].masked_fill(zero, 0) for name, zero in zeros.items()}
    program = program.with_weights(sparse)
    adapters = stir(Adapters(program, matrices, dropout=0.0, zeros=zeros))
    merged = adapters.weights()
    for weight, zero in zeros.items():
        assert not merged[weight][zero].any()
        assert not torch.equal(merged[weight], program.weights[weight])
    batch, main = inputs_of(program), program.outputs[0].name
    trained = adapters.logits(batch, main, training=True).all().detach()
    assert relative_error(program.with_weights(merged)(**batch)[main], trained) < 1e-5


class Halves(nn.Module):
    """One weight, used in two pieces, of which one is used twice and one on the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.chunk(2)
        twice = nn.functional.linear(x, first) + nn.functional.linear(x.flip(1), first)
        return twice + (second @ x.mT).mT


def test_pieces_of_a_weight_have_adapters_of_their_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    program = gp.capture(Halves(), example_inputs=(x,))
    adapters = stir(adapters_of(program, rank=2, dropout=0.0))
    assert len(adapters._layers) == 2
    assert len(adapters._inside) == 1
    trained = adapters.logits(
        {program.inputs[0].name: x}, program.outputs[0].name, training=True
    ).all()
    merged = next(iter(program.with_weights(adapters.weights())(x).values()))
    assert torch.allclose(trained, merged, atol=1e-5)
    delta = adapters.weights()["weight"] - program.weights["weight"]
    assert [int(torch.linalg.matrix_rank(piece, atol=1e-4)) for piece in delta.chunk(2)] == [2, 2]


def test_adapters_of_half_precision_weights_are_of_full_precision() -> None:
    held = program_of("llama-gqa")
    program = gp.capture(build("llama-gqa").to(torch.bfloat16))
    adapters = stir(adapters_of(program))
    assert {each.dtype for each in adapters.parameters.values()} == {torch.float32}
    assert {each.dtype for each in adapters.weights().values()} == {torch.bfloat16}
    batch = inputs_of(held)
    trained = adapters.logits(batch, "logits", training=False).all().detach()
    merged = program.with_weights(adapters.weights())(**batch)["logits"]
    assert trained.dtype == torch.bfloat16
    assert relative_error(merged.float(), trained.float()) < 0.05
