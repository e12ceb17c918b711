"""The files of a Hugging Face directory: weights, config, modeling file, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.backends.huggingface.layered import FILE, modeling_text
from graphprune.backends.huggingface.model import quiet
from graphprune.errors import BackendError
from graphprune.io.atomic import share_mode
from graphprune.io.companions import copy_companions
from graphprune.ir.program import Program
from graphprune.ir.provenance import Source
from graphprune.weights.tensors import type_name


def write(program: Program, model: Any, directory: Path, cast: torch.dtype | None) -> None:
    """Write `model`, which holds the weights of `program`, into an empty directory."""
    source = program.source
    assert source is not None
    _place_modeling_file(model, directory)
    # The model was loaded from weights as they are in memory; on disk they take the form in which
    # the checkpoints of its kind are published.
    model._weight_conversions = None
    # Weights that its code would compute, such as positions, may have been cut or trained.
    model._keys_to_ignore_on_save = set()
    with quiet():
        weights = _stored(program, source, model, cast)
        main = cast or _main_type(weights)
        model.save_pretrained(directory, state_dict=weights, max_shard_size="5GB")
    share_mode(directory.glob("*.safetensors"), like=directory / "config.json")
    if main is not None and main is not model.dtype:
        _name_dtype(directory / "config.json", main)
    copy_companions(source.directory, directory)
    write_generation_config(source, directory / "generation_config.json")


def write_config(model: Any, directory: Path) -> None:
    """Write the config of `model`, and the modeling file where its layers are of their own."""
    _place_modeling_file(model, directory)
    with quiet():
        model.config.save_pretrained(directory)


def _place_modeling_file(model: Any, directory: Path) -> None:
    """Write the modeling file where layers are of their own, and name it in the model's config."""
    base = getattr(type(model), "graphprune_base", None)
    if base is not None:
        _name_modeling_file(model.config, base)
        (directory / FILE).write_text(modeling_text(base), encoding="utf-8")


def _stored(
    program: Program, source: Source, model: Any, cast: torch.dtype | None
) -> dict[str, Tensor]:
    """Return every entry of the model's state, tied ones sharing memory, in its type on disk."""
    converted: dict[str, Tensor] = {}
    state = {}
    for name in model.state_dict():
        held = program.aliases.get(name, name)
        if held not in converted:
            weight = program.weight(held).detach().cpu()
            if weight.is_floating_point():
                wanted = cast or _narrower(weight.dtype, source.stored_type(held))
                weight = _converted(held, weight, wanted)
            converted[held] = weight
        state[name] = converted[held]
    return state


def _narrower(own: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """Return the type that a checkpoint stores, where it is narrower than a weight's own."""
    return stored if stored is not None and stored.itemsize < own.itemsize else own


def _converted(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    result = weight.to(dtype)
    if dtype.itemsize == 1 and not torch.equal(result.to(weight.dtype), weight):
        return weight  # such types go with scales, which what was edited has none of
    if not torch.isfinite(result).all() and torch.isfinite(weight).all():
        raise BackendError(
            f"{name} holds values that are too large for {type_name(dtype)}: write another dtype, "
            f"such as {type_name(weight.dtype)}"
        )
    return result


def _main_type(weights: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the floating type of most of the numbers."""
    count = Counter[torch.dtype]()
    for weight in weights.values():
        if weight.is_floating_point():
            count[weight.dtype] += weight.numel()
    return max(count, key=count.__getitem__, default=None)


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    inner = [value for value in config.values() if isinstance(value, dict) and "dtype" in value]
    for part in (config, *inner):
        part["dtype"] = type_name(dtype)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_generation_config(source: Source, path: Path) -> None:
    """Write it as it was, even where transformers would now find fault with what it says."""
    original = source.directory / path.name if source.directory is not None else None
    if original is not None and original.is_file():
        shutil.copyfile(original, path)
    elif source.generation_config is not None:
        text = source.generation_config.to_json_string(use_diff=True)
        path.write_text(text, encoding="utf-8")


def _name_modeling_file(config: Any, base: type) -> None:
    """Let the auto classes that know `base` find the class in the modeling file."""
    from transformers.models.auto import modeling_auto

    target = f"{Path(FILE).stem}.Pruned{base.__name__}"
    config.auto_map = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            known = mapping[type(config)]
            if base in (known if isinstance(known, tuple | list) else (known,)):
                config.auto_map[name] = target
    config.auto_map = config.auto_map or {"AutoModel": target}
    layers = config.graphprune["layers"]
    indices = [path.rpartition(".")[2] for path in layers]
    if len(set(indices)) == len(indices):
        config.graphprune_per_layer_config = dict(zip(indices, layers.values(), strict=True))
