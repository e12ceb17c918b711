"""Captures of transformers models that tests share: repeating them would take most of their time.

A graph follows from a model's code, config, structure and sizes, not from its weights. A model that
agrees in all of those with one that was captured before gets that one's graph with its own weights.
Tests of capture itself ask for the real thing (`pytest.mark.captures_anew`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.frontend.torch_export import evaluation_mode
from graphprune.frontend.transformers_models import capture_transformers
from graphprune.ir.program import Program
from graphprune.weights.models import stored_weights

_programs: dict[Hashable, Program] = {}

OF_WEIGHTS = {"example-path", "full-loops"}
"""Notes of graphs that were found right for the weights that they were captured with."""

NAMES = {"_name_or_path", "name_or_path", "architectures"}
"""Fields of configs and models that say where they came from."""


def captured(model: nn.Module) -> Program:
    """Capture `model` as `gp.capture` does, or share what was captured."""
    with evaluation_mode(model):
        return remembered(model)


def remembered(model: nn.Module, cache: bool | None = None, **options: Any) -> Program:
    """Do what `capture_transformers` does, once for all models that agree."""
    key = None if options.get("follow") else _key(model, (cache, bool(options.get("fixed"))))
    if key in _programs:
        return _with_weights_of(_programs[key], model)
    program = capture_transformers(model, cache, **options)
    if key is not None and not {note.kind for note in program.notes} & OF_WEIGHTS:
        _programs[key] = program
    return program


def _with_weights_of(program: Program, model: Any) -> Program:
    tensors = dict(_tensors(model)) | stored_weights(model)
    weights = {
        name: weight if program.kinds[name] == "constant" else tensors[name].detach()
        for name, weight in program.weights.items()
    }
    assert program.source is not None
    source = dataclasses.replace(
        program.source,
        config=model.config,
        model_class=type(model),
        generation_config=getattr(model, "generation_config", None),
    )
    return dataclasses.replace(program, weights=weights, source=source)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _key(model: nn.Module, options: Hashable) -> Hashable | None:
    """Return everything that a graph of `model` follows from; None where that cannot be told."""
    parts: list[Hashable] = [options, torch.export.export]  # tests replace functions
    for name, module in model.named_modules(remove_duplicate=False):
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        parts += [name, type(module), type(module).forward]
        parts += [
            (attribute, _content(value))
            for attribute, value in vars(module).items()
            if not attribute.startswith("_") and attribute not in NAMES
        ]
    first: dict[int, str] = {}
    for name, tensor in _tensors(model):
        sizes = (tuple(tensor.shape), tensor.dtype, tensor.device.type, tensor.requires_grad)
        parts.append((name, first.setdefault(id(tensor), name), sizes))
    return tuple(parts)


def _content(value: Any) -> Hashable:
    """Return what is equal for values that have the same effect on a graph."""
    if hasattr(value, "to_json_string"):  # a config
        implementation = getattr(value, "_attn_implementation", None)
        fields = json.loads(value.to_json_string(use_diff=False))
        told = json.dumps({name: fields[name] for name in fields if name not in NAMES})
        return (type(value), told, implementation)
    if isinstance(value, functools.partial):
        return (value.func, _content(value.args), _content(value.keywords))
    if isinstance(value, list | tuple):
        return (type(value), *map(_content, value))
    if isinstance(value, dict):
        return (dict, *((repr(key), _content(inner)) for key, inner in value.items()))
    if isinstance(value, Tensor):  # becomes a constant
        return id(value) if value.is_meta else value.numpy(force=True).tobytes()
    plain = isinstance(value, int | float | str | torch.dtype) or callable(value)
    return (type(value), value if plain else None)
