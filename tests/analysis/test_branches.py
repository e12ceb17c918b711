"""Residual branches: found by what the graph adds, whatever modules are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import program_of
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.analysis.residual.branches import Branches
from graphprune.errors import PlanError, UsageError
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.plan.steps import Step
from graphprune.verification.verify import verify


def branches_of(program: Program) -> Branches:
    return Branches(gp.analyze(program).types)


class Net(nn.Module):
    """Some layers, and a function of them and of what comes in."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(6, 8), nn.Linear(8, 3)
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.scale = nn.Parameter(torch.randn(8))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.body(self, self.inside(x)))


def captured(body: Callable[[Net, Tensor], Tensor]) -> Program:
    return gp.capture(Net(body).eval(), (torch.randn(5, 6),))


def sequential(net: Net, x: Tensor) -> Tensor:
    x = x + net.a(F.relu(x))
    return x + net.b(F.relu(x))


def parallel(net: Net, x: Tensor) -> Tensor:
    return net.a(F.relu(x)) + net.b(F.relu(x)) + x


def in_turn(net: Net, x: Tensor) -> Tensor:
    return x + net.a(F.relu(x)) + net.b(F.relu(x))


def scaled(net: Net, x: Tensor) -> Tensor:
    x = x + 0.2 * net.a(x)
    return x + net.b(x) * net.scale


def nested(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    return x + net.c(h + net.b(h))


def normalized(net: Net, x: Tensor) -> Tensor:
    x = F.layer_norm(x + net.a(x), (8,))
    return F.layer_norm(x + net.b(x), (8,))


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (sequential, {"a", "b"}),
        (parallel, {"a", "b"}),
        (in_turn, {"a", "b"}),
        (scaled, {"a", "b"}),
        (nested, {"a"}),
        (normalized, {"a", "b"}),
    ],
)
def test_branches_are_what_is_added_to_a_stream(
    body: Callable[[Net, Tensor], Tensor], names: set[str]
) -> None:
    program = captured(body)
    branches = branches_of(program)
    matrices = {
        branch.name: {weight.partition(".")[0] for weight in branch.weights}
        for branch in branches.all
    }
    if body is nested:  # the inner one goes with the one that it lies in
        assert set(matrices) == {"model"} and matrices["model"] == {"a", "b", "c"}
        return
    assert {name: held - {"scale"} for name, held in matrices.items()} == {n: {n} for n in names}


@pytest.mark.parametrize("body", [sequential, parallel, in_turn, scaled, normalized])
def test_what_is_left_is_the_model_without_it(body: Callable[[Net, Tensor], Tensor]) -> None:
    net, x = Net(body).eval(), torch.randn(5, 6)
    program = gp.capture(net, (x,))
    plan = Plan((Step(program.fingerprint(), branches=branches_of(program).records(["b"])),))
    smaller = gp.apply(program, plan)
    verify(program, plan, smaller)
    with torch.no_grad():
        net.b.weight.zero_()
        net.b.bias.zero_()
        expected = net(x)
    (found,) = smaller(x).values()
    torch.testing.assert_close(found, expected)
    assert not {"b.weight", "b.bias"} & smaller.weights.keys()
    assert ("scale" in smaller.weights) == (body is not scaled)


def no_stream(net: Net, x: Tensor) -> Tensor:
    return net.a(x) + net.b(x)


def no_matrix(net: Net, x: Tensor) -> Tensor:
    return net.a(x + 0.04 * x**3 + x * net.scale)


def read_elsewhere(net: Net, x: Tensor) -> Tensor:
    added = net.a(x)
    return (x + added) * added.exp()


def shared(net: Net, x: Tensor) -> Tensor:
    x = x + net.a(x)
    return x + net.a(F.relu(x))


@pytest.mark.parametrize("body", [no_stream, no_matrix, read_elsewhere, shared])
def test_other_sums_have_no_branch(body: Callable[[Net, Tensor], Tensor]) -> None:
    assert branches_of(captured(body)).all == ()


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("gemma3", "model.layers.{}.self_attn", "model.layers.{}.mlp"),
        ("gpt-neox", "gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp"),
        ("opt", "model.decoder.layers.{}.self_attn", "model.decoder.layers.{}"),
        ("bert", "bert.encoder.layer.{}.attention", "bert.encoder.layer.{}"),
    ],
)
def test_decoders_and_encoders_have_two_in_each_layer(name: str, attention: str, mlp: str) -> None:
    branches, layers = branches_of(program_of(name)), 3 if name == "gemma3" else 2
    assert {branch.name: branch.attends for branch in branches.all} == {
        **{attention.format(layer): True for layer in range(layers)},
        **{mlp.format(layer): False for layer in range(layers)},
    }
    cached = [branch.caches for branch in branches.all if branch.caches]
    expected = [(f"{layer}.key", f"{layer}.value") for layer in range(layers)]
    assert cached == ([] if name == "bert" else expected)


def test_what_two_branches_share_goes_with_the_second() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        normed = net.c(x)
        return net.a(F.relu(normed)) + net.b(F.silu(normed)) + x

    def and_another(net: Net, x: Tensor) -> Tensor:
        return body(net, x + net.d(F.relu(x)))

    branches = branches_of(captured(and_another))
    first, second = branches.records(["a", "b"])
    assert set(first.weights) == {"a.weight", "a.bias"}
    assert set(second.weights) == {"b.weight", "b.bias", "c.weight", "c.bias"}


def written_over(net: Net, x: Tensor) -> Tensor:
    x = x + net.a(x)
    return x.add_(net.b(x))


def test_a_sum_that_is_written_over_stays_a_sum() -> None:
    assert [branch.name for branch in branches_of(captured(written_over)).all] == ["b"]


def test_refusals_say_what_is_wrong() -> None:
    branches = branches_of(captured(sequential))
    with pytest.raises(PlanError, match="all of the 2 residual branches would go"):
        branches.records(["a", "b"])
    branches = branches_of(program_of("llama-gqa"))
    with pytest.raises(UsageError, match=r"no residual branch 'model.layers.0.attn'; did you mean"):
        branches.named("model.layers.0.attn")
    with pytest.raises(PlanError, match="nothing would be left in the KV cache"):
        branches.without([f"model.layers.{layer}.self_attn" for layer in (0, 1)])
