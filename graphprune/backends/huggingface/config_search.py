"""Which config makes a transformers model of given sizes: found by search, without model names.

What a field of a config means is not looked up but measured: the model is built on the meta device
with the field changed, and the sizes that follow it are its meaning. Where the sizes that a program
has differ from those that its config gives, fields are solved for, one after the other, until the
model built from the config has exactly the program's sizes. More than one config may; whoever asks
takes them in turn until one computes the same (`graphprune.backends.huggingface.choose_form`).
"""

from __future__ import annotations

import copy
import heapq
import itertools
import json
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from torch import nn

from graphprune.backends.huggingface.model import empty_model
from graphprune.errors import last_line
from graphprune.ir.program import Program
from graphprune.plan.steps import WeightDim

Changes = dict[str, Any]
"""Dotted path of a config field (a list's element by its index) -> its new value."""

Sizes = dict[str, tuple[int, ...]]
"""Name of a weight -> its shape."""

IMPLICIT = ("head_dim", "d_kv", "kv_channels", "attention_head_size", "ffn_dim", "n_inner")
"""Fields that many models read where a config has them, and otherwise derive from other fields."""

OURS = ("auto_map", "graphprune", "per_layer_config", "allow_global_per_layer_attribute_access")
"""Fields that are written anew for every program; all but the first where there is `graphprune`."""

_BUDGET = 400


class Builder:
    """Builds one model class on the meta device from variations of one config.

    Parameters
    ----------
    config
        The transformers config; never edited.
    model_class
        The transformers class.
    checked
        Whether a variation goes through the config class's own validation, as it will when it is
        read from a file. The config of a single layer never does.
    """

    def __init__(self, config: Any, model_class: type, *, checked: bool = True) -> None:
        self.model_class = model_class
        self.checked = checked
        self.failure = ""
        self._source = config
        self._fields: dict[str, Any] = config.to_dict()
        for name in OURS if "graphprune" in self._fields else OURS[:1]:
            self._fields.pop(name, None)
        fields = json.dumps(self._fields, sort_keys=True, default=repr)
        classes: tuple[Any, Any] = (type(config), model_class)
        self._known = _known_sizes(*classes, fields, checked)

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields of the config as they are stored, those of inner configs as dicts."""
        return self._fields

    def unchecked(self) -> Builder:
        """Return a builder of the same models whose configs are not validated."""
        return Builder(self._source, self.model_class, checked=False)

    def config(self, changes: Mapping[str, Any]) -> Any:
        """Return a new config with `changes`."""
        if self.checked:
            fields = copy.deepcopy(self._fields)
            for path, value in changes.items():
                put(fields, path, value)
            return type(self._source).from_dict(fields)
        config = type(self._source).from_dict(copy.deepcopy(self._fields))
        for path, value in changes.items():
            put(config, path, value)
        return config

    def model(self, changes: Mapping[str, Any]) -> nn.Module:
        """Return the model of the config with `changes`, on the meta device."""
        model: nn.Module = empty_model(self.config(changes), self.model_class)
        return model

    def sizes(self, changes: Mapping[str, Any]) -> Sizes | None:
        """Return the shapes of that model's weights and buffers; None where it cannot be built."""
        key = _frozen(changes)
        if key not in self._known:
            try:
                self._known[key] = sizes_of(self.model(changes))
            except Exception as error:  # noqa: BLE001 - model code may refuse sizes in any way
                # Arithmetic that fails within a model says nothing of the sizes that it fails on.
                sizes = ", ".join(f"{path} = {value}" for path, value in changes.items())
                self._known[key] = last_line(error) + (f" (with {sizes})" if sizes else "")
        found = self._known[key]
        if isinstance(found, str):
            self.failure = found
            return None
        return found

    def gives(self, changes: Mapping[str, Any], target: Sizes) -> bool:
        """Return whether the model of the config with `changes` has the sizes `target`."""
        sizes = self.sizes(changes)
        return sizes is not None and all(sizes.get(n) == shape for n, shape in target.items())

    def integers(self) -> dict[str, int]:
        """Every positive integer field, those of inner configs and of lists among them."""
        return {
            path: value
            for path, value in self._leaves(self._fields, self._source)
            if type(value) is int and value > 0
        }

    def floats(self) -> dict[str, float]:
        """Every float field."""
        leaves = self._leaves(self._fields, self._source)
        return {path: value for path, value in leaves if type(value) is float}

    def unset(self) -> list[str]:
        """Fields that are None, and well-known ones that are absent."""
        leaves = dict(self._leaves(self._fields, self._source))
        empty = [path for path, value in leaves.items() if value is None]
        first = [path for path in empty if path.rpartition(".")[2] in IMPLICIT]
        absent = [name for name in IMPLICIT if not hasattr(self._source, name)]
        return [*first, *absent, *(path for path in empty if path not in first)]

    def _leaves(self, fields: Any, config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        inner = getattr(config, "sub_configs", {})
        for name, value in fields.items():
            if name in inner and isinstance(value, dict):
                yield from self._leaves(value, getattr(config, name), f"{prefix}{name}.")
            elif isinstance(value, list | tuple) and all(type(item) is int for item in value):
                for index, item in enumerate(value):
                    yield f"{prefix}{name}.{index}", item
            elif not isinstance(value, dict | list | tuple):
                yield f"{prefix}{name}", value


@lru_cache(maxsize=8)
def _known_sizes(
    config_class: Hashable, model_class: Hashable, fields: str, checked: bool
) -> dict[tuple[tuple[str, Any], ...], Sizes | str]:
    """Return what builders of the same models share: changes -> sizes, or why there are none.

    A pipeline asks for the form of its result more than once, and building is the slow part.
    """
    return {}


def put(target: Any, path: str, value: Any) -> None:
    """Set the field at a dotted path of a config, or of the nested dicts that one is stored as."""
    *parents, last = path.split(".")
    for name in parents:
        target = target[_key(target, name)] if _holds(target) else getattr(target, name)
    if _holds(target):
        target[_key(target, last)] = value
    else:
        setattr(target, last, value)


def _holds(target: Any) -> bool:
    return isinstance(target, dict | list)


def _key(target: Any, name: str) -> Any:
    return int(name) if isinstance(target, list) else name


def sizes_of(model: nn.Module) -> Sizes:
    """Return the shape of every parameter and buffer, tied ones under each of their names."""
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: tuple(tensor.shape) for name, tensor in named}


def needed_sizes(program: Program, *, derived: bool) -> Sizes:
    """Return the shapes that a model must have to hold the weights of `program`.

    `derived` says whether those of buffers that it computes from its config count, where they are
    used.
    """
    return {
        name: tuple(program.weights[name].shape)
        for name, node in program.weight_nodes()
        if program.kinds[name] in ("parameter", "buffer")
        or (derived and program.kinds[name] == "derived" and node.users)
    }


class Search:
    """Configs whose model has the sizes of `target`.

    Parameters
    ----------
    builder
        Builds the variations.
    target
        The sizes to reach; names left out may have any size.
    base
        Changes that are made in any case.
    unit_sizes
        Sizes of the units in a dimension, such as heads and their width: more values to try.
    """

    def __init__(
        self,
        builder: Builder,
        target: Sizes,
        base: Mapping[str, Any],
        unit_sizes: Callable[[WeightDim], Collection[int]],
    ) -> None:
        self.builder = builder
        self.target = target
        self.base = dict(base)
        self.unit_sizes = unit_sizes
        self.reason = ""
        self._left = _BUDGET

    def solutions(self, *, unset_as_well: bool = True) -> Iterator[Changes]:
        """Every config found, the likeliest first; `reason` says why there is no (other) one.

        `unset_as_well` says whether fields that are not set are tried even where others will do.
        """
        missing = self.missing(self.base)
        if missing is None:
            self.reason = self._misfit()
            return
        if not missing:
            yield dict(self.base)
            return
        seen: list[Changes] = []
        integers = self.builder.integers()
        implicit: Changes = {}
        for attempt in ("fields", "implicit"):
            if attempt == "implicit":
                if seen and not unset_as_well:
                    return
                implicit = self._implicit(missing, integers)
                if not implicit:
                    return
                integers = integers | implicit
            for changes in self._from({**self.base, **implicit}, integers, missing):
                changes = self._without_idle(changes, implicit)
                if changes not in seen:
                    seen.append(changes)
                    yield changes

    def _without_idle(self, changes: Changes, implicit: Changes) -> Changes:
        """Return `changes` without the unset fields that need not be set."""
        for path, value in implicit.items():
            fewer = {p: v for p, v in changes.items() if p != path}
            if (
                changes[path] == value
                and not self.missing(fewer)
                and self.missing(fewer) is not None
            ):
                changes = fewer
        return changes

    def missing(self, changes: Mapping[str, Any]) -> dict[WeightDim, tuple[int, int]] | None:
        """Return the sizes that differ: (now, wanted) by dimension; None for no such model."""
        sizes = self.builder.sizes(changes)
        if sizes is None or any(len(sizes.get(n, ())) != len(s) for n, s in self.target.items()):
            return None
        return {
            (name, dim): (now, then)
            for name, wanted in self.target.items()
            for dim, (now, then) in enumerate(zip(sizes[name], wanted, strict=True))
            if now != then
        }

    def _misfit(self) -> str:
        """Say why the model to start from has no such weights at all."""
        sizes = self.builder.sizes(self.base)
        if sizes is None:
            return f"no model can be built: {self.builder.failure}"
        other = ((n, len(s)) for n, s in self.target.items() if len(sizes.get(n, ())) != len(s))
        name, dims = next(other)
        return f"the model has no weight {name} of {dims} dimensions"

    def _from(
        self, start: Changes, fields: Mapping[str, int], missing: Mapping[WeightDim, Any]
    ) -> Iterator[Changes]:
        """Best first: the fewer sizes a variation leaves wrong, the sooner it is varied further."""
        effects = self._effects(start, fields)
        if reason := self._conflict(effects, missing):
            self.reason = reason
            return
        relevant = {
            path: fields[path]
            for path, effect in effects.items()
            if not missing.keys().isdisjoint(effect)
        }
        order = itertools.count()
        queue = [(len(missing), 0, next(order), start)]
        nearest, visited = queue[0], {_frozen(start)}
        while queue and self._left > 0:
            wrong, changed, _, changes = popped = heapq.heappop(queue)
            nearest = min(nearest, popped)
            if not wrong:
                yield changes
                continue
            for path, value in self._moves(changes, relevant):
                varied = {**changes, path: value}
                if _frozen(varied) in visited:
                    continue
                visited.add(_frozen(varied))
                self._left -= 1
                left = self.missing(varied)
                if left is not None and len(left) <= wrong:
                    heapq.heappush(queue, (len(left), changed + 1, next(order), varied))
        left = self.missing(nearest[-1])
        if left:
            self.reason = self.reason or self._unmet(next(iter(left)), missing, effects)

    def _unmet(
        self,
        at: WeightDim,
        missing: Mapping[WeightDim, tuple[int, int]],
        effects: Mapping[str, Mapping[WeightDim, Fraction]],
    ) -> str:
        """Name a size that was not reached, and one that goes with it but should not."""
        fields = [path for path, effect in effects.items() if at in effect]
        if not fields:
            return f"no config fields give {self._wanted(at)}"
        pairs = (
            other
            for path in fields
            for other in effects[path]
            if (other in missing) != (at in missing)
        )
        also = [f" and {self._wanted(other)}" for other in itertools.islice(pairs, 1)]
        return "".join([f"no values of {' and '.join(fields)} give {self._wanted(at)}", *also])

    def _wanted(self, at: WeightDim) -> str:
        name, dim = at
        return f"dimension {dim} of {name} the size {self.target[name][dim]}"

    def _moves(self, changes: Changes, fields: Mapping[str, int]) -> list[tuple[str, int]]:
        """Values that would set some of the wrong sizes right, those that right most first."""
        missing = self.missing(changes) or {}
        votes: dict[tuple[str, int], int] = {}
        for path, effect in self._effects(changes, fields).items():
            now = changes.get(path, fields[path])
            units: set[int] = set()
            for at, slope in effect.items():
                if at not in missing:
                    continue
                size, wanted = missing[at]
                value = now + Fraction(wanted - size) / slope
                if value.denominator == 1 and value > 0:
                    key = (path, int(value))
                    votes[key] = votes.get(key, 0) + 1
                units.update(self.unit_sizes(at))
            for unit in units - {now}:
                votes.setdefault((path, unit), 0)
        return sorted(votes, key=lambda move: -votes[move])

    def _effects(
        self, changes: Changes, fields: Mapping[str, int]
    ) -> dict[str, dict[WeightDim, Fraction]]:
        """Field -> the dimensions whose size follows it, and by how much per unit of the field."""
        before = self.builder.sizes(changes)
        found: dict[str, dict[WeightDim, Fraction]] = {}
        if before is None:
            return found
        for path, value in fields.items():
            now = changes.get(path, value)
            for other in (2 * now, now + 1, now // 2):
                after = self.builder.sizes({**changes, path: other}) if other > 0 else None
                if after is None:
                    continue
                # Other weights may come and go with a field: experts that are modules do.
                effect = {
                    (name, dim): Fraction(new - old, other - now)
                    for name in self.target
                    if name in before and name in after
                    for dim, (old, new) in enumerate(zip(before[name], after[name], strict=False))
                    if old != new
                }
                if effect:
                    found[path] = effect
                    break
        return found

    def _conflict(
        self,
        effects: Mapping[str, Mapping[WeightDim, Fraction]],
        missing: Mapping[WeightDim, tuple[int, int]],
    ) -> str:
        """Name two dimensions that no field tells apart and that want different sizes."""
        alike: dict[Any, tuple[int, WeightDim]] = {}
        # A size that is wrong comes first, so that the words name it.
        dims = [(name, dim) for name, shape in self.target.items() for dim in range(len(shape))]
        for at in sorted(dims, key=lambda at: at not in missing):
            name, dim = at
            wanted = self.target[name][dim]
            now = missing[at][0] if at in missing else wanted
            followed = tuple((path, e[at]) for path, e in effects.items() if at in e)
            if not followed:
                if at in missing:
                    return (
                        f"no config field sets dimension {dim} of {name} to {wanted} (it was {now})"
                    )
                continue
            other, where = alike.setdefault((now, followed), (wanted, at))
            if other != wanted:
                names = " and ".join(path for path, _ in followed)
                return f"{names} cannot give {self._wanted(where)} and {self._wanted(at)}"
        return ""

    def _implicit(
        self, missing: Mapping[WeightDim, tuple[int, int]], fields: Mapping[str, int]
    ) -> Changes:
        """Unset fields that sizes follow, with the values that they stand for."""
        before = self.builder.sizes(self.base)
        wrong = {now for now, _ in missing.values()}
        counts = {self.base.get(path, value) for path, value in fields.items()}
        values = sorted({size // n for size in wrong for n in counts | {1} if size % n == 0} - {1})
        found: Changes = {}
        for path in self.builder.unset():
            for tried, value in enumerate(values):
                changes = {**self.base, **found, path: value}
                if self.builder.sizes(changes) != before:
                    continue
                if self._effects(changes, {path: value}):
                    found[path] = value
                    break
                if tried >= 2:
                    break
        return found


def _frozen(changes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    plain = {path: repr(v) if isinstance(v, list) else v for path, v in changes.items()}
    return tuple(sorted(plain.items()))
