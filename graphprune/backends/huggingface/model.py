"""A transformers model that holds a program's weights, and the proof that it computes the same."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import BackendError, first_line
from graphprune.ir.program import PAST, PRESENT, Program

_ROWS, _LENGTH = 2, 5

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


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


def dtype_of(program: Program) -> torch.dtype:
    """Return the element type that the program computes in."""
    floating = (
        weight.dtype
        for name, weight in program.weights.items()
        if program.kinds[name] == "parameter" and weight.is_floating_point()
    )
    return next(floating, torch.float32)


def without_values(program: Program) -> bool:
    """Whether the weights of `program` are on the meta device."""
    return any(weight.is_meta for weight in program.weights.values())


def model_of(program: Program, config: Any, model_class: Any) -> Any:
    """Return the model that `from_pretrained` makes of `config` and the program's own weights.

    Raises
    ------
    BackendError
        When they do not fit.
    """
    weights = {
        name: weight.detach().cpu()
        for name, weight in program.weights.items()
        if program.kinds[name] in ("parameter", "buffer")
    }
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                output_loading_info=True,
                dtype=dtype_of(program),
            )
    except Exception as error:  # model code may refuse in any way
        raise BackendError(f"transformers cannot load it: {first_line(error)}") from error
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has no place for")):
        if info[key]:
            raise BackendError(f"the checkpoint {what} {min(info[key])}")
    return model.eval()


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
    """How what `model` computes differs from what `program` does; "" where it does not.

    Both run on random inputs of two rows of five tokens (or two images). An output counts as equal
    within 1e-4 of its largest magnitude in float32, which is what other kernels may cost.
    """
    return compare(program, model)[0]


def compare(program: Program, model: Any) -> tuple[str, Exception | None]:
    """As `difference`, with the exception that `model` raised, if it did."""
    inputs = _random_inputs(program, model)
    device = next(iter(program.weights.values())).device
    try:
        ours = program(**{name: tensor.to(device) for name, tensor in inputs.items()})
    except Exception as error:  # noqa: BLE001 - a capture may have kept the sizes of its example
        return f"the program does not run on other inputs: {first_line(error)}", None
    try:
        with torch.no_grad(), quiet():
            theirs = model(**inputs, return_dict=True)
    except Exception as error:  # noqa: BLE001 - model code may fail in any way
        return f"the model does not run: {first_line(error)}", error
    tolerance = _TOLERANCE.get(dtype_of(program), 1e-4)
    for value in program.outputs:
        if value.name.startswith(PRESENT):
            continue
        expected, found = ours[value.name].cpu().double(), _output(theirs, value.name)
        if found is None or found.shape != expected.shape:
            shape = tuple(expected.shape)
            return f"the model has no output {value.name} of shape {shape}", None
        off = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        if not off <= tolerance:
            return f"{value.name} of the model differ by {off:.1e} from those of the program", None
    return "", None


def _output(outputs: Any, name: str) -> Tensor | None:
    found: dict[str, Any] = dict(outputs)
    held: Any = found
    for step in name.split("."):
        inner = dict(enumerate(held)) if isinstance(held, tuple | list) else held
        key = int(step) if isinstance(held, tuple | list) else step
        held = inner.get(key) if isinstance(inner, dict) else None
    if isinstance(held, Tensor):
        return held
    # A base model's first output is called "logits" in a captured decoder.
    held = next(iter(found.values()), None) if name == "logits" else None
    return held if isinstance(held, Tensor) else None


def _random_inputs(program: Program, model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    try:
        words = getattr(model.get_input_embeddings(), "num_embeddings", 2)
    except NotImplementedError:  # models of images have none
        words = 2
    inputs = {}
    for value in program.inputs:
        if value.name.startswith(PAST):
            continue
        shape = [
            program.within(size, _ROWS if dim == 0 else _LENGTH)
            for dim, size in enumerate(value.shape)
        ]
        if value.dtype.is_floating_point:
            inputs[value.name] = torch.randn(shape, generator=generator).to(value.dtype)
        elif value.name.endswith("mask"):
            inputs[value.name] = torch.ones(shape, dtype=value.dtype)
        else:
            ids = torch.randint(words, shape, generator=generator)
            inputs[value.name] = ids.to(value.dtype)
    return inputs
