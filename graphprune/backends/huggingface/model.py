"""A transformers model that holds a program's weights, and the proof that it computes the same."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import BackendError, CaptureError, first_line
from graphprune.frontend.transformers_models import capture_transformers
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.program import PRESENT, Program
from graphprune.ir.sample_inputs import random_inputs
from graphprune.weights.deferred import Deferred
from graphprune.weights.models import light_zeros, stand_for, values_lent

ROWS, LENGTH = 2, 5


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' logging, progress bars and warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Let what draws at random draw the same each time; the user's own draws are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def dtype_of(program: Program) -> torch.dtype:
    """Return the element type that the program computes in."""
    floating = (
        dtype
        for name, dtype in program.compute_types.items()
        if program.kinds[name] == "parameter" and dtype.is_floating_point
    )
    return next(floating, torch.float32)


def model_of(
    program: Program,
    config: Any,
    model_class: Any,
    zeros: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """Return the model that `from_pretrained` makes of `config` and the program's own weights.

    Those that lie in files stay there (`graphprune.weights.models`). Weights that the program does
    not have are `zeros` of these sizes.

    Raises
    ------
    BackendError
        When they do not fit.
    """
    dtype, deferred = dtype_of(program), {}
    weights = {n: light_zeros(torch.Size(size), dtype) for n, size in (zeros or {}).items()}
    for name, weight in program.operands.items():
        if program.kinds[name] not in ("parameter", "buffer"):
            continue
        if isinstance(weight, Deferred):
            weights[name] = light_zeros(weight.shape, weight.dtype)
            deferred[name] = program.weights[name]
        else:
            weights[name] = weight.detach().cpu()
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                output_loading_info=True,
                dtype=dtype,
            )
    except Exception as error:  # model code may refuse in any way
        raise BackendError(f"transformers cannot load it: {first_line(error)}") from error
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has no place for")):
        if info[key]:
            raise BackendError(f"the checkpoint {what} {min(info[key])}")
    held = {*dict(model.named_parameters(remove_duplicate=False)), *model.state_dict()}
    tied = {alias: deferred[name] for alias, name in program.aliases.items() if name in deferred}
    stand_for(model, {name: w for name, w in {**deferred, **tied}.items() if name in held})
    return model.eval()


def empty_model(config: Any, model_class: Any) -> Any:
    """Return the model of `config` on the meta device."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        return model_class(config)


def graph_of(model: Any, program: Program) -> Program:
    """Capture `model` with numbers in the place of dynamic sizes, to compare it with `program`.

    A model that should be a decoder is captured as nothing else.

    Raises
    ------
    BackendError
        When it cannot be captured.
    """
    try:
        with quiet():
            return capture_transformers(model, program.is_decoder or None, fixed=True)
    except CaptureError as error:
        raise BackendError(str(error)) from error


def differing_buffers(program: Program, model: Any) -> list[str]:
    """Return the buffers that `model` made from its config with other values than the program's."""
    found = dict(model.named_buffers(remove_duplicate=False))
    return [
        name
        for name, node in program.weight_nodes()
        if program.kinds[name] == "derived"
        and node.users
        and not _same(program.weights[name], found.get(name))
    ]


def _same(weight: Tensor, other: Tensor | None) -> bool:
    if other is None or other.shape != weight.shape:
        return False
    return torch.allclose(weight.detach().cpu().double(), other.double(), rtol=1e-6, atol=1e-8)


def difference(program: Program, model: Any) -> str:
    """Say how what `model` computes differs from what `program` does; "" where it does not.

    Both run with the program's own weights, on random inputs of two rows of five tokens (or two
    images), and draw the same at random. An output counts as equal within 1e-4 of its largest
    magnitude in float32, which is what other kernels may cost. That no other structure would do is
    for a `Trial` to show.
    """
    inputs = random_inputs(program, batch=ROWS, length=LENGTH)
    device = program.device
    try:
        with drawing():
            ours = program(**{name: tensor.to(device) for name, tensor in inputs.items()})
    except Exception as error:  # noqa: BLE001 - a capture may have kept the sizes of its example
        return f"the program does not run on other inputs: {first_line(error)}"
    try:
        with torch.no_grad(), quiet(), drawing(), values_lent(model):
            theirs = model(**inputs, return_dict=True)
    except Exception as error:  # noqa: BLE001 - model code may fail in any way
        return f"the model does not run: {first_line(error)}"
    return mismatch(ours, theirs, tolerance_of(dtype_of(program)))


def mismatch(expected: Mapping[str, Tensor], outputs: Any, tolerance: float) -> str:
    """Say which of a model's `outputs` is not as `expected`; "" where all are."""
    for name, wanted in expected.items():
        if name.startswith(PRESENT):
            continue
        found = _output(outputs, name)
        if found is None or found.shape != wanted.shape:
            return f"the model has no output {name} of shape {tuple(wanted.shape)}"
        off = relative_error(wanted.cpu(), found)
        if not off <= tolerance:
            return f"{name} of the model differ by {off:.1e} from those of the program"
    return ""


def _output(outputs: Any, name: str) -> Tensor | None:
    held: Any = dict(outputs)
    for step in name.split("."):
        inner = dict(enumerate(held)) if isinstance(held, tuple | list) else held
        key = int(step) if isinstance(held, tuple | list) else step
        held = inner.get(key) if isinstance(inner, dict) else None
    return held if isinstance(held, Tensor) else None
