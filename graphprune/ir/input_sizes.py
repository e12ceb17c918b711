"""Fill in inputs that were left out, and check all against the sizes for which a graph holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import UsageError

Limits = Mapping[str, tuple[int, int | None]]


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
def named(values: Sequence[Any], limits: Limits, given: Sequence[Tensor]) -> Iterator[None]:
    """Name the size that is past its limits where a run fails and one is.

    What `torch.export` gives as ranges may be narrower than where the graph holds.

    Raises
    ------
    UsageError
        In place of what operators raise.
    """
    try:
        yield
    except Exception:
        shapes = {value.name: value.shape for value in values}
        check_sizes(shapes, limits, dict(zip(shapes, given, strict=True)))
        raise


def check_sizes(
    shapes: Mapping[str, tuple[int | str, ...]], limits: Limits, inputs: Mapping[str, Tensor]
) -> None:
    """Refuse inputs of sizes for which the graph does not hold, naming the first.

    Parameters
    ----------
    shapes
        The shape of each input; a dynamic size is the name of its symbol.
    limits
        The least and the most that a symbol may be.
    inputs
        What is given for each.

    Raises
    ------
    UsageError
        When a size is not as it should be.
    """
    first: dict[str, tuple[int, str]] = {}
    for name, wanted in shapes.items():
        shape = inputs[name].shape
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


def _check_limits(where: str, given: int, limits: tuple[int, int | None]) -> None:
    least, most = limits
    if given < least or (most is not None and given > most):
        to = f"from {least}" if most is None else f"{least} to {most}"
        raise UsageError(f"{where} is {given}, and the program holds for {to}")
