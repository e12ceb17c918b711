"""Writing safetensors files tensor by tensor: none is held but the one that is being written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from graphprune.weights.deferred import made
from graphprune.weights.files import NAMES
from graphprune.weights.placement import memory_of

SHARD_SIZE = "5GB"
"""How large a file of weights may be, by default."""

Advance = Callable[[int], object]
"""Told of bytes that have been written."""


def write_file(
    tensors: Mapping[str, Tensor], path: Path, advance: Advance = lambda count: None
) -> None:
    """Write a safetensors file, in the order of `tensors`.

    It gets its name when it is complete; one that is there already and has this header is kept.

    Parameters
    ----------
    tensors
        By name; deferred ones are made one at a time.
    path
        The file.
    advance
        Told of bytes that have been written.
    """
    ordered = dict(sorted(tensors.items(), key=lambda each: -each[1].itemsize))  # for alignment
    header = _header(ordered)
    if _is_complete(path, header, ordered):
        advance(_bytes(ordered))
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(header)
            for tensor in ordered.values():
                stream.write(data_of(tensor))
                advance(tensor.nbytes)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_shards(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    shard_size: str | int = SHARD_SIZE,
    track: Callable[[int], Advance] | None = None,
) -> list[str]:
    """Write ``model.safetensors``, or shards of it with an index, in the order of `tensors`.

    Files that are complete are kept, so that writing goes on where it ended.

    Parameters
    ----------
    tensors
        By name; deferred ones are made one at a time.
    folder
        Where to write.
    shard_size
        The most bytes of a file that holds more than one tensor, as a number or as "5GB".
    track
        Told of all bytes that there are to write, it returns what is told of those written.

    Returns
    -------
    list of str
        The names of the files.

    Raises
    ------
    UsageError
        When `shard_size` is no size.
    """
    most = memory_of(shard_size)
    assert most is not None
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    total, count = _bytes(tensors), len(shards)
    advance = track(total) if track is not None else (lambda written: None)
    if count == 1:
        write_file(shards[0], folder / "model.safetensors", advance)
        return ["model.safetensors"]
    names = [f"model-{at:05}-of-{count:05}.safetensors" for at in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(shard, folder / name, advance)
    placed = {held: name for name, shard in zip(names, shards, strict=True) for held in shard}
    parameters = sum(tensor.numel() for tensor in tensors.values())
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(placed.items())),
    }
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, file.name]


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the length of the header and the header, as the format wants them."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind, shape = NAMES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_complete(path: Path, header: bytes, tensors: Mapping[str, Tensor]) -> bool:
    if not path.is_file() or path.stat().st_size != len(header) + _bytes(tensors):
        return False
    with path.open("rb") as stream:
        return stream.read(len(header)) == header


def data_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, which are its own where it is contiguous and on the CPU."""
    whole = made(tensor.detach()).cpu().contiguous().reshape(-1)
    return memoryview(whole.view(torch.uint8).numpy())
