"""A program as a module: it computes and trains as the original does, and owns its weights."""

from __future__ import annotations

import copy
import doctest
from pathlib import Path

import pytest
import torch
from byte_llama import byte_llama
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune import training
from graphprune.backends.module import ProgramModule, to_module
from graphprune.errors import BackendError


class Net(nn.Module):
    """Convolution, batch norm, dropout, a tied weight and named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, object]:
        h = self.drop(self.norm(self.conv(x)).relu().mean((2, 3)))
        h = self.second(self.first(h).relu())
        return {"logits": self.head(h), "parts": (h, h.sum(1))}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def program(net: Net) -> gp.Program:
    return gp.capture(net, (torch.randn(4, 3, 8, 8),))


def test_it_has_the_names_and_outputs_of_the_original(net: Net, program: gp.Program) -> None:
    module = to_module(program)
    assert isinstance(module, ProgramModule)
    assert set(module.state_dict()) == set(net.state_dict())
    module.load_state_dict(net.state_dict())
    assert module.first.weight is module.second.weight
    assert {n for n, p in module.named_parameters() if p.requires_grad} == dict(
        net.named_parameters()
    ).keys()
    x = torch.randn(3, 3, 8, 8)
    found, expected = module(x), net(x)
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(found.logits, expected["logits"])
    assert all(map(torch.equal, found["parts"], expected["parts"]))
    assert torch.equal(module(x=x)["logits"], expected["logits"])


def test_training_switches_dropout_and_batch_norm_as_in_the_original(
    net: Net, program: gp.Program
) -> None:
    original, module = copy.deepcopy(net).train(), to_module(program).train()
    x = torch.randn(5, 3, 8, 8)
    results = []
    for each in (original, module):
        torch.manual_seed(1)
        loss = each(x)["logits"].square().mean()
        loss.backward()
        results.append(loss.detach())
    assert torch.allclose(*results, rtol=1e-5)
    for name, parameter in original.named_parameters():
        assert torch.allclose(parameter.grad, module.get_parameter(name).grad, atol=1e-6), name
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.allclose(original.get_buffer(name), module.get_buffer(name), atol=1e-6)
        assert not torch.equal(net.get_buffer(name), module.get_buffer(name))
    module.norm.eval()
    kept = module.norm.running_mean.clone()
    module(x)
    assert torch.equal(module.norm.running_mean, kept)


def test_training_it_leaves_model_and_program_alone(net: Net, program: gp.Program) -> None:
    module = to_module(program).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    module(torch.randn(5, 3, 8, 8))["logits"].square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.equal(module.head.weight, net.head.weight)


def test_it_can_be_pruned_saved_and_copied(tmp_path: Path) -> None:
    class Untied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(16, 16)

    program = gp.capture(Untied(), (torch.randn(4, 3, 8, 8),))
    pruned = gp.Pipeline.parse("prune{target=* ratio=0.5 criterion=l2}").run(program).program
    module = to_module(pruned)
    x = torch.randn(2, 3, 8, 8)
    expected = pruned(x)["logits"]
    again = gp.capture(module, (x,))
    assert {g.size for g in gp.analyze(again).groups} == {g.size for g in gp.analyze(pruned).groups}
    assert torch.allclose(again(x)["logits"], expected, atol=1e-6)
    assert torch.equal(copy.deepcopy(module)(x)["logits"], expected)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(loaded(x)["logits"], expected)


def test_a_transformers_model_comes_back_as_its_own_class() -> None:
    model = byte_llama(num_hidden_layers=1)
    pipeline = gp.Pipeline.parse("prune{target=ffn ratio=0.5 criterion=l2}")
    pruned = pipeline.run(gp.capture(model)).program
    module = to_module(pruned)
    assert type(module) is type(model)
    assert module.config.intermediate_size < model.config.intermediate_size
    ids = torch.randint(0, 256, (2, 7))
    module.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    shared = {w.data_ptr() for w in pruned.weights.values()}
    assert not shared & {parameter.data_ptr() for parameter in module.parameters()}


def test_no_weights_are_refused() -> None:
    with torch.device("meta"):
        model = byte_llama(num_hidden_layers=1)
    with pytest.raises(BackendError, match="on the meta device"):
        to_module(gp.capture(model))


def test_the_page_on_training_runs() -> None:
    page = Path(training.__file__).with_name("README.md")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=flags)
    assert tried
    assert not failed


def test_a_bare_output_is_a_tensor_and_several_are_a_tuple() -> None:
    class Two(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.count = count

        def forward(self, x: Tensor) -> object:
            results = tuple(F.relu(x * self.weight + i) for i in range(self.count))
            return results if self.count > 1 else results[0]

    x = torch.randn(2, 3)
    for count in (1, 2):
        found = to_module(gp.capture(Two(count), (x,)))(x)
        assert isinstance(found, tuple if count > 1 else Tensor)
