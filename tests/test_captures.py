"""Tests share a graph where a model would be captured to the same one, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import graphprune as gp


def bert(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = tf.BertConfig(vocab_size=31, num_hidden_layers=1, **{**sizes, **changes})
    return tf.BertForMaskedLM(config).eval()


def test_models_that_agree_share_a_graph_and_keep_their_weights() -> None:
    one, other = bert(), bert()
    first, second = gp.capture(one), gp.capture(other)
    assert first.graph_module is second.graph_module
    assert second.source is not None and second.source.config is other.config
    for model, program in ((one, first), (other, second)):
        for name, parameter in model.named_parameters():
            assert program.weight(name).data_ptr() == parameter.data_ptr()
    ids = torch.arange(6).reshape(2, 3)
    expected = other(input_ids=ids).logits
    assert torch.allclose(second(input_ids=ids)["logits"], expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{"intermediate_size": 20}, {"layer_norm_eps": 1e-3}])
def test_a_model_that_differs_is_captured(changes: dict[str, Any]) -> None:
    assert gp.capture(bert(**changes)).graph_module is not gp.capture(bert()).graph_module


def test_a_model_whose_code_was_replaced_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gp.capture(bert())
    layer = tf.models.bert.modeling_bert.BertIntermediate
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda module, x: forward(module, x) * 2)
    assert gp.capture(bert()).graph_module is not before.graph_module


@pytest.mark.captures_anew
def test_tests_of_capture_get_the_real_thing() -> None:
    assert gp.capture(bert()).graph_module is not gp.capture(bert()).graph_module
