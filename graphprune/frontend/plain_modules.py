"""Capture of one call of any module on example inputs."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphprune.errors import CaptureError, UsageError, nearest
from graphprune.frontend.from_exported import few_values, to_program, written_parameters
from graphprune.frontend.recurrences.replaced import loops_of
from graphprune.frontend.sizes import (
    LENGTHS,
    ROWS,
    conditions_of,
    is_quick,
    limited,
    refusal,
    same,
    with_fixed,
)
from graphprune.frontend.torch_export import Exported, Follow, export
from graphprune.ir.nodes import size_of
from graphprune.ir.program import Note, Program
from graphprune.ir.provenance import Source
from graphprune.weights.models import tensors_kept, values_lent

_CHECKED = 130
"""Up to this length a program is compared where it is not the code of the model that was traced."""


class _Flat(nn.Module):
    """Calls `inner` on tensors rebuilt from a flat list, and flattens what comes back.

    The outputs' names go to `record`, with those of buffers that the call replaced, since export
    takes back what a forward does to its module.
    """

    def __init__(
        self,
        inner: nn.Module,
        spec: pytree.TreeSpec,
        keep: Callable[[str], bool],
        record: Callable[[tuple[list[str], list[str]]], None],
    ) -> None:
        super().__init__()
        self.inner = inner
        self.spec = spec
        self.keep = keep
        self.record = record
        self.written: list[str] = []

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(list(flat), self.spec)
        before = dict(self.inner.named_buffers())
        names, leaves = _named_leaves(self.inner(*args, **kwargs), "output")
        replaced = [n for n, b in self.inner.named_buffers() if b is not before.get(n)]
        chosen = [i for i, name in enumerate(names) if self.keep(name)]
        self.record(([names[i] for i in chosen], replaced))
        return tuple(leaves[i] for i in chosen)

    def computed(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Return what the module gives with the values of its weights, which it leaves alone."""
        with values_lent(self.inner), tensors_kept(self, self.written):
            result: tuple[Tensor, ...] = self(*flat)
        return result


def _named_leaves(tree: Any, root: str) -> tuple[list[str], list[Tensor]]:
    """Return names and tensors of `tree`: dotted names, `root` for a bare tensor."""
    names, leaves = [], []
    if isinstance(tree, Mapping):  # a transformers ModelOutput among them
        tree = dict(tree)
    elif is_dataclass(tree) and not isinstance(tree, type):
        tree = {each.name: getattr(tree, each.name) for each in fields(tree)}
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


@dataclass(frozen=True)
class Call:
    """A program of one call, and what it takes to compare it with the model at other sizes.

    Parameters
    ----------
    program
        What was captured.
    exported
        What it was made of.
    model
        The call on flat inputs, in the program's order.
    module
        What it calls.
    example
        The flat inputs that were given.
    vocabulary
        Where it is known, tokens are drawn from it; else they are the example's own.
    most
        The longest length to try.
    checked
        The length up to which all are compared.
    """

    program: Program
    exported: Exported
    model: Callable[..., Sequence[Tensor]]
    module: nn.Module
    example: tuple[Tensor, ...]
    vocabulary: int | None = None
    most: int = 1 << 14
    checked: int = 0

    def limited(self) -> Program:
        """Return the program, limited to the sizes for which it computes what the model does.

        Raises
        ------
        CaptureError
            When it computes something else on the example itself, or the model nothing.
        """
        if self.program.limits or any(tensor.is_meta for tensor in self.example):
            return self.program
        with few_values(self.program, self.module) as compared:
            return replace(self._limited(compared), weights=self.program.weights)

    def _limited(self, compared: Program) -> Program:
        conditions = conditions_of(self.exported, compared)
        example, seen = [tensor.clone() for tensor in self.example], conditions.seen
        quick = is_quick(compared, seen)
        agree = quick and same(compared, self.model, lambda _: example, seen)
        if agree is None:
            why = refusal(self.model, example)
            raise CaptureError(f"the model does not run on the example: {why}")
        if quick and not agree:
            raise CaptureError("its graph computes something else than the model on the example")
        candidates = list(self._candidates(conditions.seen))
        made = self._inputs
        return limited(compared, conditions, self.model, made, candidates, self.checked)

    def check(self, what: str) -> None:
        """Refuse a program that does not compute what the model does on the example.

        Raises
        ------
        CaptureError
            With `what` the model does, which would explain it.
        """
        seen = conditions_of(self.exported, self.program).seen
        if not same(self.program, self.model, self._inputs, seen):
            raise CaptureError(f"the model {what}: its graph computes something else")

    def is_wide(self) -> bool:
        """Tell whether every dynamic size is worth more than the example's own."""
        return not self.narrow()

    def narrow(self) -> set[str]:
        """Return the dynamic sizes that are worth little more than the example's own."""
        ranges = self.program.limits.items()
        return {size for size, (least, most) in ranges if most is not None and most < 2 * least}

    def takes(self, example: Sequence[Tensor]) -> bool:
        """Tell whether the program takes inputs of the sizes of `example`."""
        limits = self.program.limits
        for value, tensor in zip(self.program.inputs, example, strict=True):
            for size, given in zip(value.shape, tensor.shape, strict=True):
                least, most = limits.get(str(size), (0, None))
                if given < least or (most is not None and given > most):
                    return False
        return True

    def _candidates(self, seen: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Yield sizes to try: of one length for all inputs, from 0 and from the example's on."""
        rows = {str(value.shape[0]) for value in self.program.inputs if value.shape} & seen.keys()
        lengths = [symbol for symbol in seen if symbol not in rows]
        for few, length in itertools.product(ROWS, LENGTHS if lengths else (1,)):
            batch = dict.fromkeys(rows, few)
            starts = [dict.fromkeys(lengths, 0), {symbol: seen[symbol] for symbol in lengths}]
            starts += [{symbol: 2 * at for at, symbol in enumerate(lengths)}] * (len(lengths) > 1)
            for start in starts:
                sizes = {symbol: start[symbol] + length for symbol in lengths}
                if max(sizes.values(), default=0) <= self.most:
                    yield batch | sizes

    def _inputs(self, sizes: Mapping[str, int]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        made = []
        for (value, node), tensor in zip(self.program.input_nodes(), self.example, strict=True):
            for dim, size in enumerate(node.meta["val"].shape):
                positions = torch.arange(size_of(size, sizes), device=tensor.device)
                index = positions % tensor.shape[dim]
                tensor = tensor.index_select(dim, index)
            if self.vocabulary and value.name.endswith("input_ids"):
                drawn = torch.randint(0, self.vocabulary, tensor.shape, generator=generator)
                tensor = drawn.to(tensor)
            elif tensor.is_floating_point() and not tensor.any():
                tensor = torch.randn(tensor.shape, generator=generator).to(tensor)
            made.append(tensor)
        return made


def capture_call(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: Any = None,
    *,
    keep: Callable[[str], bool] = lambda name: True,
    source: Source | None = None,
    notes: tuple[Note, ...] = (),
    follow: Sequence[Follow] = (),
) -> Call:
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
        When an input is no tensor or without rows, or `dynamic_shapes` is not for these inputs.
    CaptureError
        When `torch.export` refuses.
    """
    if isinstance(example_inputs, Tensor):
        raise UsageError("example_inputs is a tensor: give a tuple of inputs, such as (x,)")
    given = isinstance(example_inputs, Mapping)
    args, kwargs = ((), dict(example_inputs)) if given else (tuple(example_inputs), {})
    flat, spec = pytree.tree_flatten((args, kwargs))
    if not flat or not all(isinstance(leaf, Tensor) for leaf in flat):
        raise UsageError("example_inputs must hold tensors only (nested in tuples, lists, dicts)")
    names = _input_names(model, spec, len(flat))
    if empty := [n for n, leaf in zip(names, flat, strict=True) if leaf.ndim and not len(leaf)]:
        raise UsageError(f"example input {empty[0]!r} has no rows: give one of at least one")
    recorded: list[tuple[list[str], list[str]]] = []
    wrapper = _Flat(model, spec, keep, recorded.append)

    def captured(example: Sequence[Tensor], dims: Sequence[Any]) -> Call:
        tensors, name = tuple(example), type(model).__name__
        exported = export(wrapper, tensors, (tuple(dims),), name, follow=follow)
        outputs, replaced = recorded[-1]
        if not outputs:
            raise CaptureError(f"{name} returns no tensor in tuples, lists, dicts or dataclasses")
        wrapper.written = written_parameters(exported)
        program = to_program(exported, model, names, outputs, source, notes, state=replaced)
        program = with_fixed(program, dims, wrapper.computed, tensors)
        checked = _CHECKED if loops_of(model) else 0
        return Call(program, exported, wrapper.computed, model, tensors, checked=checked)

    if dynamic_shapes is not None:
        given_dims = _by_input(dynamic_shapes, model, args, kwargs)
        return captured(flat, _checked(given_dims, names, flat))
    call = _with_most_dynamic(captured, flat)
    sides = [dict.fromkeys(range(1, leaf.ndim if leaf.ndim > 3 else 1), Dim.AUTO) for leaf in flat]
    why = "no others were tried; dynamic_shapes says which to try"
    return replace(call, program=with_fixed(call.program, sides, call.model, call.example, why))


def _input_names(model: nn.Module, spec: pytree.TreeSpec, count: int) -> list[str]:
    """Return the name of every flat input by the parameter of the model's forward that takes it.

    The inputs are in the order of the example, keywords among them, not of the signature.
    """
    marks = [torch.empty(0) for _ in range(count)]
    args, kwargs = pytree.tree_unflatten(marks, spec)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UsageError(f"{type(model).__name__} does not take example_inputs: {error}") from error
    names, leaves = _named_leaves(bound, "input")
    name_of = {id(leaf): name for name, leaf in zip(names, leaves, strict=True)}
    return [name_of[id(mark)] for mark in marks]


def _by_input(
    shapes: Any, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Return `shapes` for every flat input in turn; parameters that it does not name have none."""
    if not isinstance(shapes, Mapping) or _is_dims(shapes):
        return pytree.tree_leaves(shapes, is_leaf=_is_leaf)
    given = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    if unknown := [name for name in shapes if name not in given]:
        hint = nearest(str(unknown[0]), given)
        raise UsageError(f"dynamic_shapes names {unknown[0]!r}, which is no input{hint}")
    found: list[Any] = []
    for name, value in given.items():
        one = shapes.get(name)
        found += (
            [None] * len(pytree.tree_leaves(value))
            if one is None
            else pytree.tree_leaves(one, is_leaf=_is_leaf)
        )
    return found


def _checked(shapes: list[Any], names: Sequence[str], flat: Sequence[Tensor]) -> list[Any]:
    """Return `shapes`; refuse those that the flat inputs do not have."""
    if len(shapes) != len(flat):
        raise UsageError(
            f"dynamic_shapes is for {len(shapes)} inputs, and the example has {', '.join(names)}"
        )
    for dims, name, tensor in zip(shapes, names, flat, strict=True):
        for dim in dims if isinstance(dims, Mapping) else range(len(dims or ())):
            if not 0 <= dim < tensor.ndim:
                raise UsageError(
                    f"dynamic_shapes has a dimension {dim} of {name}, which has {tensor.ndim}"
                )
    return shapes


def _with_most_dynamic(
    captured: Callable[[Sequence[Tensor], Sequence[Any]], Call], flat: Sequence[Tensor]
) -> Call:
    """Capture with as many dynamic sizes as hold for more than the example.

    Lengths are tried as well as batches, but no sides of images, which code divides in many ways.
    A batch of one, which `torch.export` takes for a constant, is tried as a batch of two, and then
    as it is, with lengths that may be others. Where nothing else can be captured, the sizes are
    those of the example.
    """
    alone = all(leaf.ndim and leaf.shape[0] == 1 for leaf in flat)
    several = [torch.cat([leaf, leaf]) for leaf in flat] if alone else flat
    all_dims = [dict.fromkeys(range(leaf.ndim if leaf.ndim < 4 else 1), Dim.AUTO) for leaf in flat]
    rows = [{0: Dim.AUTO} if leaf.ndim else {} for leaf in flat]
    failure: CaptureError | None = None
    tries = [(several, all_dims)] if all_dims != rows else []
    tries += [(several, rows)]
    tries += [(flat, all_dims)] if alone and all_dims != rows else []
    while tries:
        example, dims = tries.pop(0)
        try:
            call = captured(example, dims)
        except CaptureError as error:
            failure = error
            continue
        if shared := _shared_dims(call, dims):
            with contextlib.suppress(CaptureError):
                call = captured(example, shared)
        checked = replace(call, program=call.limited())
        if checked.takes(flat) and checked.is_wide():
            given_up = [
                {dim: how for dim, how in every.items() if dim not in kept}
                for every, kept in zip(all_dims, dims, strict=True)
            ]
            program = with_fixed(checked.program, given_up, checked.model, checked.example)
            return replace(checked, program=program)
        if (wide := _wide_dims(checked, dims)) not in (dims, rows):
            tries.insert(0, (example, wide))
    if not alone:
        if failure is None:
            return checked
        if failure.at_all_sizes:
            raise failure
    call = captured(flat, [dict.fromkeys(dims, Dim.STATIC) for dims in rows])
    return replace(call, program=with_fixed(call.program, all_dims, call.model, call.example))


def _wide_dims(call: Call, dims: Sequence[Any]) -> list[Any]:
    """Return `dims` without those of sizes that are worth little more than the example's own."""
    narrow = call.narrow()
    return [
        {dim: how for dim, how in of.items() if str(value.shape[dim]) not in narrow}
        for value, of in zip(call.program.inputs, dims, strict=True)
    ]


def _shared_dims(call: Call, dims: Sequence[Any]) -> list[Any]:
    """Return `dims` with one dynamic dimension for sizes that must be equal; none for no such."""
    equal = conditions_of(call.exported, call.program).equal()
    if not equal:
        return []
    shared = {first: Dim(f"shared_{first}", min=2) for first in equal.values()}
    shapes = [value.shape for value in call.program.inputs]
    return [
        {
            dim: shared.get(equal.get(str(shape[dim]), str(shape[dim])), how)
            for dim, how in of.items()
        }
        for shape, of in zip(shapes, dims, strict=True)
    ]


def _is_leaf(tree: Any) -> bool:
    return tree is None or _is_dims(tree)


def _is_dims(tree: Any) -> bool:
    """Tell whether `tree` describes one tensor of a `dynamic_shapes` argument."""
    keys = isinstance(tree, Mapping) and all(isinstance(key, int) for key in tree)
    return keys or (isinstance(tree, tuple | list) and not any(map(_is_dims, tree)))
