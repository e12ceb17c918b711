"""Models whose layers differ in size, as a config and a small modeling file beside it.

transformers has a field for that, ``per_layer_config``, but as of 5.23 its models are not built
from it. So the sizes of each layer stand in a field of our own, ``graphprune``, which the modeling
file reads; ``per_layer_config`` repeats them where it can say all: for one list of layers, by
fields of the config itself, and without numbers or shapes that no field sets. Reading such a field
of the whole config raises in transformers unless the config allows it, so it does, and the
modeling file takes the list out of the config before a model is built. Its ``skip``, of branches
that a layer lacks, is never written: no model of transformers reads that yet.
"""

from __future__ import annotations

import itertools
import linecache
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from graphprune.backends.huggingface.config_search import Builder, Changes, Search, Sizes
from graphprune.plan.steps import WeightDim

FILE = "modeling_graphprune.py"

_TEXT = '''\
"""A pruned {base}: some of its sizes are its own. Needs torch and transformers only.

Written by graphprune. The field "graphprune" of the config says what differs: "layers" gives, for
the path of a layer, the config fields that it is built from; "shapes" gives weights whose sizes no
field sets, "attributes" numbers of modules, and "buffers" the values of buffers that the model
would otherwise compute from its sizes.
"""

import copy

import torch
from {module} import {base}


class _LayerConfig:
    """The config of the model, with the sizes of one layer in front of it."""

    def __init__(self, config, sizes):
        fields = {{path.rpartition(".")[2]: value for path, value in sizes.items()}}
        self.__dict__.update(fields, _config=config)

    def __getattr__(self, name):
        if name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def _sized(config, sizes):
    """A copy of `config` with the fields at the dotted paths `sizes` changed."""
    config = copy.deepcopy(config)
    for path, value in sizes.items():
        *parents, last = path.split(".")
        target = config
        for name in parents:
            target = target[int(name)] if isinstance(target, list) else getattr(target, name)
        if isinstance(target, list):
            target[int(last)] = value
        else:
            setattr(target, last, value)
    return config


class Pruned{base}({base}):
    """A {base} in which each layer is built from its own sizes."""

    graphprune_base = {base}

    def __init__(self, config, *args, **kwargs):
        # What per_layer_config says is done below; transformers warns of every field in it.
        vars(config).pop("_heterogeneity_spec", None)
        super().__init__(config, *args, **kwargs)
        changes = config.graphprune
        donors = {{}}
        for path, sizes in changes.get("layers", {{}}).items():
            key = tuple(sorted(sizes.items()))
            if key not in donors:
                donors[key] = {base}(_sized(config, sizes), *args, **kwargs)
            self._replace(path, donors[key].get_submodule(path), sizes)
        for path, shape in changes.get("shapes", {{}}).items():
            self._resize(path, shape)
        for path, attributes in changes.get("attributes", {{}}).items():
            for name, value in attributes.items():
                value = tuple(value) if isinstance(value, list) else value
                setattr(self.get_submodule(path), name, value)
        self._set_buffers()

    def _resize(self, path, shape):
        parent, _, name = path.rpartition(".")
        module = self.get_submodule(parent)
        if name in module._buffers:
            module._buffers[name] = module._buffers[name].new_empty(shape)
            return
        old = module._parameters[name]
        new = torch.nn.Parameter(old.new_empty(shape))
        for module in self.modules():
            for name, held in module._parameters.items():
                if held is old:  # tied weights stay one
                    module._parameters[name] = new

    def initialize_weights(self):
        # Buffers that no checkpoint holds are computed here, after everything else is loaded.
        super().initialize_weights()
        self._set_buffers()

    def _set_buffers(self):
        for path, values in self.config.graphprune.get("buffers", {{}}).items():
            parent, _, name = path.rpartition(".")
            buffers = self.get_submodule(parent)._buffers
            old = buffers[name]
            if old.device.type != "meta":
                buffers[name] = torch.tensor(values, dtype=old.dtype, device=old.device)

    def _replace(self, path, layer, sizes):
        # What is set on the model's config later, such as the attention, must reach the layer.
        old = dict(self.get_submodule(path).named_modules())
        for name, module in layer.named_modules():
            if name in old and "config" in vars(module) and "config" in vars(old[name]):
                module.config = _LayerConfig(old[name].config, sizes)
        parent, _, index = path.rpartition(".")
        self.get_submodule(parent)[int(index)] = layer
'''


def modeling_text(base: type) -> str:
    """Return the modeling file for pruned models of class `base`."""
    return _TEXT.format(base=base.__name__, module=base.__module__)


def pruned_class(base: type) -> Any:
    """Return the class that the modeling file defines."""
    name = f"graphprune_modeling_{base.__module__}_{base.__name__}".replace(".", "_")
    if name not in sys.modules:
        module = ModuleType(name)
        text, file = modeling_text(base), f"<{name}>"
        module.__file__ = file
        # transformers reads the source of a model's module to see what it can do.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), module.__dict__)
        # transformers looks classes up by the module that they say they are from.
        sys.modules[name] = module
    return getattr(sys.modules[name], f"Pruned{base.__name__}")


def layer_paths(model: nn.Module) -> list[str]:
    """Return the paths of the repeated layers: the children of the outermost module lists."""
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{p}.") for p in found):
            found += [f"{path}.{name}" for name, _ in module.named_children()]
    return found


class LayerSearch:
    """Configs for the layers of a model, each searched by itself.

    Parameters
    ----------
    builder
        Builds the whole model, with the sizes that all layers share.
    target
        The sizes to reach.
    base, unit_sizes
        As for `Search`.
    """

    def __init__(
        self,
        builder: Builder,
        target: Sizes,
        base: Changes,
        unit_sizes: Callable[[WeightDim], Collection[int]],
    ) -> None:
        self.builder = builder
        self.target = target
        self.base = base
        self.unit_sizes = unit_sizes
        self.paths = layer_paths(builder.model(base))
        self.reason = ""

    def solutions(self) -> Iterator[tuple[Changes, dict[str, Changes]]]:
        """Yield changes for the whole model, and layer path -> what its config changes in that.

        Where one config gives all layers their sizes, it comes first.
        """
        search = Search(self.builder, self.target, self.base, self.unit_sizes)
        for changes in search.solutions():
            yield changes, {}
        outside = {
            name: shape
            for name, shape in self.target.items()
            if not any(name.startswith(f"{path}.") for path in self.paths)
        }
        search = Search(self.builder, outside, self.base, self.unit_sizes)
        for changes in itertools.islice(search.solutions(), 3):
            for layers in self._layers(changes):
                yield changes, layers
        self.reason = self.reason or search.reason

    def _layers(self, base: Mapping[str, Any]) -> Iterator[dict[str, Changes]]:
        """Layer path -> what its config changes in that of the model; others are left out."""
        # The sizes of one layer are never those of a whole model: its validation has no say.
        single = Builder(self.builder.config(base), self.builder.model_class, checked=False)
        sizes = single.sizes({})
        if sizes is None:
            self.reason = f"no model can be built: {single.failure}"
            return
        kinds: dict[Any, list[Changes]] = {}
        kind_of: dict[str, Any] = {}
        for path in self.paths:
            start = len(path) + 1
            names = [name for name in self.target if name.startswith(f"{path}.")]
            kind = tuple((name[start:], sizes.get(name), self.target[name]) for name in names)
            kind_of[path] = kind
            if kind not in kinds:
                search = Search(single, {n: self.target[n] for n in names}, {}, self.unit_sizes)
                kinds[kind] = list(itertools.islice(search.solutions(), 3))
                if not kinds[kind]:
                    self.reason = search.reason
                    return
        for chosen in itertools.product(*kinds.values()):
            changes = dict(zip(kinds, chosen, strict=True))
            layers = {path: changes[kind_of[path]] for path in self.paths}
            yield {path: layer for path, layer in layers.items() if layer}
