"""Which layers torch's semi-structured tensors can hold; converting needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune.backends import semi_structured
from graphprune.backends.semi_structured import SemiStructured, to_semi_structured, why_not
from graphprune.errors import BackendError

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns // 4, 4, generator=generator)
    gone = weight.abs().argsort(-1)[..., :2]
    return weight.scatter(-1, gone, 0).flatten(1).to(dtype)


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 64))
    made = made.to(torch.bfloat16).requires_grad_(False)
    for layer in (made[0], made[2]):
        layer.weight.copy_(two_of_four(*layer.weight.shape))
    return made


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (two_of_four(32, 64), ""),
        (two_of_four(32, 64, torch.float16), ""),
        (torch.zeros(64, 128, dtype=torch.int8), ""),
        (two_of_four(32, 64, torch.float32), "it is float32, not one of float16, bfloat16, int8"),
        (two_of_four(48, 64), "48x64 are no multiples of 32x64"),
        (two_of_four(32, 96), "32x96 are no multiples of 32x64"),
        (two_of_four(64, 64).mT.contiguous(), "it is not 2:4 along its inputs"),
        (torch.zeros(2, 32, 64, dtype=torch.float16), "it is no matrix"),
    ],
)
def test_what_qualifies(weight: Tensor, reason: str) -> None:
    assert why_not(weight) == reason


def test_three_of_one_block_are_too_many_and_one_is_not() -> None:
    weight = two_of_four(32, 64)
    weight[5, 8:12] = torch.tensor([1.0, 0, 0, 0])
    assert why_not(weight) == ""
    weight[5, 8:12] = torch.tensor([1.0, 1, 1, 0])
    assert why_not(weight) == "it is not 2:4 along its inputs"


def test_bytes_are_half_the_values_and_two_bits_for_each() -> None:
    found = SemiStructured.of({"a": two_of_four(32, 64), "b": torch.ones(32, 64).half()}.items())
    assert found.layers == ("a",)
    assert found.dense_bytes == 32 * 64 * 2
    values = 32 * 64 // 2
    assert found.bytes == values * 2 + values * 2 // 8
    quantised = SemiStructured.of({"a": torch.zeros(32, 128, dtype=torch.int8)}.items())
    assert quantised.bytes * 8 == quantised.dense_bytes * 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Sequential(nn.GELU()), "the model: it has no linear layer"),
        (nn.Linear(64, 64), "no weight can be semi-structured; .*weight: it is float32"),
        (nn.Linear(64, 64).half(), "weight: it is not 2:4 along its inputs"),
        (model(), r"0\.weight is on cpu: semi-structured tensors need an NVIDIA GPU"),
    ],
)
def test_a_model_that_cannot_be_converted_is_refused_and_left_alone(
    given: nn.Module, message: str
) -> None:
    before = {name: id(value) for name, value in given.named_parameters()}
    with pytest.raises(BackendError, match=message):
        to_semi_structured(given)
    assert {name: id(value) for name, value in given.named_parameters()} == before


def test_the_layers_that_qualify_are_converted_and_the_others_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With torch's conversion replaced, since it needs a GPU."""
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight + 1)
    monkeypatch.setattr(semi_structured, "_check_device", lambda *_: None)
    given = model()
    given.append(nn.Linear(64, 128))
    given[4].weight = given[0].weight
    before = {name: value.clone() for name, value in given.named_parameters()}
    found = to_semi_structured(given)
    assert found.layers == ("2.weight",)
    assert found.others == {
        "3.weight": "it is not 2:4 along its inputs",
        "0.weight": "it is tied",
        "4.weight": "it is tied",
    }
    assert torch.equal(given[2].weight, before.pop("2.weight") + 1)
    assert not given[2].weight.requires_grad
    assert all(torch.equal(given.get_parameter(name), value) for name, value in before.items())


@pytest.mark.skipif(not GPU, reason="no GPU with sparse tensor cores")
def test_on_a_gpu_the_converted_model_computes_the_same() -> None:
    given = model().cuda()
    inputs = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    expected = given(inputs)
    found = to_semi_structured(given)
    assert found.layers == ("0.weight", "2.weight")
    assert found.others == {"3.weight": "it is not 2:4 along its inputs"}
    assert type(given[0].weight.data).__name__.startswith("SparseSemiStructured")
    assert torch.allclose(given(inputs), expected, rtol=2e-2, atol=2e-2)
