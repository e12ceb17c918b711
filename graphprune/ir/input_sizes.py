"""Check inputs against the sizes for which a graph holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphprune.errors import UsageError

Limits = Mapping[str, tuple[int, int | None]]


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
