"""Modules of a model that a program lacks: what takes their place, and the KV cache without them.

A program without an attention or an MLP has lost all weights of some modules. What calling these
would give is measured: the whole model runs with zeros for what is gone, and computes what the
program does. A module then gives zeros, or hands one of its inputs on where a residual sum is
inside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.backends.huggingface.trial import TOLERANCE, Trial
from graphprune.errors import BackendError
from graphprune.ir.compare import relative_error

Gives = dict[str, Any] | list[Any] | None
"""What calling an absent module gives: ``{"zeros_like": input}`` or ``{"same_as": input}``, of an
input by its position or its name; None; or a list of these for a tuple."""

_LAST = 2
"""Tokens that follow the others when a cache is tried."""


def absent_weights(model: nn.Module, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the parameters of `model` that are none of `names`, with their sizes."""
    held = model.named_parameters(remove_duplicate=False)
    return {name: tuple(weight.shape) for name, weight in held if name not in names}


def absent_modules(
    model: nn.Module, weights: Collection[str], compare: Callable[[nn.Module], str]
) -> dict[str, Gives]:
    """Return the outermost modules of which all parameters are zero, and what calling them gives.

    Parameters
    ----------
    model
        The whole model, with zeros for `weights`.
    weights
        The names of the weights that are gone.
    compare
        Runs a model, and says how it differs from the program.

    Raises
    ------
    BackendError
        When the model differs, or a weight is gone of a module of which others are left.
    """
    empty = _emptied(model, weights)
    left = set(weights) - {f"{path}.{name}" for path in empty for name in _parameters(model, path)}
    if left:
        raise BackendError(f"{min(left)} is gone, and others of its module are left")
    given: dict[str, Gives] = {}

    def noting(path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given.setdefault(path, _gives(dict(enumerate(args)) | kwargs, output))

        return note

    handles = [
        model.get_submodule(path).register_forward_hook(noting(path), with_kwargs=True)
        for path in empty
    ]
    try:
        why = compare(model)
    finally:
        for handle in handles:
            handle.remove()
    if why:
        raise BackendError(why)
    return {path: given[path] for path in _outermost(given, empty)}


def _emptied(model: nn.Module, weights: Collection[str]) -> list[str]:
    """Return the modules with parameters of which none is left, from the outside in."""
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(weights)
    alive = {"", *(name[:at] for name in left for at, sign in enumerate(name) if sign == ".")}
    return [
        path
        for path, module in model.named_modules()
        if path not in alive and next(module.parameters(), None) is not None
    ]


def _parameters(model: nn.Module, path: str) -> list[str]:
    found = model.get_submodule(path).named_parameters(remove_duplicate=False)
    return [name for name, _ in found]


def _outermost(called: Collection[str], empty: Collection[str]) -> list[str]:
    """Return those of `called` that are not inside each other, in the order of `empty`."""
    found: list[str] = []
    for path in empty:
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path in called and not inside:
            found.append(path)
    return found


def _gives(inputs: Mapping[int | str, Any], output: Any) -> Gives:
    """Say what a call with `inputs` gave."""
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    if isinstance(output, tuple | list):
        first, *others = output
        return [_value(tensors, first), *(_handed_on(tensors, each) for each in others)]
    return _value(tensors, output)


def _value(inputs: Mapping[int | str, Tensor], output: Any) -> dict[str, Any] | None:
    """Say what the main value is: zeros of the sizes of an input, or an input."""
    if not isinstance(output, Tensor):
        return None
    if output.any() and (found := _handed_on(inputs, output)):
        return found
    shaped = [key for key, value in inputs.items() if value.shape == output.shape]
    floating = [key for key, value in inputs.items() if value.is_floating_point()]
    key = next(iter([*shaped, *floating]), None)
    return None if key is None else {"zeros_like": key}


def _handed_on(inputs: Mapping[int | str, Tensor], output: Any) -> dict[str, Any] | None:
    """Say which input another value is; None where it is none, and may be left out."""
    if isinstance(output, Tensor):
        for key, value in inputs.items():
            if value.shape == output.shape and torch.equal(value, output):
                return {"same_as": key}
    return None


# -- caches ---------------------------------------------------------------------------------------


def uncached_layers(whole: nn.Module, model: nn.Module, trial: Trial) -> list[int]:
    """Return the layers that write into the KV cache of `whole` and not into that of `model`."""
    if not _takes_cache(model):
        return []
    return sorted(_cached(whole, trial) - _cached(model, trial))


def check_cache(whole: nn.Module, model: nn.Module, trial: Trial) -> None:
    """Refuse a `model` that goes on from its cache to something else than from the whole text.

    Raises
    ------
    BackendError
        Where `whole` does better.
    """
    if _takes_cache(model) and _departs(model, trial) and not _departs(whole, trial):
        raise BackendError("its KV cache cannot do without what is gone")


def _takes_cache(model: nn.Module) -> bool:
    return {"past_key_values", "use_cache"} <= set(inspect.signature(model.forward).parameters)


def _cached(model: nn.Module, trial: Trial) -> set[int]:
    held = trial.run(model, use_cache=True).get("past_key_values")
    layers = getattr(getattr(held, "self_attention_cache", held), "layers", ())
    return {
        at for at, layer in enumerate(layers) if isinstance(getattr(layer, "keys", None), Tensor)
    }


def _departs(model: nn.Module, trial: Trial) -> bool:
    name = next((n for n in ("decoder_input_ids", "input_ids") if n in trial.inputs), None)
    if name is None:
        return False
    ids = trial.inputs[name]
    try:
        before = trial.run(model, use_cache=True, **{name: ids[:, :-_LAST]})
        held = before["past_key_values"]
        after = trial.run(model, use_cache=True, past_key_values=held, **{name: ids[:, -_LAST:]})
        wanted = trial.run(model)[0][:, -_LAST:]
        return not relative_error(wanted, after[0]) <= TOLERANCE
    except Exception:  # noqa: BLE001 - model code may fail in any way
        return True
