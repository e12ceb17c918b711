"""Results that are worked out once for calls that are alike are those that each call would give."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from byte_llama import byte_llama
from torch import Tensor, nn
from torch._dynamo import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import graphprune as gp
from graphprune.ir.program import Program

pytestmark = pytest.mark.captures_anew


class Views(nn.Module):
    """Looks into tensors in many ways, twice each, and writes into what it looked at."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, length = x.shape[:2]
        found = []
        for _ in range(2):
            own = x * 2
            own[:, :1] += 1  # a view that is written to
            found += [own.view(rows, length, 2, -1).transpose(1, 2).flatten(2), own]
            found += [x[:, 1:], x[:, :1].expand(-1, 3, -1), own.mT.contiguous()]
        return tuple(found)


class Numbers(nn.Module):
    """Mixes types and numbers that are equal and of other kinds."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        whole = x.to(torch.int64)
        one = torch.ones((), dtype=torch.float64)
        return (
            whole * 1,
            whole * 1.0,
            whole * True,
            x * one,
            x.double() * one,
            x.half() * one,
            torch.clamp(x, min=0),
            torch.clamp(x, max=0),
            x.new_zeros(()) + torch.tensor(2),
        )


class Layouts(nn.Module):
    """Convolves images of both memory formats, and sums equal sizes over other dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        last = x.contiguous(memory_format=torch.channels_last)
        return (
            self.conv(x),
            self.conv(last),
            x.sum(2),
            x.sum(3),
            F.interpolate(last, scale_factor=2),
        )


def graph_of(program: Program) -> list[Any]:
    """Operators, and all that is said of what they give, in their order."""
    return [
        (str(node.target), v.dtype, str(v.shape), str(v.stride()), str(v.storage_offset()))
        if isinstance(v := node.meta.get("val"), Tensor)
        else str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function"
    ]


CASES: list[Callable[[], Program]] = [
    lambda: gp.capture(byte_llama(num_hidden_layers=2)),
    lambda: gp.capture(Views(), (torch.randn(2, 5, 6),)),
    lambda: gp.capture(Numbers(), (torch.randn(3, 4),)),
    lambda: gp.capture(Layouts().eval(), (torch.randn(2, 4, 8, 8),)),
]


@pytest.mark.parametrize("make", CASES, ids=["llama", "views", "numbers", "layouts"])
def test_the_graph_is_the_one_without(
    make: Callable[[], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = graph_of(make())

    @contextlib.contextmanager
    def none() -> Any:
        with config.patch(fake_tensor_cache_enabled=False):
            yield

    monkeypatch.setattr("graphprune.frontend.torch_export.known_results", none)
    assert found == graph_of(make())


def test_layers_that_are_alike_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    work_out = FakeTensorMode.dispatch

    def counted(self: FakeTensorMode, func: Any, *args: Any, **kwargs: Any) -> Any:
        asked[str(func)] += 1
        return work_out(self, func, *args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    counts = []
    for layers in (2, 4):
        asked.clear()
        gp.capture(byte_llama(num_hidden_layers=layers))
        counts.append({name: asked[f"aten.{name}"] for name in ("silu.default", "rsqrt.default")})
    assert counts[0] == counts[1]
    assert min(counts[0].values()) > 0


def test_a_result_is_no_longer_known_once_sizes_are_found_equal() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            first = torch.cat([x, y], dim=1) * 2  # of sizes a + b
            torch._check(x.shape[1] == y.shape[1])
            return torch.cat([x, y], dim=1) * 2 + first

    program = gp.capture(Adds(), (torch.randn(2, 3), torch.randn(2, 3)))
    for size in (2, 5):
        x, y = torch.randn(4, size), torch.randn(4, size)
        found = program(x=x, y=y)["output"]
        torch.testing.assert_close(found, torch.cat([x, y], 1) * 4)
