"""Tensors as files need them: a digest of what they hold, storage of their own, names of types."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Return a digest of the names, types, shapes and values of tensors."""
    found = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` as safetensors wants them: contiguous, none in the storage of another."""
    seen: set[int] = set()
    result = {}
    for name, each in tensors.items():
        tensor = each.detach().contiguous()
        start = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if start and start in seen else tensor
        seen.add(start)
    return result


def type_name(dtype: torch.dtype) -> str:
    """Return an element type's name, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def floating_type(given: object) -> torch.dtype | None:
    """Return the floating type that `given` is or names, as "float16"; None where it is none."""
    found = getattr(torch, given, None) if isinstance(given, str) else given
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None
