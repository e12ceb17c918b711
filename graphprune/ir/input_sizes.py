"""Fill in inputs that were left out, and check all against what a graph takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from graphprune.errors import GraphPruneError, UsageError, first_line
from graphprune.ir.aten import LOOKUPS, name_of

Limits = Mapping[str, tuple[int, int | None]]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


TYPES = "token_type_ids"
"""The input that says of which text each token is; plans from before programs had it hold."""


def bounds(ranges: Mapping[Any, Any], limits: Limits) -> Limits:
    """Return the least and the most that each dynamic size may be, by the name of its symbol.

    Parameters
    ----------
    ranges
        As `torch.export` gives them, by symbols.
    limits
        Where the graph does not hold for all of these.
    """
    found = dict(limits)
    for symbol, of in ranges.items():
        # A lower limit of 2 only says that torch.export treats 0 and 1 as special.
        lower = int(of.lower) if of.lower.is_Integer and of.lower > 2 else 0
        upper = int(of.upper) if of.upper.is_Integer else None
        least, most = found.get(str(symbol), (0, None))
        found[str(symbol)] = (
            max(least, lower),
            min((size for size in (most, upper) if size is not None), default=None),
        )
    return found


def by_position(names: Sequence[str], given: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what is given for the first of `names`.

    Raises
    ------
    UsageError
        When more is given than there are names.
    """
    if len(given) > len(names):
        raise UsageError(f"{len(given)} inputs are given, and the program takes {', '.join(names)}")
    return dict(zip(names, given, strict=False))


def given_on(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return inputs on `device`, but for those without values.

    Raises
    ------
    UsageError
        When one is no tensor.
    """
    for name, given in inputs.items():
        if not isinstance(given, Tensor):
            raise UsageError(
                f"input {name!r} is of type {type(given).__name__}, and has to be a tensor; what "
                "was nested in the example is given by its dotted names"
            )
    return {
        name: tensor if tensor.is_meta else tensor.to(device) for name, tensor in inputs.items()
    }


def fill_beside_tokens(
    filled: dict[str, Tensor], names: Sequence[str], rows: int, past: int, types: bool
) -> None:
    """Add attention masks of ones and, with `types`, types of zero, where they were left out.

    Raises
    ------
    UsageError
        When those that are given are of fewer tokens.
    """
    for name in names:
        for kind in ("attention_mask", TYPES):
            ids = filled.get(name.removesuffix(kind) + "input_ids")
            if not name.endswith(kind) or ids is None or ids.ndim < 2:
                continue
            if name in filled:
                _check_beside(name, filled[name], ids.shape[1])
                continue
            if kind == TYPES and types:
                filled[name] = torch.zeros_like(ids)
            elif kind != TYPES:
                ones = (rows, ids.shape[1] + past)
                filled[name] = torch.ones(ones, dtype=torch.int64, device=ids.device)


def _check_beside(name: str, given: Tensor, tokens: int) -> None:
    if given.ndim == 2 and given.shape[1] < tokens:
        raise UsageError(f"input {name!r} is of {given.shape[1]} tokens, and {tokens} are given")


@contextlib.contextmanager
def named(
    nodes: Callable[[], Iterable[tuple[Any, fx.Node]]], limits: Limits, given: Sequence[Tensor]
) -> Iterator[None]:
    """Name the input that a run fails on, where one is unlike what the program takes.

    A type may be another of its kind, nothing may be computed of nothing, and what `torch.export`
    gives as ranges may be narrower than where the graph holds, so only what fails is refused.

    Parameters
    ----------
    nodes
        Gives the inputs, each with its placeholder.
    limits
        The least and the most that a symbol may be.
    given
        What is given for each input.

    Raises
    ------
    UsageError
        In place of what operators raise.
    """
    if any(tensor.device.type not in ("cpu", "meta") for tensor in given):
        # A row that is not there ends all work on such a device, and is told of too late.
        for (value, node), tensor in zip(nodes(), given, strict=True):
            _check_rows(value, node, tensor)
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        pairs = [*nodes()]
        for (value, node), tensor in zip(pairs, given, strict=True):
            _check_nonempty(value, tensor)
            _check_rows(value, node, tensor)
        values = [value for value, _ in pairs]
        check_inputs(values, limits, {v.name: t for v, t in zip(values, given, strict=True)})
        for value, tensor in zip(values, given, strict=True):
            if tensor.is_floating_point() and tensor.dtype != value.dtype:
                raise UsageError(_unlike(value, tensor)) from error
        sized = [
            f"{value.name} of {tuple(tensor.shape)}"
            for value, tensor in zip(values, given, strict=True)
            if any(isinstance(size, str) for size in value.shape) and not value.is_cache
        ]
        if sized and not isinstance(error, GraphPruneError):
            raise UsageError(
                f"the program does not run on {', '.join(sized)}: {first_line(error)}"
            ) from error
        raise


def _check_nonempty(value: Any, given: Tensor) -> None:
    if given.numel() or value.is_cache:
        return
    dim = given.shape.index(0)
    if dim < len(value.shape) and isinstance(value.shape[dim], str):
        where = f"dimension {dim} of input {value.name!r}"
        raise UsageError(f"{where} is 0: there is nothing to compute")


def _check_rows(value: Any, node: fx.Node, given: Tensor) -> None:
    no_values = given.is_meta or isinstance(given, FakeTensor)
    if no_values or given.dtype not in _INTEGERS or not given.numel():
        return
    rows = table_rows(node, shifted=False)
    if rows is None:
        return
    for found in (int(given.min()), int(given.max())):
        if not 0 <= found < rows:
            raise UsageError(f"input {value.name!r} holds {found}, and picks from {rows} rows")


def _unlike(value: Any, given: Tensor) -> str:
    return f"input {value.name!r} is of {given.dtype}; the program takes {value.dtype}"


def check_inputs(values: Sequence[Any], limits: Limits, inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs of kinds and sizes for which the graph does not hold, naming the first.

    Parameters
    ----------
    values
        The inputs that the graph takes; a dynamic size is the name of its symbol.
    limits
        The least and the most that a symbol may be.
    inputs
        What is given for each.

    Raises
    ------
    UsageError
        When one has numbers in the place of integers or the other way round, or a size is not as
        it should be.
    """
    first: dict[str, tuple[int, str]] = {}
    for value in values:
        name, wanted = value.name, value.shape
        given_type, shape = inputs[name].dtype, inputs[name].shape
        if _kind(given_type) != _kind(value.dtype):
            raise UsageError(_unlike(value, inputs[name]))
        if len(shape) != len(wanted):
            raise UsageError(
                f"input {name!r} has {len(shape)} dimensions, and the program takes {len(wanted)}"
            )
        for dim, (given, size) in enumerate(zip(shape, wanted, strict=True)):
            where = f"dimension {dim} of input {name!r}"
            if isinstance(size, int):
                due, why = size, "the program was captured for"
            else:
                due, other = first.setdefault(size, (given, where))
                why = f"{other} is"
            if given != due:
                raise UsageError(f"{where} is {given}, and {why} {due}")
            if not isinstance(size, int):
                _check_limits(where, given, limits.get(size, (0, None)))


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex


def _check_limits(where: str, given: int, limits: tuple[int, int | None]) -> None:
    least, most = limits
    if given < least or (most is not None and given > most):
        to = f"from {least} on" if most is None else f"for {least} to {most}"
        raise UsageError(f"{where} is {given}, and the program holds {to}")


# -- tables ---------------------------------------------------------------------------------------

_SHIFTS = ("add", "sub", "mul")
"""Operators after which an index is another than what went in, by an offset say."""


def table_rows(node: fx.Node, *, shifted: bool = True) -> int | None:
    """Return the rows of the smallest table that the integers of `node` look into, if any.

    Where `shifted` is false, tables looked into by what arithmetic made of the integers, which
    their rows do not bound, do not count.
    """
    rows: dict[fx.Node, int] = {}
    moved: set[fx.Node] = set()
    start = (node, False)
    seen, queue = {start}, [start]
    while queue:
        node, changed = queue.pop()
        for user in node.users:
            value = user.meta.get("val")
            after = (user, changed or name_of(user) in _SHIFTS)
            if _looks_up(user, node):
                rows[user] = int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
                moved |= {user} if changed else set()
            elif isinstance(value, Tensor) and not value.is_floating_point() and after not in seen:
                seen.add(after)
                queue.append(after)
    return min((n for user, n in rows.items() if shifted or user not in moved), default=None)


def _looks_up(user: fx.Node, index: fx.Node) -> bool:
    """Return whether `user` picks rows of a weight by the values of `index`."""
    table: Any = user.args[0] if user.args else None
    if not isinstance(table, fx.Node) or table is index or table.op != "placeholder":
        return False
    return name_of(user) in LOOKUPS
