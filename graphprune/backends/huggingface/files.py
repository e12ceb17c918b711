"""The files of a Hugging Face directory: weights, config, modeling file, tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from graphprune.backends.huggingface.layers.modeling_file import FILE, modeling_text
from graphprune.backends.huggingface.model import quiet
from graphprune.errors import BackendError
from graphprune.frontend.decoders import cache_layers
from graphprune.frontend.patches.transformers_code import batched_experts
from graphprune.io.companions import copy_companions
from graphprune.ir.program import Program
from graphprune.ir.provenance import Source, layer_of
from graphprune.weights.deferred import Deferred, made
from graphprune.weights.files import is_finite
from graphprune.weights.recorded import recorded_as
from graphprune.weights.tensors import type_name
from graphprune.weights.writing import SHARD_SIZE, Advance, write_shards


def write(
    program: Program,
    model: Any,
    directory: Path,
    cast: torch.dtype | None,
    shard_size: str | int = SHARD_SIZE,
    track: Callable[[int], Advance] | None = None,
) -> None:
    """Write `program` into a directory, as weights of `model`, of which the names are taken.

    Weights are made one at a time. Files of them that are complete are kept.
    """
    source = program.source
    assert source is not None
    _place_modeling_file(model, directory)
    with quiet():
        weights = _stored(program, source, model, cast)
        with TemporaryDirectory(dir=directory) as folder:
            # Everything but weights, of which transformers would hold all.
            model.save_pretrained(folder, state_dict={})
            Path(folder, "model.safetensors").unlink(missing_ok=True)
            for file in Path(folder).iterdir():
                file.replace(directory / file.name)
        _name_layers(model, directory / "config.json")
        published = _as_published(model, weights)
        if hasattr(model, "empty_weights"):
            published |= model.empty_weights()
    write_shards(published, directory, shard_size=shard_size, track=track)
    main = cast or _main_type(weights)
    if main is not None and main is not model.dtype:
        _name_dtype(directory / "config.json", main)
    copy_companions(source.directory, directory)
    write_generation_config(source, directory / "generation_config.json")


def write_config(model: Any, directory: Path) -> None:
    """Write the config of `model`, and the modeling file where its layers are of their own."""
    _place_modeling_file(model, directory)
    with quiet():
        model.config.save_pretrained(directory)
    _name_layers(model, directory / "config.json")


def _place_modeling_file(model: Any, directory: Path) -> None:
    """Write the modeling file where layers are of their own, and name it in the model's config."""
    base = getattr(type(model), "graphprune_base", None)
    if base is not None:
        _name_modeling_file(model.config, base)
        (directory / FILE).write_text(modeling_text(base), encoding="utf-8")


def _as_published(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` of a model by the names, and in the form, of checkpoints of its kind.

    The code that does so in transformers runs on tensors that remember what is done to them; where
    it cannot, all weights are made at once.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # The model was loaded from weights by its own names.
    model._weight_conversions = None
    try:
        recorded = {name: recorded_as(weight) for name, weight in weights.items()}
        found = revert_weight_conversion(model, recorded)
    except Exception:  # noqa: BLE001 - it may do anything with a tensor
        found = revert_weight_conversion(model, {n: made(w) for n, w in weights.items()})
    return dict(found)


def _stored(
    program: Program, source: Source, model: Any, cast: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the weights of the model in their types on disk, a tied one by its main name."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {}
    for name in remove_tied_weights_from_state_dict(model.state_dict(), model):
        held = program.aliases.get(name, name)
        weight = program.weight(held)
        if weight.is_floating_point():
            wanted = cast or _narrower(weight.dtype, source.stored_type(held))
            weight = _converted(held, weight, wanted)
        state[name] = weight
    return state


def _narrower(own: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """Return the type that a checkpoint stores, where it is narrower than a weight's own."""
    return stored if stored is not None and stored.itemsize < own.itemsize else own


def _converted(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` in a type on disk, made where it is used."""
    if weight.dtype is dtype:
        return weight
    if dtype.itemsize == 1 and not torch.equal(weight.to(dtype).to(weight.dtype), made(weight)):
        return weight  # such types go with scales, which what was edited has none of

    def convert() -> Tensor:
        result = made(weight).to(dtype)
        if not is_finite(result) and is_finite(made(weight)):
            raise BackendError(
                f"{name} holds values that are too large for {type_name(dtype)}: write another "
                f"dtype, such as {type_name(weight.dtype)}"
            )
        return result

    return Deferred(convert, weight.shape, dtype, weight.device)


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


def _name_layers(model: Any, path: Path) -> None:
    """Write what differs of layers as transformers does too, where that is meant and loads.

    It knows one list of layers, each by its index, fields of the config itself, and layers without
    attention or without MLP.
    """
    config = model.config
    ours = getattr(config, "graphprune", {})
    layers = ours.get("layers", {})
    if ours.get("absent"):
        skipped = _skipped(model, ours)
        layers = {at: {**layers.get(at, {}), **skipped.get(at, {})} for at in (*layers, *skipped)}
        if not skipped:
            return
    lists = {layer.rpartition(".")[0] for layer in layers}
    nested = config.sub_configs or any("." in name for sizes in layers.values() for name in sizes)
    corrected = any(ours.get(name) for name in ("attributes", "shapes", "buffers"))
    if len(lists) != 1 or nested or corrected:
        return
    if len(model.get_submodule(*lists)) != getattr(config, "num_hidden_layers", None):
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    # Its models are built from one size for all layers, which reading fails without this.
    fields["allow_global_per_layer_attribute_access"] = True
    fields["per_layer_config"] = {at.rpartition(".")[2]: sizes for at, sizes in layers.items()}
    try:
        with quiet():
            type(config).from_dict(copy.deepcopy(fields))
    except Exception:  # noqa: BLE001 - a config may refuse them in any way
        return
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _skipped(model: Any, ours: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return layers that lack a branch, as transformers says it; none where that is not known.

    A layer whose place in the KV cache came to be unused lacks its attention, and one that uses it
    lacks something else.
    """
    layers = {layer_of(path) for path in ours["absent"]}
    uncached = set(ours["uncached"])
    with batched_experts(model):
        cached = {at for at, *_ in cache_layers(model, without_data=True)[0]}
    found = {}
    for layer in sorted(layers):
        at = int(layer.rpartition(".")[2] or -1)
        if at not in uncached | cached:
            return {}
        found[layer] = {"skip": ["attention" if at in uncached else "mlp"]}
    return found
