"""Find the integer attributes of modules that hold sizes, where no config field sets those.

A layer of torch says what it needs by its weights and by the operator that it became in the graph.
Code of a model keeps sizes under names of its own, such as ``num_heads``. Which of those follow a
size that changed is not known from their names: each integer that the code reads and that divides
or equals a size that changed may be one of few numbers, which are tried until the model computes
what the program does.
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import itertools
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from graphprune.backends.huggingface.config_search import needed_sizes, sizes_of
from graphprune.backends.huggingface.trial import Trial
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path
from graphprune.plan.steps import WeightDim

Attributes = dict[str, dict[str, Any]]
"""Path of a module -> attributes of it -> their values."""

_LITERALS = ("groups", "num_groups", "normalized_shape")
_FEW, _RUNS = 3, 100

_Kind = tuple[type, str, int]
"""A class of modules, an attribute and its value."""


def of_layers(program: Program, model: nn.Module, changed: Collection[str]) -> Attributes:
    """Return what layers of torch in `model` keep of their sizes, where it is not what they say.

    Parameters
    ----------
    program
        Gives what weights alone do not, such as the groups of a convolution.
    model
        A model whose weights have their new sizes.
    changed
        The names of the weights that have other sizes than the config gives.
    """
    found: Attributes = {}
    literals = _literals(program)
    parents = {name.rpartition(".")[0] for name in changed}
    for path, module in model.named_modules():
        if path in parents or not module._parameters:
            said = _of_layer(module, literals.get(path, {})).items()
            others = {name: value for name, value in said if getattr(module, name) != value}
            if others:
                found[path] = others
    return found


def _of_layer(module: nn.Module, literals: Mapping[str, Any]) -> dict[str, Any]:
    held = module._parameters.get("weight", getattr(module, "weight", None))  # or parametrized
    weight = tuple(held.shape) if isinstance(held, Tensor) else ()
    if isinstance(module, nn.Linear):
        return {"in_features": weight[1], "out_features": weight[0]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = literals.get("groups", module.groups)
        wide, narrow = ("in", "out") if module.transposed else ("out", "in")
        return {
            f"{wide}_channels": weight[0],
            f"{narrow}_channels": weight[1] * groups,
            "groups": groups,
        }
    if isinstance(module, nn.modules.batchnorm._NormBase):
        mean = module._buffers.get("running_mean")
        size = weight or (tuple(mean.shape) if mean is not None else ())
        return {"num_features": size[0]} if size else {}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = weight or tuple(literals.get("normalized_shape", module.normalized_shape))
        return {"normalized_shape": shape}
    if isinstance(module, nn.GroupNorm):
        groups = {"num_groups": literals.get("num_groups", module.num_groups)}
        return {**groups, "num_channels": weight[0]} if weight else groups
    return {}


def _literals(program: Program) -> dict[str, dict[str, Any]]:
    """Map each module path to the sizes among the literals of the operators that it became."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for node in program.graph.nodes:
        for name, value in arguments_of(node).items():
            if name in _LITERALS:
                found[module_path(node)][name] = value
    return found


def merged(*parts: Mapping[str, Mapping[str, Any]]) -> Attributes:
    """All attributes of `parts`."""
    found: Attributes = {}
    for part in parts:
        for path, attributes in part.items():
            found.setdefault(path, {}).update(attributes)
    return found


@contextlib.contextmanager
def having(model: nn.Module, attributes: Attributes) -> Iterator[None]:
    """`model` with these attributes for a while."""
    before = {
        (path, name): getattr(model.get_submodule(path), name)
        for path, held in attributes.items()
        for name in held
    }
    try:
        for path, name in before:
            setattr(model.get_submodule(path), name, attributes[path][name])
        yield
    finally:
        for (path, name), value in before.items():
            setattr(model.get_submodule(path), name, value)


# -- what the code of a model keeps ---------------------------------------------------------------


class AttributeSearch:
    """Integers that the code of a model reads, tried until the model computes what a program does.

    Parameters
    ----------
    trial
        Of the program to reach.
    before
        The model of the config, with the sizes and the attributes as they were.
    unit_sizes
        The sizes of the units in a dimension, such as heads and their width.
    """

    def __init__(
        self, trial: Trial, before: nn.Module, unit_sizes: Callable[[WeightDim], Collection[int]]
    ) -> None:
        self.trial = trial
        sizes, after = sizes_of(before), needed_sizes(trial.program, derived=False)
        changed: dict[str, list[WeightDim]] = defaultdict(list)
        for name, then in after.items():
            differing = [(name, d) for d, size in enumerate(then) if size != sizes[name][d]]
            for path in _above(name) if differing else ():
                changed[path] += differing
        read = _integers_read(before)
        self._kinds: dict[_Kind, dict[str, list[tuple[bool, int]]]] = defaultdict(dict)
        for path, module in before.named_modules():
            near = next((p for p in (path, *_above(path)) if p in changed), None)
            if near is None or path not in read:
                continue
            dims = {
                (sizes[name][d], after[name][d]): {1, *unit_sizes((name, d))}
                for name, d in changed[near]
            }
            for name, value in read[path].items():
                values = list(itertools.islice(_became(value, dims), _FEW)) if value > 1 else []
                if values:
                    self._kinds[type(module), name, value][path] = values

    def run(self, model: nn.Module, base: Attributes) -> Attributes | None:
        """Return attributes with which `model` computes what the program does, `base` among them.

        Those of one name, class and value change alike in all modules, and no more of them than
        must. None where none was found.
        """
        chosen = self._best_first(model, base)
        if chosen is None:
            return None
        for kind in list(chosen):
            fewer = {other: index for other, index in chosen.items() if other != kind}
            with having(model, merged(base, self._attributes(fewer))):
                if not self.trial.difference(model):
                    chosen = fewer
        return merged(base, self._attributes(chosen))

    def _best_first(self, model: nn.Module, base: Attributes) -> dict[_Kind, int] | None:
        """Try what runs furthest first, and weak guesses after all others."""
        order = itertools.count()
        likely = {kind: 0 for kind in self._kinds if not self._weak(kind, 0)}
        queue: list[tuple[Any, int, dict[_Kind, int]]] = [((0,), next(order), {})]
        heapq.heappush(queue, ((-1,), next(order), likely))
        tried: list[dict[_Kind, int]] = []
        while queue and len(tried) < _RUNS:
            chosen = heapq.heappop(queue)[-1]
            if chosen in tried:
                continue
            tried.append(chosen)
            with having(model, merged(base, self._attributes(chosen))):
                why, done, nearest = _progress(self.trial, model)
            if not why:
                return chosen
            for kind, options in self._kinds.items():
                far = nearest.index(kind[0]) if kind[0] in nearest else len(nearest)
                for index in (*range(max(map(len, options.values()))), None):
                    varied = {other: i for other, i in chosen.items() if other != kind}
                    if index is not None:
                        varied[kind] = index
                    weak = sum(self._weak(k, i) for k, i in varied.items())
                    key = (weak, *(-d for d in done), far, len(varied), index or 0)
                    heapq.heappush(queue, (key, next(order), varied))
        return None

    def _weak(self, kind: _Kind, index: int) -> bool:
        return any(
            weak
            for values in self._kinds[kind].values()
            for weak, _ in values[min(index, len(values) - 1) :][:1]
        )

    def _attributes(self, chosen: Mapping[_Kind, int]) -> Attributes:
        found: Attributes = {}
        for kind, index in chosen.items():
            for path, values in self._kinds[kind].items():
                found.setdefault(path, {})[kind[1]] = values[min(index, len(values) - 1)][1]
        return found


def _integers_read(model: nn.Module) -> dict[str, dict[str, int]]:
    """Map module paths, but for layers of torch, to the integers that the code of each reads."""
    reads = {kind: _read_by(kind) for kind in {type(module) for module in model.modules()}}
    return {
        path: {n: v for n, v in vars(module).items() if type(v) is int and n in reads[type(module)]}
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")
    }


def kept_integers(
    model: nn.Module, before: nn.Module, difference: Callable[[nn.Module], str]
) -> Attributes:
    """Return integers of `before` with which `model` has no `difference` from a program.

    Those of one name and class are kept alike, and those of one alone; none where none would do.
    """
    old, kinds = _integers_read(before), defaultdict[tuple[type, str], Attributes](dict)
    for path, read in _integers_read(model).items():
        for name, value in read.items():
            if old.get(path, {}).get(name, value) != value:
                kinds[type(model.get_submodule(path)), name][path] = {name: old[path][name]}
    for kept in kinds.values():
        with having(model, kept):
            if not difference(model):
                return kept
    return {}


def _progress(trial: Trial, model: nn.Module) -> tuple[str, tuple[int, int], list[type]]:
    """Return what is wrong, how far the model ran, and the classes it was in, innermost first."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1

    with nn.modules.module.register_module_forward_hook(count):
        why, error = trial.compare(model)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)] if error else []
    inside = [
        (type(value), frame.f_lineno)
        for frame in reversed(frames)
        for value in frame.f_locals.values()
        if isinstance(value, nn.Module) and not frame.f_globals["__name__"].startswith("torch.")
    ]
    # One that runs to its end and differs has gone astray, nobody knows where.
    return why, (done, inside[0][1]) if inside else (0, 0), [kind for kind, _ in inside]


def _above(path: str) -> list[str]:
    """Return the paths of the modules around `path`, innermost first, but for the whole model."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _became(
    value: int, dims: Mapping[tuple[int, int], Collection[int]]
) -> Iterator[tuple[bool, int]]:
    """Yield what `value` may have become where dimensions did, and whether that is a weak guess."""
    seen = {value}
    for weak, reading in ((False, _whole), (False, _part), (True, _unit)):
        for (before, after), units in dims.items():
            for found in reading(value, before, after, units):
                if found not in seen:
                    seen.add(found)
                    yield weak, found


def _whole(value: int, before: int, after: int, units: Collection[int]) -> Iterator[int]:
    """Yield the dimension itself."""
    if value == before:
        yield after


def _part(value: int, before: int, after: int, units: Collection[int]) -> Iterator[int]:
    """Yield a factor of it where the other one stayed, or a multiple."""
    rest, odd = divmod(before, value)
    if not odd and after % rest == 0 and after // rest in units:
        yield after // rest
    elif value % before == 0:
        yield value // before * after


def _unit(value: int, before: int, after: int, units: Collection[int]) -> Iterator[int]:
    """Yield a factor of it where the other one changed too."""
    if before % value == 0:
        yield from sorted(u for u in units if u < value and after % u == 0)


def _read_by(kind: type) -> frozenset[str]:
    """Return the attributes that the code of a class reads, but for what only makes its modules."""
    functions = [
        function
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "builtins"))
        for name, function in vars(base).items()
        if name != "__init__"
    ]
    functions += vars(sys.modules[kind.__module__]).values()
    found: set[str] = set()
    for function in functions:
        inner = inspect.unwrap(function) if callable(function) else function
        if isinstance(inner, FunctionType):
            found.update(_names(inner.__code__))
    return frozenset(found)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
