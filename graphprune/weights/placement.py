"""Where a program computes, and how much it may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from graphprune import ranks
from graphprune.errors import UsageError, first_line

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Placement:
    """The device that a program computes on, and the memory that it may take.

    Parameters
    ----------
    device
        Where weights and inputs are moved to be computed with; None for where the weights lie.
    memory
        Bytes of weights and activations that may be held; what goes past it lies in scratch files.
        None for no limit.
    """

    device: torch.device | None = None
    memory: int | None = None


def device_of(given: str | torch.device | None) -> torch.device | None:
    """Return the device that `given` names, which must be there.

    Raises
    ------
    UsageError
        When there is no such device, or it is no name of one.
    """
    if given is None:
        return None
    try:
        device = torch.device(given)
        if ranks.size() > 1 and device.index is not None:
            raise UsageError(f"{given} would be the device of every process: say {device.type}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"there is no device {str(given)!r} here: {first_line(error)}") from error
    return device


def memory_of(given: str | int | None) -> int | None:
    """Return the number of bytes that `given` is or says, such as "8GB" or "500 MB".

    Raises
    ------
    UsageError
        When it says none.

    Examples
    --------
    >>> memory_of("1.5GB")
    1500000000
    """
    if given is None:
        return None
    if isinstance(given, int) and given > 0:
        return given
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(given), re.IGNORECASE)
    if found is None or not (count := _bytes(*found.groups())):
        raise UsageError(f"{given!r} is no size of memory: say it as 8GB or 500MB")
    return count


def _bytes(number: str, unit: str, binary: str) -> int:
    factor = _UNITS[unit.upper()]
    if binary:
        factor = 1024 ** list(_UNITS).index(unit.upper())
    return int(float(number) * factor)
