"""The transformers model behind a program: its class, config and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
"""What configs call the longest text, the common name first."""


def declared_length(*configs: Mapping[str, Any]) -> int | None:
    """Return the context length that the first of `configs`, in their order, declares."""
    lengths = (config.get(name) for config in configs for name in _LENGTHS)
    return next((n for n in lengths if type(n) is int and n > 0), None)


@dataclass(frozen=True)
class Source:
    """Where a program came from: what a back end needs to speak the model's own format.

    Parameters
    ----------
    config
        The transformers config object of the model (never edited).
    model_class
        The transformers class.
    directory
        The checkpoint directory, whose tokenizer is copied along; None for a model in memory.
    generation_config
        The model's generation config, if it has one.
    stored_dtype
        Element type of the checkpoint on disk, which may be narrower than the program's.
    stored_apart
        Weights that the checkpoint stores in another floating type, by name.
    """

    config: Any
    model_class: type
    directory: Path | None = None
    generation_config: Any = None
    stored_dtype: torch.dtype | None = None
    stored_apart: Mapping[str, torch.dtype] = field(default_factory=dict)

    def stored_type(self, name: str) -> torch.dtype | None:
        """Return the element type that the weight `name` has on disk, as far as is known."""
        return self.stored_apart.get(name, self.stored_dtype)

    @property
    def context_length(self) -> int | None:
        """The longest text that the config declares, in tokens; None where it does not."""
        config = self.config
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
        return declared_length({} if text is None else vars(text), vars(config))
