"""Models that accelerate spread over memory and disk: what is captured, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from byte_llama import byte_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import graphprune as gp
from graphprune.errors import CaptureError

X = torch.linspace(-1, 1, 8).view(2, 4)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()


def state(model: nn.Module) -> dict[str, Any]:
    """What a capture must leave: each tensor, and how each module is called."""
    tensors = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    return tensors | {f"{n} called": vars(m).get("forward") for n, m in model.named_modules()}


@pytest.mark.parametrize("kept", ["in memory", "on disk"])
def test_what_was_offloaded_is_captured(kept: str, tmp_path: Path) -> None:
    model = plain()
    device = torch.device("cpu")
    if kept == "in memory":
        cpu_offload(model, device, offload_buffers=True)
    else:
        disk_offload(model, tmp_path, device)
    before = state(model)
    program = gp.capture(model, (X,))
    assert state(model) == before and model[0].weight.is_meta
    assert list(program.weights) == list(gp.capture(plain(), (X,)).weights)
    assert torch.equal(*program(X).values(), model(X))


def test_weights_come_from_the_disk_and_tied_ones_stay_one(tmp_path: Path) -> None:
    byte_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.layers.0", "model.norm", "model.rotary_emb"], "cpu")
    places |= dict.fromkeys(["model.embed_tokens", "model.layers.1", "lm_head"], "disk")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    before = state(model)
    program = gp.capture(model)
    assert state(model) == before and model.lm_head.weight.is_meta
    assert program.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    ids = torch.arange(10).view(2, 5)
    assert torch.equal(program(input_ids=ids)["logits"], model(input_ids=ids).logits)


def test_ties_that_were_offloaded_one_by_one_are_found(tmp_path: Path) -> None:
    model = disk_offload(byte_llama(tie_word_embeddings=True), tmp_path, torch.device("cpu"))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert gp.capture(model).aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_program_computes_where_its_model_did() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    cpu_offload(model, torch.device("cuda", 0))
    assert gp.capture(model, (X,)).device == torch.device("cuda", 0)


def test_a_hook_that_may_change_what_is_computed_is_refused() -> None:
    class Doubles(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = plain()
    add_hook_to_module(model[3], Doubles())
    with pytest.raises(CaptureError, match=r"^3 is called through a hook .*\(Doubles\)"):
        gp.capture(model, (X,))


def test_what_a_module_was_called_by_before_the_hooks_counts() -> None:
    model = plain()
    model[3].forward = lambda x: nn.functional.linear(x, model[3].weight)
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(*gp.capture(model, (X,))(X).values(), model(X))
