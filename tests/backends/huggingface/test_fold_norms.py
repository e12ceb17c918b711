"""Folding rescaled norms: the same function without the products, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from graphprune.backends.huggingface.fold_norms import fold, fold_rescaled_norms
from graphprune.errors import BackendError
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program
from graphprune.transforms.resize import RESCALE

_OLD, _NEW = 16, 12


class Norm(nn.Module):
    """An RMSNorm in the manner of transformers; `offset` is what gains are counted from."""

    def __init__(self, offset: float, gain: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(_NEW)) if gain else None
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)
        if self.weight is None:
            return normed
        gain = self.weight.float() + self.offset if self.offset else self.weight
        return gain * normed


class Linear(nn.Module):
    """A norm without a gain, before a linear layer; `shared` uses its weight twice."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.norm = Norm(0.0, gain=False)
        self.layer = nn.Linear(_NEW, 5)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.norm(x))
        return y + self.layer.weight.sum() if self.shared else y


class Shared(nn.Module):
    """A norm whose gain is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm.weight


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(_NEW, eps=1e-2 * _OLD / _NEW)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def rescaled(module: nn.Module) -> Program:
    """The module as the rewriter leaves one whose norm lost a quarter of its units."""
    program = capture(module.eval(), (torch.rand(2, _NEW),))
    graph = program.graph
    for node in list(graph.nodes):
        name = str(node.target)
        if "mean" not in name and "rms_norm" not in name:
            continue
        factor = _NEW / _OLD if "mean" in name else (_OLD / _NEW) ** 0.5
        with graph.inserting_after(node):
            product = graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
        product.meta = {**node.meta, RESCALE: (_NEW, _OLD)}
        node.replace_all_uses_with(product, delete_user_cb=lambda user, p=product: user is not p)
    program.graph_module.recompile()
    return program


@pytest.mark.parametrize(
    "module", [Norm(0.0), Norm(1.0), Fused(), Linear()], ids=["w", "1 + w", "fused", "linear"]
)
def test_is_the_same_function(module: nn.Module) -> None:
    program = rescaled(module)
    before = {name: weight.clone() for name, weight in program.weights.items()}
    folded, norms = fold(program)
    x = torch.randn(5, _NEW)
    (expected,), (found,) = program(x).values(), folded(x).values()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert not any(RESCALE in node.meta for node in folded.graph.nodes)
    assert [norm.after for norm in norms] == [pytest.approx(1e-2 * _OLD / _NEW)]
    assert [norm.before for norm in norms] == [pytest.approx(1e-2)]
    # The program itself is as it was.
    assert any(RESCALE in node.meta for node in program.graph.nodes)
    assert all(torch.equal(before[name], program.weights[name]) for name in before)
    assert torch.equal(program(x)[program.outputs[0].name], expected)


def test_without_rescaled_norms_it_is_the_same_object() -> None:
    program = capture(Norm(0.0), (torch.rand(2, _NEW),))
    assert fold_rescaled_norms(program) is program


@pytest.mark.parametrize(
    "module",
    [Norm(0.0, gain=False), Shared(), Linear(shared=True)],
    ids=["none", "shared", "linear"],
)
def test_refuses_a_norm_without_a_gain_of_its_own(module: nn.Module) -> None:
    with pytest.raises(BackendError, match="has no plain form"):
        fold_rescaled_norms(rescaled(module))


def test_folds_every_norm_of_a_decoder() -> None:
    from graphprune.pipeline.pipeline import Pipeline

    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    pipeline = Pipeline.parse("prune{target=hidden ratio=0.25 criterion=l2}")
    program = pipeline.run(capture(model)).program
    folded, norms = fold(program)
    assert [norm.module for norm in norms] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ]
    ids = torch.randint(0, 50, (2, 9))
    expected = program(input_ids=ids)["logits"]
    error = (folded(input_ids=ids)["logits"] - expected).abs().max() / expected.abs().max()
    assert error <= 2e-6
