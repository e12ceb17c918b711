"""Where inputs that are no text come from, such as images: safetensors files of samples."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.errors import CalibrationError, first_line
from graphprune.io.paths import path_of

if TYPE_CHECKING:
    from torch import Tensor

_HELD_OUT = 256
"""Samples that are held out at most."""


def draw_samples(
    source: str | PathLike[str], samples: int | None, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return samples of a safetensors file in random order, and a tenth of it that is held out.

    Parameters
    ----------
    source
        Tensors by name, the first dimension of each the samples.
    samples
        How many; None for all that are not held out.
    seed
        Which samples, and their order.

    Raises
    ------
    CalibrationError
        When the file cannot be read, holds no samples, or fewer than are asked for.
    """
    import torch

    held = _read(path_of(source, CalibrationError))
    counts = {name: len(tensor) if tensor.ndim else 0 for name, tensor in held.items()}
    first, total = next(iter(counts.items()))
    if other := next((name for name, count in counts.items() if count != total), None):
        raise CalibrationError(
            f"{source} holds {total} samples of {first!r} and {counts[other]} of {other!r}"
        )
    spare = min(total // 10, _HELD_OUT)
    wanted = total - spare if samples is None else samples
    if not 1 <= wanted <= total:
        raise CalibrationError(f"{source} holds {total} samples; {wanted} are asked for")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen, held_out = (
        {name: tensor[part] for name, tensor in held.items()}
        for part in (order[:wanted], order[wanted : wanted + spare])
    )
    return chosen, held_out


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CalibrationError(f"{path} is missing")
    try:
        held: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path} is no safetensors file: {first_line(error)}") from error
    if not held:
        raise CalibrationError(f"{path} holds no tensors")
    return held
