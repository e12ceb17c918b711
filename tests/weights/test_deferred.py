"""Tensors that are made where they are used."""

import copy

import torch
from torch import Tensor

from graphprune.weights.deferred import Deferred, converted, cut, made


def counted(values: Tensor) -> tuple[Deferred, list[int]]:
    calls: list[int] = []

    def make() -> Tensor:
        calls.append(1)
        return values

    return Deferred(make, values.shape, values.dtype), calls


def test_looking_at_a_deferred_tensor_makes_nothing() -> None:
    tensor, calls = counted(torch.arange(6.0).view(2, 3))
    assert tensor.shape == (2, 3) and tensor.numel() == 6 and tensor.ndim == 2 and len(tensor) == 2
    assert tensor.dtype is torch.float32 and tensor.is_floating_point() and not tensor.is_meta
    assert tensor.device.type == "cpu" and tensor.nbytes == 24 and tensor.itemsize == 4
    assert not tensor.requires_grad and isinstance(tensor.detach(), Deferred)
    assert calls == []


def test_whatever_computes_with_it_makes_it_each_time() -> None:
    values = torch.arange(6.0).view(2, 3)
    tensor, calls = counted(values)
    assert torch.equal(tensor, values) and torch.equal(tensor.double(), values.double())
    assert torch.equal(torch.ops.aten.mul.Tensor(values, tensor), values * values)
    assert torch.equal(torch.nn.functional.linear(values, tensor), values @ values.T)
    assert tensor.tolist() == values.tolist() and (tensor.numpy() == values.numpy()).all()
    assert torch.equal(torch.cat([tensor, values]), torch.cat([values, values]))
    assert torch.equal(copy.deepcopy(tensor), values) and repr(tensor) == repr(values)
    assert type(tensor + 0) is Tensor
    assert len(calls) == 10


def test_a_cut_and_a_conversion_are_made_when_used() -> None:
    values = torch.arange(12.0).view(3, 4)
    tensor, calls = counted(values)
    narrow = converted(
        cut(cut(tensor, 0, torch.tensor([2, 0])), 1, torch.tensor([1])),
        torch.float64,
        torch.device("cpu"),
    )
    assert narrow.shape == (2, 1) and narrow.dtype is torch.float64 and calls == []
    assert torch.equal(made(narrow), values[[2, 0]][:, [1]].double()) and len(calls) == 1


def test_what_is_as_it_should_be_is_not_wrapped() -> None:
    values = torch.ones(2)
    assert converted(values, torch.float32, torch.device("cpu")) is values
    assert type(cut(values, 0, torch.tensor([1]))) is Tensor
