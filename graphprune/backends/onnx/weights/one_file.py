"""The external data of models that lie beside each other, in one file: what they share is once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

DATA = "model.onnx.data"
"""Its name, beside the models."""


def in_one_file(models: Sequence[Path]) -> None:
    """Let `models`, whose external data lie in files of their own, read one, in place.

    Two decoders hold the same weights, and an encoder an embedding that is the decoder's too. What
    has the same bytes is written once, whatever it is called and of whatever shape.
    """
    import onnx_ir

    folder = models[0].parent
    loaded = {path: onnx_ir.load(path) for path in models}
    alike: dict[bytes, list[onnx_ir.Value]] = {}
    for model in loaded.values():
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, onnx_ir.ExternalTensor):
                digest = hashlib.blake2b(value.const_value.tobytes()).digest()
                alike.setdefault(digest, []).append(value)
    if not alike:
        return
    own = {folder / value.const_value.location for values in alike.values() for value in values}  # type: ignore[union-attr]
    written = onnx_ir.external_data.convert_tensors_to_external(
        [values[0].const_value for values in alike.values()],  # type: ignore[misc]
        folder,
        DATA,
        alignment=4096,
    )
    for tensor, values in zip(written, alike.values(), strict=True):
        for value in values:
            value.const_value = placed_at(tensor, value)
    for path, model in loaded.items():
        onnx_ir.save(model, path)
    for path in own:
        path.unlink()


def placed_at(tensor: Any, value: onnx_ir.Value) -> onnx_ir.ExternalTensor:
    """Return what `value` holds: the bytes of `tensor`, in the shape of its own."""
    import onnx_ir

    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert value.shape is not None and value.dtype is not None
    return onnx_ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        value.dtype,
        shape=value.shape,
        name=str(value.name),
        base_dir=tensor.base_dir,
    )
