"""`compress` within a latency, by a fixed table of times."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import byte_llama, byte_tokenizer

import graphprune as gp
from graphprune.backends.onnx.kernel_times import KernelTimes
from graphprune.calibration.data import Calibration
from graphprune.errors import GraphPruneError, SelectionError, UsageError
from graphprune.io import reference
from graphprune.ir.program import Program
from graphprune.search.candidates import PARTS, candidates, too_slow
from graphprune.search.latency import Latency
from graphprune.selection.cost import Costs, Kernel

ODD = 3.0
"""How much longer kernels of odd sizes take."""


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(_: KernelTimes, kernel: Kernel) -> float:
        odd = any(size % 2 for size in kernel.sizes if size > 1)
        product = 1e-9 * math.prod(kernel.sizes) * (ODD if odd else 1)
        return product if kernel.kind == "product" else 0.0

    monkeypatch.setattr(KernelTimes, "_measured", seconds)
    monkeypatch.setattr("graphprune.search.compress._GENERATIONS", (1,))


@cache
def program() -> Program:
    return gp.capture(byte_llama(num_hidden_layers=2))


def run(**options: Any) -> Any:
    text = Calibration.from_text(
        reference.calibration_text(), byte_tokenizer(), samples=8, length=16
    )
    given = {"latency": 0.1, "targets": ["ffn"], "criteria": ["wanda"], "calibration": text}
    return gp.compress(program(), **{**given, **options})


def budget(part: float) -> Latency:
    return Latency.of(Costs(gp.analyze(program())), part, KernelTimes())


def test_what_is_chosen_is_fast_enough_and_what_is_not_is_left_out_with_a_reason(
    tmp_path: Path,
) -> None:
    found = run(folder=tmp_path / "work")
    before, after = found.latency
    assert before == pytest.approx(budget(0.1).seconds(program()))
    assert after == pytest.approx(budget(0.1).seconds(found.program)) and after <= 0.9 * before
    slow = [each for each in found.tried if each.figures is None]
    assert slow and all("it is too slow:" in each.reason for each in slow)
    assert all("scope=global" in str(each.candidate) for each in slow)  # of odd sizes
    assert all(each.figures.latency <= 0.9 * before for each in found.tried if each.figures)
    assert any("evolve{target=ffn latency=0.1" in str(each.candidate) for each in found.tried)
    told = found.to_dict()
    assert told["latency"] == [before, after] and "now" in found.latency_text
    assert KernelTimes(path=tmp_path / "work" / "times.json").total({}) == 0  # kept, and read again
    again = gp.Pipeline.parse(str(found.pipeline)).run(program(), calibration=found.calibration)
    for name, weight in found.program.weights.items():
        assert torch.equal(weight, again.program.weights[name])


def test_uniform_recipes_lose_as_little_as_the_times_allow() -> None:
    coupling, asked = gp.analyze(program()), budget(0.1)
    costs = Costs(coupling)
    found = candidates(coupling, {"params": 0.05}, ["ffn"], latency=asked)
    (widths,) = [each.widths for each in found]
    assert widths is not None and widths.ratio is not None and widths.params == 0.05
    groups = [group for group in coupling.groups if group.role == "ffn"]

    def met(step: int) -> bool:
        lost = {group.name: group.size * step // PARTS for group in groups}
        return asked.met_by(costs.kernels(lost))

    least = round(widths.ratio * PARTS)
    assert met(least) and not any(met(step) for step in range(least))


def test_heads_alone_will_do_and_what_cannot_is_named() -> None:
    coupling = gp.analyze(program())
    every = candidates(coupling, {}, latency=budget(0.02))
    assert any(each.widths is None for each in every)
    most = {name: 1 - budget(0.1).left(kernels) for name, kernels in lowest(coupling).items()}
    name, share = min(most.items(), key=lambda pair: pair[1])
    assert name in too_slow(coupling, (), budget(share + 0.01))
    assert name not in too_slow(coupling, (), budget(share - 0.01))


def lowest(coupling: gp.Coupling) -> dict[str, Any]:
    """The kernels when a target has lost all that it may."""
    roles = {"ffn": "ffn", "kv-heads": "kv-head", "query-heads": "query-head"}
    costs, found = Costs(coupling), {}
    for name, role in roles.items():
        groups = [group for group in coupling.groups if group.role == role]
        if groups:
            found[name] = costs.kernels({g.name: g.size - g.min_units for g in groups})
    return found


def test_without_data_the_first_that_is_fast_enough_is_taken() -> None:
    found = run(calibration=None)
    assert found.tried == () and found.latency[1] <= 0.9 * found.latency[0]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"latency": 25}, UsageError, "latency 25 is not in .0, 1.; 25 % is 0.25"),
        (
            {"latency": 0.99},
            SelectionError,
            "nothing meets latency 0.99: ffn can lose at most 0.35",
        ),
        ({"latency": None}, SelectionError, "give one of params, macs, kv_bytes and latency"),
        ({"latency": None, "provider": "cuda"}, UsageError, "provider is of a latency"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_work(
    options: dict[str, Any], error: type[GraphPruneError], words: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gp.Pipeline, "run", None)
    with pytest.raises(error, match=words):
        run(**options)
