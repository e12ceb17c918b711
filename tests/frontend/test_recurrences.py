"""Models that go on from token to token or chunk to chunk are captured for every length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from architectures import random_plan
from captures import captured
from tiny_models import tiny_model
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.recurrent_gemma import modeling_recurrent_gemma
from transformers.models.rwkv import modeling_rwkv

import graphprune as gp
from graphprune.backends.archive import archive
from graphprune.frontend.recurrences import decays
from graphprune.frontend.recurrences.delta_rule import delta_rule
from graphprune.frontend.recurrences.operators import (
    delta_recurrence,
    linear_recurrence,
    max_recurrence,
)
from graphprune.verification.masked_reference import masked

LENGTHS = (1, 3, 17, 65, 130)
ROWS = 3

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _delta(length: int, per_key: bool) -> Arguments:
    heads = 4 if per_key else 2
    query, key = torch.randn(2, ROWS, length, heads, 8)
    decay = -torch.rand(ROWS, length, 4, *[8] * per_key) * 2
    value, beta = torch.randn(ROWS, length, 4, 6), torch.rand(ROWS, length, 4)
    return (query, key, value, decay, beta), {"use_qk_l2norm_in_kernel": True}


def _alike(length: int) -> Arguments:
    """Keys that are nearly one: products of their products grow beyond what a float holds."""
    query, key = torch.randn(ROWS, length, 2, 8), torch.randn(ROWS, 1, 2, 8)
    key = key.expand(-1, length, -1, -1)
    value, beta = torch.randn(ROWS, length, 4, 6), torch.ones(ROWS, length, 4)
    return (query, key, value, beta * -0.01, beta), {"use_qk_l2norm_in_kernel": True}


def _mamba(length: int) -> Arguments:
    states, step, gate = torch.randn(3, ROWS, 6, length)
    inner, outer = torch.randn(2, ROWS, 4, length)
    sizes = {"D": torch.randn(6), "z": gate, "delta_bias": torch.randn(6), "delta_softplus": True}
    return (states, step, -torch.rand(6, 4) * 3, inner, outer), sizes


def _mamba2(length: int) -> Arguments:
    states, step = torch.randn(ROWS, length, 4, 5), torch.randn(ROWS, length, 4)
    inner, outer = torch.randn(2, ROWS, length, 2, 6)
    sizes = {"D": torch.randn(4), "dt_bias": torch.randn(4), "dt_softplus": True}
    return (states, step, -torch.rand(4), inner, outer, 8), sizes


def _rwkv(length: int) -> Arguments:
    keys, values = torch.randn(2, ROWS, length, 6)
    return (torch.randn(6), torch.randn(6), keys * 5, values), {}


def _griffin(length: int) -> Arguments:
    states, gate = torch.randn(ROWS, length, 6), torch.rand(ROWS, length, 6)
    return (None, states, gate, torch.rand(ROWS, length, 1) < 0.1, None), {}


Form = Callable[..., Any]
FORMS: dict[str, tuple[Form, Form, Callable[[int], Arguments]]] = {
    "gated delta rule": (
        modeling_qwen3_next.torch_chunk_gated_delta_rule,
        delta_rule,
        lambda length: _delta(length, False),
    ),
    "gated delta rule, keys alike": (
        modeling_qwen3_next.torch_chunk_gated_delta_rule,
        delta_rule,
        _alike,
    ),
    "kimi delta attention": (
        modeling_kimi_linear.chunk_kimi_delta_attention,
        delta_rule,
        lambda length: _delta(length, True),
    ),
    "mamba": (modeling_mamba.mamba_selective_scan, decays.selective_scan, _mamba),
    "mamba 2": (
        modeling_mamba2.mamba2_chunk_scan,
        decays.chunked(modeling_mamba2.mamba2_chunk_scan),
        _mamba2,
    ),
    "rwkv": (modeling_rwkv.rwkv_linear_attention_cpu, decays.weighted_average, _rwkv),
    "griffin": (
        modeling_recurrent_gemma.RecurrentGemmaRglru._rnn_scan,
        decays.gated_recurrence,
        _griffin,
    ),
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FORMS)
def test_what_replaces_a_loop_computes_the_same(name: str, length: int) -> None:
    loop, form, arguments = FORMS[name]
    torch.manual_seed(length)
    args, kwargs = arguments(length)
    expected, found = loop(*args, **kwargs), form(*args, **kwargs)
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


RECURRENCES: dict[str, tuple[Form, list[tuple[int, ...]]]] = {
    "linear": (lambda *given: linear_recurrence(*given, 1), [(2, 5, 3)] * 2),
    "largest": (lambda *given: max_recurrence(*given, 1), [(2, 5, 3)] * 2),
    "delta": (delta_recurrence, [(2, 3, 1, 1), (2, 3, 4, 2), (2, 3, 2, 5), (2, 3, 2, 4)]),
}


@pytest.mark.parametrize("name", RECURRENCES)
def test_gradients_of_recurrences_are_those_of_finite_differences(name: str) -> None:
    function, shapes = RECURRENCES[name]
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, given)


def _sized(names: Iterable[str], rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "input_ids": torch.randint(0, 96, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
    }
    return {name: made[name] for name in names}


def _logits(program: gp.Program, rows: int, length: int) -> Tensor:
    return program(**_sized([value.name for value in program.inputs], rows, length))["logits"]


MODELS = ("mamba", "nemotron_h", "qwen3_next")


@pytest.mark.parametrize("model_type", MODELS)
def test_programs_hold_at_every_length_before_and_after_pruning(model_type: str) -> None:
    model: Any = tiny_model("causal-lm", model_type)
    program = captured(model)
    assert not program.limits
    coupling = gp.analyze(program)
    plan = random_plan(coupling, ratio=None)
    pruned, reference = gp.apply(program, plan), masked(program, plan, coupling.types)
    for rows, length in ((1, 1), (3, 3), (1, 17), (3, 65), (1, 130)):
        inputs = _sized([value.name for value in program.inputs], rows, length)
        with torch.no_grad():
            torch.testing.assert_close(
                _logits(program, rows, length), model(**inputs).logits, rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(
            _logits(pruned, rows, length), reference(**inputs)["logits"], rtol=1e-4, atol=1e-4
        )


def test_an_archive_of_a_recurrence_holds_at_other_lengths(tmp_path: object) -> None:
    program = captured(tiny_model("causal-lm", "mamba"))
    program.save(f"{tmp_path}/archive")
    loaded = archive.load(f"{tmp_path}/archive")
    assert torch.equal(_logits(loaded, 2, 33), _logits(program, 2, 33))


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next"])
def test_onnx_models_of_recurrences_hold_at_other_lengths(
    model_type: str, tmp_path: object
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    program = captured(tiny_model("causal-lm", model_type))
    program.export_onnx(f"{tmp_path}/model.onnx")
    session = onnxruntime.InferenceSession(f"{tmp_path}/model.onnx")
    for rows, length in ((1, 1), (3, 65), (1, 130)):
        inputs = _sized([value.name for value in program.inputs], rows, length)
        found = session.run(["logits"], {name: each.numpy() for name, each in inputs.items()})[0]
        torch.testing.assert_close(
            torch.from_numpy(found), _logits(program, rows, length), rtol=1e-3, atol=1e-4
        )


def test_states_that_come_in_or_go_out_are_left_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from graphprune.frontend.recurrences import replaced

    seen: list[Sequence[Any]] = []
    monkeypatch.setitem(
        replaced._FORMS, "mamba_selective_scan", lambda *args, **_: seen.append(args)
    )
    args, kwargs = _mamba(5)
    with replaced.loops_replaced(tiny_model("causal-lm", "mamba")):
        modeling_mamba.mamba_selective_scan(*args, **kwargs)
        assert len(seen) == 1
        _, state = modeling_mamba.mamba_selective_scan(*args, **kwargs, return_last_state=True)
    assert len(seen) == 1
    assert state.shape == (ROWS, 6, 4)
