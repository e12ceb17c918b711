"""Read a Hugging Face directory: its files are checked, its model loaded and captured."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from graphprune.backends.huggingface.layered import FILE, modeling_text, pruned_class
from graphprune.backends.huggingface.model import quiet
from graphprune.errors import CheckpointError, first_line
from graphprune.frontend.capture import capture
from graphprune.ir.program import Program

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The floating types of the safetensors format."""

_MOST_HEADER = 100_000_000
"""Bytes: the limit of the safetensors format itself."""


def read(path: Path, *, dtype: str | torch.dtype = "float32", cache: bool | None = None) -> Program:
    """Load and capture the model in the directory `path`, which is only read.

    Parameters
    ----------
    path
        A directory with a config and weights.
    dtype, cache
        As `graphprune.load` takes them.

    Raises
    ------
    CheckpointError
        When a file is missing, cut short or malformed, a weight is missing or holds NaN or
        infinity, or transformers does not know the kind of model.
    CaptureError
        When the model cannot become a graph.
    """
    wanted = _dtype(dtype)
    fields = _read_json(path / "config.json")
    stored, apart = _check_files(path)
    with quiet():
        config = _config(path, fields)
        model_class = _model_class(path, config)
        model = _model(path, config, model_class, wanted or stored or config.dtype)
        _check_finite(path, model)
        program = capture(model, cache=cache)
    assert program.source is not None
    source = dataclasses.replace(
        program.source, directory=path, stored_dtype=stored, stored_apart=apart
    )
    return dataclasses.replace(program, source=source)


def read_structure(path: Path) -> Program:
    """Capture the model in the directory `path` without its weights, to be looked into.

    Parameters
    ----------
    path
        A directory with a config and weights, of which the headers alone are read.

    Raises
    ------
    CheckpointError
        When a file is missing, cut short or malformed, or transformers does not know the kind of
        model.
    CaptureError
        When the model cannot become a graph without its weights.
    """
    fields = _read_json(path / "config.json")
    stored, apart = _check_files(path)
    with quiet():
        config = _config(path, fields)
        model_class = _model_class(path, config)
        make = getattr(model_class, "from_config", None) or model_class._from_config
        with torch.device("meta"):
            model = make(config, dtype=torch.float32)
        program = capture(model)
    assert program.source is not None
    source = dataclasses.replace(
        program.source, directory=path, stored_dtype=stored, stored_apart=apart
    )
    return dataclasses.replace(program, source=source)


def _dtype(given: str | torch.dtype) -> torch.dtype | None:
    """Return the type that `given` is or names; None for "auto"."""
    if given == "auto":
        return None
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype is {given!r}, which names no floating type of torch")
    return found


# -- files --------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds no object")
    return fields


def _check_files(path: Path) -> tuple[torch.dtype | None, dict[str, torch.dtype]]:
    """Refuse weight files that are cut short.

    Returns the floating type that most tensors have, and those of the others by name.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise CheckpointError(f"{index} has no weight_map")
        files = sorted({path / name for name in placed.values()})
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    else:
        if not any(path.glob("pytorch_model*.bin")):
            raise CheckpointError(f"{path} holds no model.safetensors")
        return None, {}
    types = {
        name: _DTYPES[kind]
        for file in files
        for name, (kind, _) in _tensors(file).items()
        if kind in _DTYPES
    }
    if not types:
        return None, {}
    ((most, _),) = Counter(types.values()).most_common(1)
    return most, {name: kind for name, kind in types.items() if kind is not most}


def shapes_of(directory: str | PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the safetensors files of a directory, by name.

    Only headers are read.

    Raises
    ------
    CheckpointError
        When a file is cut short or malformed.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    return {name: shape for file in files for name, (_, shape) in _tensors(file).items()}


def _tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of every tensor in a safetensors file whose header fits its size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER):
                raise CheckpointError(f"{file} is cut short or no safetensors file: {size} bytes")
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
        found = {n: (str(e["dtype"]), tuple(map(int, e["shape"]))) for n, e in tensors.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{file} has no readable safetensors header: {first_line(error)}"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{file} is cut short or damaged: {size} bytes, not {expected}")
    return found


# -- transformers -------------------------------------------------------------------------------


def _config(path: Path, fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # configs validate themselves in many ways
        kind = fields.get("model_type")
        from transformers import CONFIG_MAPPING

        if kind is None:
            raise CheckpointError(f"{path / 'config.json'} names no model_type") from error
        if kind not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{path / 'config.json'}: transformers does not know the model type {kind!r}"
            ) from error
        raise CheckpointError(
            f"{path / 'config.json'} is no valid config: {first_line(error)}"
        ) from error


def _model_class(path: Path, config: Any) -> Any:
    import transformers

    names = getattr(config, "architectures", None) or []
    name = names[0] if names else ""
    if hasattr(config, "graphprune"):
        base = getattr(transformers, name.removeprefix("Pruned"), None)
        file = path / FILE
        if base is None or not file.is_file():
            raise CheckpointError(f"{path} holds no {FILE} for its architecture {name!r}")
        if file.read_text(encoding="utf-8") != modeling_text(base):
            raise CheckpointError(f"{file} is not the file that graphprune writes: it is not run")
        return pruned_class(base)
    if hasattr(transformers, name):
        return getattr(transformers, name)
    if name and hasattr(config, "auto_map"):
        raise CheckpointError(
            f"{path / 'config.json'}: {name} is code that comes with the checkpoint, which is "
            "not run: load it with transformers and give the model to graphprune.capture"
        )
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise CheckpointError(f"{path / 'config.json'}: transformers has no model for {name!r}")


def _model(path: Path, config: Any, model_class: Any, dtype: torch.dtype | None) -> Any:
    try:
        model, info = model_class.from_pretrained(
            path, config=config, dtype=dtype or torch.float32, output_loading_info=True
        )
    except Exception as error:  # readers and model code may refuse in any way
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    if missing := info["missing_keys"]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{path} lacks the weight {min(missing)}{more}")
    return model


def _check_finite(path: Path, model: Any) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            # Unlike isfinite, the extremes need no memory of their own.
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(f"{path}: the weight {name} holds NaN or infinity")
