"""The modeling file: builds a model from the field ``graphprune`` of its config.

transformers has a field for layers that differ, ``per_layer_config``, but as of 5.23 its models are
not built from it. So the sizes of each layer, and the modules that it lacks, stand in a field of
our own, which the modeling file reads; ``per_layer_config`` repeats them where it can say all: for
one list of layers, by fields of the config itself, and without numbers or shapes that no field
sets. Reading such a field of the whole config raises in transformers unless the config allows it,
so it does, and the modeling file takes the list out of the config before a model is built.

A layer that lacks its attention writes nothing into its place in the KV cache. transformers asks
the first place for the length of the text before, unless that place is one of its ``DummyLayer``;
so the modeling file puts one there.
"""

from __future__ import annotations

import linecache
import sys
from types import ModuleType
from typing import Any

FILE = "modeling_graphprune.py"

_TEXT = '''\
"""A pruned {base}: some of its sizes are its own. Needs torch and transformers only.

Written by graphprune. The field "graphprune" of the config says what differs: "layers" gives, for
the path of a layer, the config fields that it is built from; "absent" says of modules that are not
there what calling them gives; "uncached" lists the layers that write nothing into the KV cache;
"shapes" gives weights whose sizes no field sets, "attributes" numbers of modules, and "buffers" the
values of buffers that the model would otherwise compute from its sizes.
"""

import copy
import re

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer
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


def _leave_out_before(module, args, kwargs):
    for value in (*args, *kwargs.values()):
        _leave_out(value, module._uncached)


def _leave_out_after(module, args, output):
    for value in output.values() if isinstance(output, dict) else output:
        _leave_out(value, module._uncached)


def _leave_out(value, uncached):
    """Let the other layers of a cache tell how long the text before is."""
    cache = getattr(value, "self_attention_cache", value)
    if isinstance(cache, Cache):
        for at in uncached:
            if at < len(cache.layers):
                cache.layers[at] = DummyLayer()


class _Absent(torch.nn.Module):
    """In the place of a module that is not there: returns zeros, or what it is given."""

    def __init__(self, gives):
        super().__init__()
        self.gives = gives

    def forward(self, *args, **kwargs):
        def value(entry):
            if entry is None:
                return None
            ((kind, key),) = entry.items()
            given = kwargs[key] if isinstance(key, str) else args[key]
            return torch.zeros_like(given) if kind == "zeros_like" else given

        if isinstance(self.gives, list):
            return tuple(value(entry) for entry in self.gives)
        return value(self.gives)


class Pruned{base}({base}):
    """A {base} in which each layer is built from its own sizes, and modules may be absent."""

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
        self._gone = []
        for path, gives in changes.get("absent", {{}}).items():
            name, _ = next(self.get_submodule(path).named_parameters())
            self._gone.append(f"{{path}}.{{name}}")
            self.set_submodule(path, _Absent(gives))
        ignored = {{f"^{{re.escape(name)}}$" for name in self._gone}}
        ignored.update(self._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = ignored
        if changes.get("uncached"):
            for module in self.modules():
                if isinstance(module, PreTrainedModel):
                    module.register_forward_pre_hook(_leave_out_before, with_kwargs=True)
                    module.register_forward_hook(_leave_out_after)
                    module._uncached = changes["uncached"]
        for path, shape in changes.get("shapes", {{}}).items():
            self._resize(path, shape)
        for path, attributes in changes.get("attributes", {{}}).items():
            for name, value in attributes.items():
                value = tuple(value) if isinstance(value, list) else value
                setattr(self.get_submodule(path), name, value)
        self._set_buffers()

    def empty_weights(self):
        """What is stored of absent modules, so that no other class makes up weights for them."""
        return {{name: torch.empty(0) for name in self._gone}}

    def save_pretrained(self, *args, state_dict=None, **kwargs):
        state = self.state_dict() if state_dict is None else state_dict
        return super().save_pretrained(
            *args, state_dict={{**state, **self.empty_weights()}}, **kwargs
        )

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
