"""Configs for the layers of a model, where one config does not give all of them their sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from graphprune.backends.huggingface.config_search import Builder, Changes, Search, Sizes
from graphprune.plan.steps import WeightDim


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
