"""Checkpoints of programs that lack the attention or the MLP of some layers."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import program_of, relative_error, without_branches
from torch import Tensor, nn

import graphprune as gp
from graphprune.backends.huggingface.layers.absent import absent_modules, check_cache
from graphprune.backends.huggingface.layers.modeling_file import pruned_class
from graphprune.backends.huggingface.model import model_of
from graphprune.backends.huggingface.save import checkpoint_form
from graphprune.backends.huggingface.trial import Trial
from graphprune.errors import BackendError
from graphprune.ir.program import Program


@pytest.mark.parametrize(
    ("name", "places", "skip"),
    [
        ("gemma3", (0, 4, 3), {"0": ["attention"], "1": ["mlp"], "2": ["attention"]}),
        ("gpt2", (0,), {"0": ["attention"]}),
        ("bert", (1, 2), None),  # nothing tells which of its branches is an attention
        pytest.param("mixtral", (1,), {"0": ["mlp"]}, marks=pytest.mark.slow),
        pytest.param(
            "gpt-neox", (0, 3), {"0": ["mlp"], "1": ["attention"]}, marks=pytest.mark.slow
        ),
        pytest.param("t5", (0, 3), None, marks=pytest.mark.slow),
        pytest.param("vit", (1,), None, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_read_verified_and_written_again(
    name: str, places: tuple[int, ...], skip: dict[str, list[str]] | None, tmp_path: Path
) -> None:
    smaller, plan = without_branches(name, *places)
    smaller.save_pretrained(tmp_path / "out")
    again = gp.load(tmp_path / "out")
    assert gp.verify(program_of(name), plan, again).proves_sizes
    again.save_pretrained(tmp_path / "twice")
    config, other = ((tmp_path / at / "config.json").read_text() for at in ("out", "twice"))
    assert config == other
    told = json.loads(config).get("per_layer_config")
    assert told == (skip and {at: {"skip": branches} for at, branches in skip.items()})


# -- caches ---------------------------------------------------------------------------------------


def written_model(program: Program, **changed: Any) -> Any:
    """The model that the modeling file makes of the config of `program`."""
    form = checkpoint_form(program)
    assert program.source is not None and form.kind == "remote-code"
    config = copy.deepcopy(program.source.config)
    config.graphprune = {"absent": form.absent, "uncached": list(form.uncached), **changed}
    return model_of(program, config, pruned_class(program.source.model_class))


def test_layers_without_attention_leave_lengths_to_the_others() -> None:
    program, _ = without_branches("gemma3", 0, 2)  # a window, and no window
    model = written_model(program)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True).past_key_values
        assert first.get_seq_length() == 4  # whoever asks it, before any other run
        assert [layer.keys is None for layer in first.layers] == [True, True, False]
        after = model(ids[:, 4:], past_key_values=first).logits
        inner = model.model(ids[:, :5], use_cache=True).past_key_values
        assert inner.get_seq_length() == 5
    assert relative_error(whole[:, 4:], after) < 1e-5


def test_a_cache_that_tells_other_lengths_is_refused() -> None:
    program, _ = without_branches("llama-gqa", 0)
    model, forgetful = written_model(program), written_model(program, uncached=[])
    trial = Trial(program)
    assert not trial.difference(forgetful)  # as long as no cache is used
    check_cache(model, model, trial)
    with pytest.raises(BackendError, match="its KV cache cannot do without what is gone"):
        check_cache(model, forgetful, trial)


# -- what absent modules give ---------------------------------------------------------------------


class Summed(nn.Module):
    """A part of a layer that adds to the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, stream: Tensor, mask: Any = None) -> tuple[Any, ...]:
        return self.inner(x) + stream, mask, 3.0


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.part, self.last = nn.LayerNorm(4), Summed(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, *_ = self.part(self.norm(x), stream=x, mask=torch.ones(4))
        return self.last(out)


def emptied(*parts: str) -> tuple[Layer, list[str]]:
    layer = Layer()
    gone = [name for name, _ in layer.named_parameters() if name.startswith(parts)]
    with torch.no_grad():
        for name in gone:
            layer.get_parameter(name).zero_()
    return layer, gone


def ran(layer: nn.Module) -> str:
    layer(torch.randn(3, 4))
    return ""


def test_a_module_with_a_sum_inside_hands_the_stream_on() -> None:
    assert absent_modules(*emptied("norm", "part"), ran) == {
        "norm": {"zeros_like": 0},
        "part": [{"same_as": "stream"}, {"same_as": "mask"}, None],
    }


def test_what_cannot_be_left_out_is_refused() -> None:
    with pytest.raises(BackendError, match=r"last.bias is gone, and others of its module are left"):
        absent_modules(*emptied("norm", "part", "last.bias"), ran)
    with pytest.raises(BackendError, match="it differs"):
        absent_modules(*emptied("norm", "part"), lambda _: "it differs")


def test_without_values_it_is_no_plain_checkpoint_either() -> None:
    program, _ = without_branches("llama-gqa", 0)
    empty = {name: weight.to("meta") for name, weight in program.weights.items()}
    form = checkpoint_form(dataclasses.replace(program, weights=empty))
    assert form.kind == "remote-code" and "lacks model.layers.0." in form.reason
