"""A length as chunks, of which there are always several."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def padded(value: Tensor, dim: int, size: int) -> Tensor:
    """Append zeros along `dim`, counted from the front, up to whole chunks and one more.

    What is traced takes a number of chunks that is one for a constant.
    """
    length = value.shape[dim]
    whole = ((length + size - 1) // size + 1) * size
    return F.pad(value, (0, 0) * (value.ndim - 1 - dim) + (0, whole - length))


def in_chunks(value: Tensor, dim: int, size: int) -> Tensor:
    """Return `value` padded along `dim`, and that split into chunks and places."""
    return padded(value, dim, size).unflatten(dim, (-1, size))
