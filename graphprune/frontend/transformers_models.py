"""Capture of a transformers model, whose inputs follow from its config."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

from graphprune.errors import CaptureError
from graphprune.frontend.branches import export_with_all_found
from graphprune.frontend.decoders import cache_layers, capture_decoder
from graphprune.frontend.example_inputs import Example, example_of, longest_trial
from graphprune.frontend.patches.transformers_code import (
    batched_experts,
    broadcast_masks,
    without_caches,
)
from graphprune.frontend.plain_modules import Call, capture_call
from graphprune.frontend.torch_export import Follow, line_and_place
from graphprune.ir.compare import relative_error, tolerance_of
from graphprune.ir.input_sizes import TYPES
from graphprune.ir.interpreter import run_program
from graphprune.ir.program import Note, Program
from graphprune.ir.provenance import Source
from graphprune.weights.models import values_lent


def is_transformers_model(model: nn.Module) -> bool:
    """Tell whether `model` is one of transformers' own classes, or derived from one."""
    import transformers

    return isinstance(model, transformers.PreTrainedModel)


def capture_transformers(
    model: Any,
    cache: bool | None = None,
    *,
    follow: Sequence[Follow] = (),
    fixed: bool = False,
) -> Program:
    """Capture a transformers model, with its KV cache where it has one and `cache` is not False.

    Parameters
    ----------
    model
        In evaluation mode.
    cache
        As `capture` takes it.
    follow
        What to try, after loops over everything, where the model branches on data.
    fixed
        Whether the dynamic sizes of a decoder are numbers, for a graph that is changed and
        compared with others, and not run.

    Raises
    ------
    CaptureError
        When `torch.export` refuses, there is no cache where one is asked for, or a graph that rests
        on an assumption computes something else than the model.
    """
    source = _source_of(model)
    example = functools.cache(lambda: example_of(model))
    on_meta = fixed or model.device.type == "meta"
    follow = [] if on_meta else [export_with_all_found, *follow]
    with batched_experts(model), broadcast_masks() as broadcast:
        program = _captured_with(model, cache, source, example, follow, fixed)
    branched = _rests_on_assumptions(program)
    if (broadcast or branched) and not on_meta:
        what = (
            "branches on data in more ways than one"
            if branched
            else "makes a mask that is no function of each position alone"
        )
        _check_outputs(program, model, example(), what)
    return program


def capture_transformers_call(
    model: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: Any = None,
    *,
    follow: Sequence[Follow] = (),
) -> Program:
    """Capture one call of a transformers model on inputs of the user's own.

    Raises
    ------
    CaptureError
        When `torch.export` refuses.
    """
    with batched_experts(model), without_caches(model), broadcast_masks() as broadcast:
        call = capture_call(
            model,
            example_inputs,
            dynamic_shapes,
            keep=_is_kept,
            source=_source_of(model),
            follow=[export_with_all_found, *follow],
        )
    if broadcast or _rests_on_assumptions(call.program):
        call.check("branches on data, or makes a mask that is no function of each position alone")
    return call.limited()


def _rests_on_assumptions(program: Program) -> bool:
    return any(note.kind in ("example-path", "full-loops") for note in program.notes)


def _source_of(model: Any) -> Source:
    generation = getattr(model, "generation_config", None)
    return Source(model.config, type(model), generation_config=generation)


def _is_kept(output: str) -> bool:
    return output.split(".")[0] not in _INNER


def _captured_with(
    model: Any,
    cache: bool | None,
    source: Source,
    example: Callable[[], Example],
    follow: Sequence[Follow],
    fixed: bool,
) -> Program:
    """Capture `model` with its cache where it has one and where that is wanted."""
    if cache is not False:
        layers, why = cache_layers(model, without_data=fixed)
        if layers:
            try:
                return capture_decoder(model, layers, source, follow=follow, fixed=fixed)
            except CaptureError as error:
                if cache:
                    raise
                why = str(error)
        if cache:
            raise CaptureError(f"{type(model).__name__} has no KV cache to capture: {why}")
        text = f"captured without a cache: {why}" if why and model.can_generate() else ""
    else:
        text = "captured without a cache, as asked"
    notes = (Note("no-cache", text),) if text else ()
    return _capture_whole(model, source, notes, example(), follow)


def _check_outputs(program: Program, model: Any, example: Example, what: str) -> None:
    """Refuse a program that does not compute what the model does, which `what` would explain.

    It is run on the example, and on other tokens that the model takes.
    """
    names = [value.name for value in program.inputs]
    inputs = {name: tensor for name, tensor in example.inputs.items() if name in names}
    name = program.outputs[0].name
    for each in (inputs, _other_tokens(model, inputs)):
        try:
            with torch.no_grad(), values_lent(model):
                result = model(**each, return_dict=True)
        except Exception:  # noqa: BLE001 - tokens drawn at random may mean anything
            continue
        expected = result[name]
        try:
            found = program(**each)[name]
        except Exception as error:  # a graph of another way fails in any way
            raise CaptureError(f"{type(model).__name__} {what}: {line_and_place(error)}") from error
        off = relative_error(expected, found)
        if not off <= tolerance_of(found.dtype):
            raise CaptureError(f"{type(model).__name__} {what}: {name} differs by {off:.1e}")


def _other_tokens(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 2
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, vocabulary, tensor.shape, generator=generator).to(tensor)
        if name.endswith("input_ids")
        else tensor
        for name, tensor in inputs.items()
    }


_INNER = ("encoder_last_hidden_state", "past_key_values", "hidden_states", "loss")
"""Outputs of transformers models that are not what they are run for."""


def _capture_whole(
    model: Any,
    source: Source,
    notes: tuple[Note, ...],
    example: Example,
    follow: Sequence[Follow],
) -> Program:
    """Capture a model as one call, with as many dynamic sizes as its graph holds for."""
    first = {name: {0: of[0]} for name, of in example.dims.items()}
    fixed = dict.fromkeys(example.dims)
    attempts = ((example.dims, ""), (first, "a length"), (fixed, "a batch size and a length"))

    def captured(shapes: Mapping[str, Any], notes: tuple[Note, ...]) -> Call:
        with without_caches(model):
            call = capture_call(
                model,
                example.inputs,
                shapes,
                keep=_is_kept,
                source=source,
                notes=notes,
                follow=follow,
            )
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
        return replace(call, vocabulary=vocabulary, most=longest_trial(model))

    if TYPES in example.inputs:
        text = f"{TYPES} may be left out, and are then zero, as the model has it"
        notes = (*notes, Note("optional-input", text))

    def captured_with_masks(shapes: Mapping[str, Any], notes: tuple[Note, ...]) -> Call:
        likely = _likely_mask_dims(example.inputs, shapes, source)
        try:
            call = captured({**shapes, **likely}, notes)
        except CaptureError as error:
            if not likely or error.at_all_sizes:
                raise
            call = captured(shapes, notes)
        if shared := _mask_dims(call.program):
            with contextlib.suppress(CaptureError):
                return captured({**shapes, **shared}, notes)
        return call

    for shapes, what in attempts:
        why = f"captured for {what} of its own: its graph holds for no other" if what else ""
        said = (*notes, Note("fixed-size", why)) if why else notes
        try:
            call = captured_with_masks(shapes, said)
        except CaptureError as error:
            if shapes is fixed or error.at_all_sizes:
                raise
            continue
        if all(_holds_for(call.program, *sizes) for sizes in ((3, 7), (2, 11))):
            break
        shapes_seen = [tensor.shape for tensor in example.inputs.values()]
        longer = _from_lengths_on(call.program, shapes_seen)
        if longer is not None:
            return replace(call, program=longer).limited()
        program = call.limited()
        if program.limits and replace(call, program=program).is_wide():
            return program
    return call.limited()


def _likely_mask_dims(
    inputs: Mapping[str, Tensor], shapes: Mapping[str, Any], source: Source
) -> dict[str, dict[int, Any]]:
    """Return dynamic dimensions for tokens and masks of the same sizes that say that they are.

    A length is left out where the config bounds it: an export refuses what it finds to be bounded.
    """
    named = (0,) if source.context_length else (0, 1)
    dims: dict[str, dict[int, Any]] = {}
    for name, mask in inputs.items():
        tokens = name.replace("attention_mask", "input_ids")
        if tokens != name and tokens in inputs and inputs[tokens].shape == mask.shape:
            asked = {dim: to for dim, to in (shapes.get(tokens) or {}).items() if to is Dim.AUTO}
            shared = {dim: Dim(f"{tokens}_{dim}", min=2) for dim in asked if dim in named}
            if shared:
                dims |= {tokens: asked | shared, name: asked | shared}
    return dims


def _mask_dims(program: Program) -> dict[str, Any]:
    """Return dynamic dimensions for tokens and masks that have two symbols for one size.

    A graph that only cuts its mask to length, or broadcasts it, does not say that they are equal.
    """
    shapes = {value.name: value.shape for value in program.inputs}
    dims: dict[str, Any] = {}
    for name, shape in shapes.items():
        tokens = name.replace("attention_mask", "input_ids")
        sizes = shapes.get(tokens, ())[: len(shape)]  # there may be several tokens at one position
        if tokens == name or sizes == shape or len(sizes) < len(shape):
            continue
        shared = {
            dim: Dim.AUTO
            if size == other
            else Dim(f"{tokens}_{dim}", min=2)
            if isinstance(size, str)
            else Dim.STATIC
            for dim, (size, other) in enumerate(zip(sizes, shape, strict=True))
        }
        dims |= {tokens: shared, name: shared}
    return dims


def _from_lengths_on(program: Program, shapes: Sequence[Sequence[int]]) -> Program | None:
    """Limit `program` to signals of the example's length on, where its graph holds for those.

    Convolutions make nothing of a sound that is shorter than their kernels.
    """
    least = {
        symbol: size
        for value, shape in zip(program.inputs, shapes, strict=True)
        if value.dtype.is_floating_point
        for symbol, size in zip(value.shape[1:], shape[1:], strict=True)
        if isinstance(symbol, str)
    }
    ranges = {
        symbol: limits & ValueRanges(least.get(str(symbol), limits.lower), limits.upper)
        for symbol, limits in program.ranges.items()
    }
    sizes = ", ".join(map(str, sorted(set(least.values()))))
    why = f"captured for lengths from {sizes} on: shorter ones were not tried"
    longer = replace(program, ranges=ranges, notes=(*program.notes, Note("least-size", why)))
    if not least or not all(_holds_for(longer, 3, more, least) for more in (7, 11)):
        return None
    return longer


def _holds_for(
    program: Program, batch: int, length: int, least: Mapping[str, int] | None = None
) -> bool:
    """Tell whether the graph runs with these dynamic sizes, on tensors without data.

    Some code takes other paths for other sizes, of which `torch.export` keeps one. Lengths are
    `length` more than `least` where that has them.
    """
    least = least or {}
    sizes = {
        symbol: batch if dim == 0 else length + least.get(symbol, 0)
        for value in program.inputs
        for dim, symbol in enumerate(value.shape)
        if isinstance(symbol, str)
    }
    symbols = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    mode = FakeTensorMode(shape_env=symbols, allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad():
            weights = {
                name: torch.empty(w.shape, dtype=program.compute_types[name])
                for name, w in program.weights.items()
            }
            inputs = {
                v.name: torch.empty([sizes.get(s, s) for s in v.shape], dtype=v.dtype)  # type: ignore[arg-type]
                for v in program.inputs
            }
            run_program(program, inputs, weights=weights)
    except Exception:  # noqa: BLE001 - operators refuse sizes in any way
        return False
    return True
