"""Capture of one call of any module on example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphprune.errors import UsageError
from graphprune.frontend.from_exported import to_program
from graphprune.frontend.torch_export import Follow, export
from graphprune.ir.program import Note, Program, Source


class _Flat(nn.Module):
    """Calls `inner` on tensors rebuilt from a flat list, and flattens what comes back.

    The outputs' names go to `record`, since export takes back what a forward does to its module.
    """

    def __init__(
        self,
        inner: nn.Module,
        spec: pytree.TreeSpec,
        keep: Callable[[str], bool],
        record: Callable[[list[str]], None],
    ) -> None:
        super().__init__()
        self.inner = inner
        self.spec = spec
        self.keep = keep
        self.record = record

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(list(flat), self.spec)
        names, leaves = _named_leaves(self.inner(*args, **kwargs), "output")
        chosen = [i for i, name in enumerate(names) if self.keep(name)]
        self.record([names[i] for i in chosen])
        return tuple(leaves[i] for i in chosen)


def _named_leaves(tree: Any, root: str) -> tuple[list[str], list[Tensor]]:
    """Return names and tensors of `tree`: dotted names, `root` for a bare tensor."""
    names, leaves = [], []
    if isinstance(tree, Mapping):  # a transformers ModelOutput among them
        tree = dict(tree)
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            keys = [
                str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
                for key in path
            ]
            names.append(
                ".".join(keys) if keys and not keys[0].isdigit() else ".".join([root, *keys])
            )
            leaves.append(leaf)
    return names, leaves


def capture_call(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: Any = None,
    *,
    keep: Callable[[str], bool] = lambda name: True,
    source: Source | None = None,
    notes: tuple[Note, ...] = (),
    follow: Sequence[Follow] = (),
) -> Program:
    """Capture ``model(*example_inputs)``, or ``model(**example_inputs)`` where it is a mapping.

    Parameters
    ----------
    model, example_inputs, dynamic_shapes
        As `capture` takes them.
    keep
        Which outputs the program has, by their names.
    source, notes
        As the program keeps them.
    follow
        What to try where the model branches on data.

    Raises
    ------
    UsageError
        When an input is no tensor.
    CaptureError
        When `torch.export` refuses.
    """
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        raise UsageError("example_inputs is a tensor: give a tuple of inputs, such as (x,)")
    flat, spec = pytree.tree_flatten((args, kwargs))
    if not flat or not all(isinstance(leaf, Tensor) for leaf in flat):
        raise UsageError("example_inputs must hold tensors only (nested in tuples, lists, dicts)")
    parameters = list(inspect.signature(model.forward).parameters)
    named = dict(zip(parameters, args, strict=False)) | kwargs
    names, _ = _named_leaves(named, "input")
    if dynamic_shapes is None:
        attempts = [({0: Dim.AUTO} if leaf.ndim else None for leaf in flat)]
        if all(leaf.ndim and leaf.shape[0] == 1 for leaf in flat):
            # A batch of one would be taken as a constant.
            flat = [torch.cat([leaf, leaf]) for leaf in flat]
        shapes: Any = (tuple(attempts[0]),)
    else:
        leaves = pytree.tree_leaves(dynamic_shapes, is_leaf=lambda x: x is None or _is_dims(x))
        shapes = (tuple(leaves),)
    recorded: list[list[str]] = []
    wrapper = _Flat(model, spec, keep, recorded.append)
    exported = export(wrapper, tuple(flat), shapes, type(model).__name__, follow=follow)
    return to_program(exported, model, names, recorded[-1], source, notes)


def _is_dims(tree: Any) -> bool:
    """Tell whether `tree` describes one tensor of a `dynamic_shapes` argument."""
    keys = isinstance(tree, Mapping) and all(isinstance(key, int) for key in tree)
    return keys or (isinstance(tree, tuple | list) and not any(map(_is_dims, tree)))
