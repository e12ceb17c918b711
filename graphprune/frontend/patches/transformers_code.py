"""What of transformers 5.23 an export cannot follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from graphprune.frontend.example_inputs import configs


@contextlib.contextmanager
def broadcast_masks() -> Iterator[list[Any]]:
    """Let masks that transformers makes with `vmap` be made by broadcasting, as its others are.

    A graph cannot be read through `vmap`. A mask is a function of four indices, which may be called
    on all of them at once where each element depends on its own indices alone; capture compares
    outputs to find out whether it does. Yields the functions that were broadcast.
    """
    from transformers import masking_utils

    before = masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex
    seen: list[Any] = []

    def broadcast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mask(*indices: Tensor) -> Tensor:
            seen.append(function)
            made = function(*masking_utils._non_vmap_expansion_sdpa(*indices))
            return made.expand([index.shape[0] for index in indices])

        return mask

    masking_utils._vmap_expansion_sdpa = broadcast
    masking_utils.TransformGetItemToIndex = contextlib.nullcontext  # it serves `vmap` alone
    try:
        yield seen
    finally:
        masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex = before


@contextlib.contextmanager
def without_pad_token(config: Any) -> Iterator[None]:
    """Let no model look for padding in its ids, which it cannot on the meta device."""
    token = getattr(config, "pad_token_id", None)
    if token is not None:
        with contextlib.suppress(Exception):  # some configs insist on one
            config.pad_token_id = None
    try:
        yield
    finally:
        if token is not None:
            config.pad_token_id = token


@contextlib.contextmanager
def without_caches(model: Any) -> Iterator[None]:
    """Let no state be kept for later calls, for which convolutions pad texts below their kernel."""
    switched = [c for c in configs(model.config) if getattr(c, "use_cache", False)]
    for config in switched:
        config.use_cache = False
    try:
        yield
    finally:
        for config in switched:
            config.use_cache = True


@contextlib.contextmanager
def batched_experts(model: Any) -> Iterator[None]:
    """Let packed experts run as batched products, which every back end can express."""
    switched = [c for c in configs(model.config) if hasattr(c, "_experts_implementation")]
    before = [c._experts_implementation for c in switched]
    for config in switched:
        config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        for config, value in zip(switched, before, strict=True):
            config._experts_implementation = value
