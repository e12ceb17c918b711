"""Which form of Hugging Face directory a program can take, proven before anything is written.

A config that gives all layers their sizes is tried first, then a config for each layer; each is
proven with the program's own weights, and the first that holds is taken.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from graphprune.analysis.axes import Atom, Axis, Product
from graphprune.analysis.inference import infer
from graphprune.analysis.types import Types
from graphprune.backends.huggingface.attribute_search import (
    AttributeSearch,
    kept_integers,
    merged,
    of_layers,
)
from graphprune.backends.huggingface.config_rules import broken_rule
from graphprune.backends.huggingface.config_search import (
    Builder,
    Changes,
    Search,
    needed_sizes,
)
from graphprune.backends.huggingface.fold_norms import Folded, fold
from graphprune.backends.huggingface.layers.absent import (
    Gives,
    absent_modules,
    absent_weights,
    check_cache,
    uncached_layers,
)
from graphprune.backends.huggingface.layers.layer_search import LayerSearch
from graphprune.backends.huggingface.layers.modeling_file import pruned_class
from graphprune.backends.huggingface.model import (
    difference,
    differing_buffers,
    empty_model,
    graph_of,
    model_of,
    quiet,
)
from graphprune.backends.huggingface.shorter_lists import (
    Kept,
    depth_changes,
    renumbered,
    shortened,
)
from graphprune.backends.huggingface.trial import Trial
from graphprune.errors import BackendError
from graphprune.ir.compare import graph_difference
from graphprune.ir.program import Program
from graphprune.plan.steps import WeightDim

_TRIES = 6
_CHOSEN = "_graphprune_form"


@dataclass(frozen=True)
class CheckpointForm:
    """The form in which a program can be written as a Hugging Face directory.

    Parameters
    ----------
    kind
        ``plain``: `from_pretrained` loads it; ``remote-code``: it does with
        ``trust_remote_code=True``, through a modeling file in the directory; ``none``: no config
        of the model's class gives such a model.
    reason
        Why it is not plain; empty where it is.
    changes
        Dotted config field -> new value.
    layers
        Path of a layer -> its own config fields, where layers differ.
    absent
        Path of a module that is not there -> what calling it gives.
    uncached
        Layers that write nothing into the KV cache, by their place in it.
    shapes
        Path of a weight -> its sizes, where no config field sets them.
    attributes
        Path of a module -> numbers of it that no config field gives, such as an epsilon or a count
        of heads.
    buffers
        Buffers that the model would compute with other values from its config.
    notes
        What else a person should know.
    """

    kind: Literal["plain", "remote-code", "none"]
    reason: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    absent: Mapping[str, Gives] = field(default_factory=dict)
    uncached: tuple[int, ...] = ()
    shapes: Mapping[str, list[int]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    buffers: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChosenForm:
    """The answer, the program with its norms folded, and a model that holds its weights.

    There is no model where there is no way, or no weights.
    """

    form: CheckpointForm
    program: Program
    model: Any = None


def choose_form(program: Program) -> ChosenForm:
    """Find out how `program` can be written, and make the model that proves it.

    The answer is kept with the program, which never changes.
    """
    if _CHOSEN not in program.__dict__:
        program.__dict__[_CHOSEN] = _chosen(program)
    found: ChosenForm = program.__dict__[_CHOSEN]
    return found


def _chosen(program: Program) -> ChosenForm:
    source = program.source
    if source is None:
        why = "it was not captured from a transformers model"
        return ChosenForm(CheckpointForm("none", why), program)
    base_class = getattr(source.model_class, "graphprune_base", source.model_class)
    builder = Builder(source.config, base_class)
    with quiet():
        names = builder.sizes({}) or ()
        kept = shortened(names, {*program.weights, *program.aliases})
        program = renumbered(program, names)
    try:
        folded, norms = fold(program)
    except BackendError as error:
        return ChosenForm(CheckpointForm("none", str(error)), program)
    with quiet():
        return _FormSearch(folded, norms, builder, kept).take()


class _FormSearch:
    """Tries plain configs first, then a config for each layer; keeps the first reason of each."""

    def __init__(
        self, program: Program, norms: tuple[Folded, ...], builder: Builder, kept: Kept
    ) -> None:
        self.program = program
        self.names = {*program.weights, *program.aliases}
        self.kept = kept
        self.norms = norms
        self.builder = builder
        self.base_class = builder.model_class
        self.target = needed_sizes(program, derived=True)
        self._types: Types | None = None
        self.trial = Trial(program)
        self.sizes_only = program.lacks_values
        only = "only sizes were compared: the program has no weights"
        self.notes = (only,) if self.sizes_only else ()

    def take(self) -> ChosenForm:
        reason, bases = "", list(itertools.islice(depth_changes(self.builder, self.kept), _TRIES))
        for base in bases:
            chosen, why = self._plain(base)
            if chosen is not None:
                return chosen
            reason = reason or why
        chosen, other = self._layered(reason, bases[0])
        chosen = chosen or self._resized(reason)
        if chosen is not None:
            return chosen
        return ChosenForm(CheckpointForm("none", other or reason), self.program)

    def _plain(self, base: Changes) -> tuple[ChosenForm | None, str]:
        """Try configs of equal layers; `base` gives the model as many of them."""
        reason = ""
        search = Search(self.builder, self.target, base, self._unit_sizes)
        for changes in itertools.islice(search.solutions(), _TRIES):
            epsilon, why = self._epsilon(changes)
            if epsilon is None:
                reason = reason or why
                continue
            changes = changes | epsilon
            model, why = self._prove(self.builder.config(changes))
            if not why:
                return ChosenForm(
                    CheckpointForm("plain", "", changes, notes=self.notes), self.program, model
                ), ""
            reason = reason or _with(changes, why)
        rule = "" if reason else broken_rule(self.builder, self.target)
        return None, reason or rule or search.reason

    def _layered(self, reason: str, base: Changes) -> tuple[ChosenForm | None, str]:
        if not self.base_class.__module__.startswith("transformers."):
            return None, reason
        search = LayerSearch(
            self.builder, needed_sizes(self.program, derived=False), base, self._unit_sizes
        )
        for changes, layers in itertools.islice(search.solutions(), _TRIES):
            epsilon, _ = self._epsilon(changes)
            changes = changes | (epsilon or {})
            try:
                attributes = {} if epsilon is not None else self._attributes(changes)
            except BackendError as error:
                return None, str(error)
            found = CheckpointForm(
                "remote-code", reason, changes, layers, attributes=attributes, notes=self.notes
            )
            chosen = self._prove_layers(found)
            if chosen is not None:
                return chosen, ""
        return None, search.reason

    def _resized(self, reason: str) -> ChosenForm | None:
        """Try the model of the config as it was, with some weights and numbers of other sizes."""
        if not self.base_class.__module__.startswith("transformers."):
            return None
        before = self.builder.sizes({}) or {}
        after = needed_sizes(self.program, derived=False)
        shapes = {n: list(s) for n, s in after.items() if before.get(n) != s}
        if not shapes or any(len(before.get(n, ())) != len(after[n]) for n in shapes):
            return None
        try:
            found = CheckpointForm(
                "remote-code",
                reason,
                shapes=shapes,
                attributes=self._attributes({}),
                notes=self.notes,
            )
            return self._prove_resized(found)
        except BackendError:
            return None

    def _prove_resized(self, found: CheckpointForm) -> ChosenForm | None:
        if self.sizes_only:
            return ChosenForm(found, self.program)
        found, model = self._with_buffers(self._with_absences(found))
        layers = of_layers(self.program, model, found.shapes)
        before = self._empty_model(CheckpointForm("remote-code", absent=found.absent))
        search = AttributeSearch(self.trial, before, self._unit_sizes)
        attributes = search.run(model, merged(found.attributes, layers))
        if attributes is None:
            return None
        return self._prove_layers(dataclasses.replace(found, attributes=attributes))

    def _prove_layers(self, found: CheckpointForm) -> ChosenForm | None:
        """`found`, completed by buffers and numbers that the model would compute otherwise."""
        if self.sizes_only:
            return ChosenForm(found, self.program)
        try:
            found, model = self._with_buffers(self._with_absences(found))
            if not self._difference(model):
                return ChosenForm(found, self.program, model)
            # What a module computed from its sizes, such as the scale of attention, the program may
            # have kept as it was.
            found = dataclasses.replace(found, attributes=self._as_before(found, model))
            model = self._pruned_model(found)
            if not self._difference(model):
                return ChosenForm(found, self.program, model)
            kept = kept_integers(model, self.builder.model({}), self._difference)
            if not kept:
                return None
            found = dataclasses.replace(found, attributes=merged(found.attributes, kept))
            model = self._pruned_model(found)
            return None if self._difference(model) else ChosenForm(found, self.program, model)
        except BackendError:
            return None

    def _with_absences(self, found: CheckpointForm) -> CheckpointForm:
        """`found` without the modules of which the program has no weights."""
        gone = absent_weights(self._empty_model(found), self.names)
        if not gone:
            return found
        whole = model_of(self.program, self._config(found), pruned_class(self.base_class), gone)
        absent = absent_modules(whole, gone, self.trial.difference)
        why = f"no config says that {next(iter(absent))} is not there"
        found = dataclasses.replace(found, absent=absent, reason=why)
        uncached = uncached_layers(whole, self._pruned_model(found), self.trial)
        found = dataclasses.replace(found, uncached=tuple(uncached))
        check_cache(whole, self._pruned_model(found), self.trial)
        return found

    def _with_buffers(self, found: CheckpointForm) -> tuple[CheckpointForm, Any]:
        """`found` with the buffers that its model would compute otherwise, and the model."""
        model = self._pruned_model(found)
        buffers = {
            name: self.program.weights[name].double().tolist()
            for name in differing_buffers(self.program, model)
        }
        if not buffers:
            return found, model
        found = dataclasses.replace(found, buffers={**found.buffers, **buffers})
        return found, self._pruned_model(found)

    def _pruned_model(self, found: CheckpointForm) -> Any:
        return model_of(self.program, self._config(found), pruned_class(self.base_class))

    def _empty_model(self, found: CheckpointForm) -> Any:
        return empty_model(self._config(found), pruned_class(self.base_class))

    def _config(self, found: CheckpointForm) -> Any:
        config = self.builder.config(found.changes)
        config.graphprune = {
            "layers": found.layers,
            "absent": found.absent,
            "uncached": list(found.uncached),
            "shapes": found.shapes,
            "attributes": found.attributes,
            "buffers": found.buffers,
        }
        return config

    def _as_before(self, found: CheckpointForm, model: Any) -> dict[str, dict[str, float]]:
        before = _numbers(self.builder.model(found.changes if self.kept else {}))
        attributes = {path: dict(inner) for path, inner in found.attributes.items()}
        for (path, name), value in _numbers(model).items():
            old = before.get((path, name), value)
            if old != value and name not in attributes.get(path, {}):
                attributes.setdefault(path, {})[name] = old
        return attributes

    def _prove(self, config: Any) -> tuple[Any, str]:
        if self.sizes_only:
            gone = absent_weights(empty_model(config, self.base_class), self.names)
            return None, f"the checkpoint lacks {min(gone)}" if gone else ""
        try:
            model = model_of(self.program, config, self.base_class)
            if names := differing_buffers(self.program, model):
                why = f"the model would compute {names[0]} from its config, with other values"
                return None, why
            return model, self._difference(model)
        except BackendError as error:
            return None, str(error)

    def _difference(self, model: Any) -> str:
        """Say how `model` differs, in its structure or with the program's own weights."""
        if self.program.stand_ins:
            return graph_difference(self.program, graph_of(model, self.program))
        return self.trial.difference(model) or difference(self.program, model)

    def _unit_sizes(self, at: WeightDim) -> set[int]:
        """Return the sizes of what a dimension is made of: heads, their width, their groups."""
        if self._types is None:
            self._types = infer(self.program)
        name, dim = at
        return set(_parts(self._types.axes.resolve(self._types.weight(name)[dim])))

    # -- epsilons -------------------------------------------------------------------------------

    def _epsilon(self, changes: Changes) -> tuple[Changes | None, str]:
        """Return the config field that gives the folded norms, and no others, their epsilon.

        Epsilons are compared as numbers of modules: they are too small to show in outputs.
        """
        if not self.norms:
            return {}, ""
        try:
            wanted = _flat(self._attributes(changes))
        except BackendError as error:
            return None, str(error)
        before = _numbers(self.builder.model(changes))
        norm = self.norms[0]
        for path, value in self.builder.floats().items():
            if value != norm.before:
                continue
            after = _numbers(self.builder.model({**changes, path: norm.after}))
            changed = {at: v for at, v in after.items() if before.get(at) != v}
            if changed.keys() == wanted.keys() and all(
                math.isclose(changed[at], wanted[at]) for at in wanted
            ):
                return {path: norm.after}, ""
        return None, (
            f"no config field gives {norm.module} the epsilon {norm.after:.3g} (it was "
            f"{norm.before:.3g}) without changing norms that were not pruned"
        )

    def _attributes(self, changes: Changes) -> dict[str, dict[str, float]]:
        """Map module path and attribute to the new epsilon of each folded norm."""
        found: dict[str, dict[str, float]] = {}
        numbers = _numbers(self.builder.model(changes))
        for norm in self.norms:
            names = [
                name
                for (path, name), value in numbers.items()
                if path == norm.module and math.isclose(value, norm.before, rel_tol=1e-9)
            ]
            if not names:
                raise BackendError(f"{norm.module} holds no epsilon that could be {norm.after:.3g}")
            found[norm.module] = dict.fromkeys(names, norm.after)
        return found


def _with(changes: Changes, why: str) -> str:
    """Say of which config it is that its model is not the program, for the reason `why`."""
    fields = ", ".join(f"{path} = {_short(value)}" for path, value in changes.items())
    return f"with {fields} in its config, {why}" if fields else why


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _parts(axis: Axis) -> Iterator[int]:
    yield axis.size
    if isinstance(axis, Product):
        yield from itertools.accumulate((f.size for f in axis.factors), operator.mul)
    if not isinstance(axis, Atom):
        inner = axis.factors if isinstance(axis, Product) else getattr(axis, "terms", ())
        for part in inner:
            yield from _parts(part)


def _numbers(model: nn.Module) -> dict[tuple[str, str], float]:
    """Map (module path, attribute) to its value, for all float attributes of modules."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is float
    }


def _flat(attributes: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    return {(path, name): v for path, inner in attributes.items() for name, v in inner.items()}
