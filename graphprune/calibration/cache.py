"""Measured tensors, cached in a file that records the program and data they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from graphprune import ranks
from graphprune.calibration.data import Calibration
from graphprune.errors import CalibrationError
from graphprune.io.atomic import staged_file
from graphprune.io.paths import path_of
from graphprune.ir.program import Program
from graphprune.plan.drawn import drawn_text
from graphprune.weights.tensors import digest

_KEY, _FORMAT = "graphprune", 2


def write_cache(
    path: str | PathLike[str],
    what: str,
    tensors: Mapping[str, Tensor],
    program: Program,
    calibration: Calibration | None,
    **options: Any,
) -> None:
    """Write `tensors` as a safetensors file that `read_cache` reads.

    Parameters
    ----------
    path
        The file to make; it appears whole.
    what
        What they are, in a word or two, such as "statistics".
    tensors
        By name.
    program
        What they were measured on: its fingerprint and the values of its weights are noted.
    calibration
        The data, or None where none was looked at.
    options
        Whatever else they depend on; what JSON can hold.

    Raises
    ------
    OutputError
        When the file exists or cannot be written.
    """
    from safetensors.torch import save_file

    if not ranks.is_first():
        return
    about = {
        "format": _FORMAT,
        "what": what,
        "fingerprint": program.fingerprint(),
        "weights": digest([program.weights]),
        "data": calibration.sha256 if calibration is not None else None,
        "calibration": calibration.describe() if calibration is not None else None,
        "options": options,
    }
    with staged_file(path) as staged:
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, str(staged), {_KEY: json.dumps(about)})


def read_cache(
    path: str | PathLike[str],
    what: str,
    program: Program,
    calibration: Calibration | None,
    **options: Any,
) -> dict[str, Tensor]:
    """Read what `write_cache` wrote of the same program, data and options.

    Without `calibration` any data will do.

    Raises
    ------
    CalibrationError
        When the file cannot be read, or what it holds is of something else: says of what.
    """
    from safetensors import SafetensorError, safe_open

    place = path_of(path, CalibrationError)
    if not place.is_file():
        why = "is a directory" if place.is_dir() else "does not exist"
        raise CalibrationError(f"{place} holds no {what}: it {why}")
    try:
        with safe_open(str(path), "pt") as file:
            if _KEY not in (written := file.metadata() or {}):
                raise CalibrationError(f"{path} holds no {what}: graphprune did not write it")
            about = json.loads(written[_KEY])
            if about.get("format") != _FORMAT or about.get("what") != what:
                raise CalibrationError(f"{path} holds no {what}, but {about.get('what')}")
            _check(path, what, about, program, calibration, options)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path} holds no {what}: {error}") from error


def _check(
    path: str | PathLike[str],
    what: str,
    about: Mapping[str, Any],
    program: Program,
    calibration: Calibration | None,
    options: Mapping[str, Any],
) -> None:
    if about["fingerprint"] != program.fingerprint():
        raise CalibrationError(f"{path} holds the {what} of another program")
    if about["weights"] != digest([program.weights]):
        raise CalibrationError(f"{path} holds the {what} of this program with other weights")
    if calibration is not None and about["data"] not in (None, calibration.sha256):
        raise CalibrationError(
            f"{path} holds the {what} on other calibration data: "
            f"{drawn_text(about.get('calibration') or {'sha256': about['data']})}; "
            f"this is {drawn_text(calibration.describe())}"
        )
    for name, value in options.items():
        if (kept := about["options"].get(name)) != value:
            raise CalibrationError(f"{path} holds the {what} for {name} {kept}, not {value}")
