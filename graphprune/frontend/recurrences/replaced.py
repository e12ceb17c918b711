"""The functions of transformers 5.23 that loop over the length, while a model is exported.

Each is replaced, wherever it is defined, by one that computes the same without a loop that is
traced. Capture compares outputs with those of the model as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from graphprune.frontend.recurrences.decays import (
    chunked,
    gated_recurrence,
    selective_scan,
    weighted_average,
)
from graphprune.frontend.recurrences.delta_rule import delta_rule

Form = Callable[..., Any]

_FORMS: dict[str, Form] = {
    "_rnn_scan": gated_recurrence,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba_selective_scan": selective_scan,
    "rwkv_linear_attention_cpu": weighted_average,
    "torch_chunk_gated_delta_rule": delta_rule,
}
"""Function or method -> what takes its arguments and computes the same."""

_ADAPTED: dict[str, Callable[[Form], Form]] = {"mamba2_chunk_scan": chunked}
"""Function -> what makes of it one that computes the same."""


@contextlib.contextmanager
def loops_replaced(model: nn.Module) -> Iterator[None]:
    """Replace the functions that the code of `model` has."""
    found = [(holder, name, vars(holder)[name]) for holder, name in loops_of(model)]
    for holder, name, function in found:
        form = _FORMS[name] if name in _FORMS else _ADAPTED[name](function)
        setattr(holder, name, _for_one_text(form, function))
    try:
        yield
    finally:
        for holder, name, function in found:
            setattr(holder, name, function)


def loops_of(model: nn.Module) -> list[tuple[Any, str]]:
    """Return the functions that are replaced, as names in a class or a file of the code."""
    classes = {base for each in model.modules() for base in type(each).__mro__}
    own = [each for each in classes if each.__module__.startswith("transformers.models.")]
    files = [sys.modules[name] for name in sorted({each.__module__ for each in own})]
    names = (*_FORMS, *_ADAPTED)
    return [(holder, name) for holder in (*own, *files) for name in names if name in vars(holder)]


_OTHERS = (
    *("initial_state", "initial_states", "recurrent_states", "state"),
    *("output_final_state", "return_final_states", "return_last_state", "return_state"),
    *("cu_seqlens", "seq_idx"),
)
"""Arguments for a state that comes in or goes out, or for several texts in a row."""


def _for_one_text(form: Form, function: Form) -> Form:
    """Return `form` for whole texts, each in a row of its own; `function` for all else."""
    signature = inspect.signature(function)

    def chosen(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        plain = all(given.get(name) is None or given[name] is False for name in _OTHERS)
        return (form if plain else function)(*args, **kwargs)

    return chosen
