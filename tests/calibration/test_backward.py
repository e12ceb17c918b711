"""Gradients taken a segment at a time, against one backward pass through the whole graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from architectures import inputs_of, program_of
from limits import least_memory
from torch import Tensor, fx, nn

import graphprune as gp
from graphprune.analysis.matrices import contractions
from graphprune.calibration.backward import BackwardWalk
from graphprune.calibration.logits import Logits
from graphprune.errors import CalibrationError
from graphprune.ir.interpreter import Hooks, run_program
from graphprune.ir.program import Program
from graphprune.weights.placement import Placement


class Unet(nn.Module):
    """Layers whose outputs are read again far behind them, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.shared = nn.Linear(6, 6, bias=False)
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = self.shared(layer(x).tanh())
            skips.append(x)
        for layer in self.up:
            x = layer(x).tanh() + skips.pop() + self.shared(x)
            first, second = x.split([2, 4], -1)
            x = torch.cat([second, first], -1)
        return x


def unet() -> Program:
    torch.manual_seed(0)
    return gp.capture(Unet().eval(), (torch.zeros(2, 6),))


def squares(logits: Logits, number: int) -> Tensor:
    whole = logits.all()
    rows = torch.arange(whole.shape[:-1].numel())
    return logits.summed(rows, lambda piece, _: piece.square().mean(-1)) * (number + 1)


def case(name: str) -> tuple[Program, list[dict[str, Tensor]]]:
    if name == "unet":
        program = unet()
        name = program.inputs[0].name
        made = torch.Generator().manual_seed(1)
        return program, [{name: torch.randn(2, 6, generator=made)} for _ in range(2)]
    program = program_of(name)
    return program, [inputs_of(program, batch=2), inputs_of(program, batch=1, seed=3)]


def whole(
    program: Program, batch: Mapping[str, Tensor], number: int, watched: set[fx.Node]
) -> tuple[dict[str, Tensor], dict[fx.Node, Tensor]]:
    """Return gradients by all parameters and at nodes, in one pass."""
    names = [name for name, kind in program.kinds.items() if kind == "parameter"]
    weights = {name: weight.detach().clone() for name, weight in program.weights.items()}
    leaves = {name: weights[name].requires_grad_() for name in names}
    seen: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, value: Any, _: Mapping[fx.Node, Any]) -> Any:
        if node in watched:
            seen[node] = value
        return value

    with torch.enable_grad():
        outputs = run_program(program, batch, Hooks(after=keep), weights)
        loss = outputs[program.outputs[0].name].square().mean(-1).sum() * (number + 1)
    found = torch.autograd.grad(loss, [*leaves.values(), *seen.values()], allow_unused=True)
    made = [
        torch.zeros_like(of) if gradient is None else gradient
        for gradient, of in zip(found, [*leaves.values(), *seen.values()], strict=True)
    ]
    return dict(zip(leaves, made, strict=False)), dict(zip(seen, made[len(leaves) :], strict=True))


NAMES = ["unet", "llama-mha", "gemma3", "mixtral", "bert", "t5", "resnet"]


@pytest.mark.parametrize("memory", [None, "little"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_one_pass(name: str, memory: str | None) -> None:
    program, batches = case(name)
    walked = program
    if memory:
        room = least_memory(program, lambda each: BackwardWalk(each, batches, squares)._kept.limit)
        walked = dataclasses.replace(program, placement=Placement(memory=room + 1000))
    nodes = {
        use.node
        for matrix in contractions(program).matrices
        for use in matrix.uses
        if use.node.meta["val"].is_floating_point()
    }
    expected = [whole(program, batch, at, nodes) for at, batch in enumerate(batches)]
    names = list(expected[0][0])
    seen: list[dict[fx.Node, Tensor]] = [{} for _ in batches]

    def visit(number: int, values: Mapping[fx.Node, Any], found: Mapping[fx.Node, Tensor]) -> None:
        assert not seen[number].keys() & found.keys()
        assert all(values[node].shape == gradient.shape for node, gradient in found.items())
        seen[number].update(found)

    walk = BackwardWalk(walked, batches, squares, names, nodes)
    total = dict(walk.run(visit=visit))
    each = dict(
        BackwardWalk(walked, batches, squares, names).run(lambda held, g: [*(held or []), g])
    )
    assert total.keys() == each.keys() == set(names)
    for of_batch in expected:
        top = max(float(gradient.abs().max()) for gradient in of_batch[0].values())
    for wanted in names:
        parts = [of_batch[0][wanted] for of_batch in expected]
        close = {"rtol": 1e-4, "atol": 1e-6 * top}
        torch.testing.assert_close(total[wanted], sum(parts), **close)
        torch.testing.assert_close(sum(each[wanted]), sum(parts), **close)
        assert len(each[wanted]) in (1, len(parts))
    for found, (_, wanted_at) in zip(seen, expected, strict=True):
        assert found.keys() == wanted_at.keys()
        for node, gradient in wanted_at.items():
            torch.testing.assert_close(found[node], gradient, rtol=1e-4, atol=1e-6 * top)


def test_weights_come_as_soon_as_their_gradients_are_whole() -> None:
    program, batches = case("llama-mha")
    names = [name for name, kind in program.kinds.items() if kind == "parameter"]
    order = [name for name, _ in BackwardWalk(program, batches, squares, names).run()]
    layers = [name.split(".")[2] for name in order if ".layers." in name]
    assert layers == sorted(layers, reverse=True)
    assert order[-1] == "model.embed_tokens.weight"  # it is tied: the logits are not all it makes


def test_nothing_before_the_first_wanted_weight_is_run_backwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, batches = case("llama-mha")
    walk = BackwardWalk(program, batches, squares, ["model.layers.1.mlp.down_proj.weight"])
    ran: list[str] = []
    gradients = walk._kept.__class__.__setitem__

    def note(kept: Any, key: Any, value: Any) -> None:
        if key[0] == "gradient":
            ran.append(key[2].name)
        gradients(kept, key, value)

    monkeypatch.setattr(walk._kept.__class__, "__setitem__", note)
    assert [name for name, _ in walk.run()] == ["model.layers.1.mlp.down_proj.weight"]
    assert ran and len(set(ran)) == 1  # what crosses into the norm at the end, and nothing else


def test_a_memory_that_one_layer_does_not_fit_into_is_refused() -> None:
    program, batches = case("llama-mha")
    placed = dataclasses.replace(program, placement=Placement(memory=1000))
    with pytest.raises(CalibrationError, match="the weights of one layer take .* are allowed"):
        BackwardWalk(placed, batches, squares)
