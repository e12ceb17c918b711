"""Three rows that tiny encoder-decoders are given, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as tf
from torch import Tensor


def inputs_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(3, 4, 20, generator=generator)}
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(3, 53, (3, 7), generator=generator), "attention_mask": mask}


def expected(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> list[list[int]]:
    """The new tokens of transformers, each row up to what ends it."""
    found = tf.GenerationMixin.generate(model, **inputs, do_sample=False, **options)
    rows = []
    for row in found[:, 1:].tolist():
        ends = [at for at, token in enumerate(row) if token == model.config.eos_token_id]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows
