"""Example inputs of a transformers model, from its config and the signature of its forward.

What a main input looks like is told by its name only in part: features of sound come as frames of
channels or channels of frames, and `inputs` may be words, pixels or a waveform. The layouts that a
name may have are tried in turn by running the model, and the first that it accepts is taken.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from graphprune.errors import CaptureError, first_line
from graphprune.ir.input_sizes import TYPES
from graphprune.ir.provenance import declared_length
from graphprune.weights.models import values_lent

BATCH, NEW, PAST_LENGTH = 2, 3, 5
"""Example sizes: distinct, and none of them 0 or 1, which `torch.export` would specialise."""

_PIXELS = (64, 224)
"""Height and width of an image whose size no config gives."""

_FRAMES, _SAMPLES = 72, 8000
"""Frames of features (divisible by what encoders stack and halve), and samples: half a second."""

_TOKEN_FRAMES = 16
"""Frames of a waveform where the config says how many samples make one."""

_CODEBOOKS = ("num_codebooks", "num_channels")
"""Config fields with the number of tokens at one position of a sequence."""

_FEATURES = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim")
"""Config fields with the number of features of a frame of sound."""

_STACKED = (1, 2, 4)
"""How many of those (slopes, neighboring frames) one frame may hold."""


@dataclass(frozen=True)
class Example:
    """Inputs by name, with the dynamic dimensions of each as `torch.export` takes them."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    dims: dict[str, Any] = field(default_factory=dict)

    def __or__(self, other: Example) -> Example:
        return Example(self.inputs | other.inputs, self.dims | other.dims)


def example_of(model: Any) -> Example:
    """Return the first example that the config of `model` allows on which it runs.

    Raises
    ------
    CaptureError
        When it runs on none, naming its main input.
    """
    candidates = list(_candidates(model))
    is_text = model.main_input_name == "input_ids"
    if is_text and len(candidates) == 1:
        return _with_types(model, candidates[0])
    refused = ""
    for example in candidates:
        why = _refusal(model, example)
        if not why:
            return _with_types(model, example)
        refused = refused or f" (the model: {why})"
    if is_text:
        return candidates[0]  # `torch.export` will say what is wrong with it, and where
    raise CaptureError(
        f"{type(model).__name__} takes {model.main_input_name!r}, for which no example can be "
        f"made{refused}: give example_inputs"
    )


def _with_types(model: Any, example: Example) -> Example:
    """Return `example` with types of tokens, where the model takes some and none means zero."""
    ids = example.inputs.get("input_ids")
    if ids is None or TYPES not in inspect.signature(model.forward).parameters:
        return example
    typed = example | _example(TYPES, torch.zeros_like(ids), 1)
    try:
        if model.device.type == "meta":
            return typed if TYPES in example_of(_with_values(model)).inputs else example
        other = example | _example(TYPES, torch.ones_like(ids), 1)
        with torch.no_grad(), values_lent(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = [model(**each.inputs, return_dict=True) for each in (example, typed, other)]
    except Exception:  # noqa: BLE001 - any model code may fail in any way here
        return example
    without, zeros, ones = (next(iter(each.values())) for each in results)
    matters = torch.equal(without, zeros) and not torch.equal(zeros, ones)
    return typed if matters else example


def _with_values(model: Any) -> Any:
    """Return the first layer of a model that has no values, at random, to stand for it."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return type(model)(config).eval()


def _refusal(model: Any, example: Example) -> str:
    """Return why `model` does not run on `example`; "" where it does."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**example.inputs)
    except Exception as error:  # noqa: BLE001 - any model code may fail in any way here
        return first_line(error, typed=True)
    return ""


def _candidates(model: Any) -> Iterator[Example]:
    """Yield every example that config and signature allow: the main input alone, then more."""
    names = inspect.signature(model.forward).parameters
    main = model.main_input_name
    makers = _MAKERS.values() if main == "inputs" else filter(None, [_MAKERS.get(main)])
    mains = list(itertools.chain.from_iterable(make(model, main) for make in makers))
    decoders = [Example()]
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        decoders = list(_tokens(model, "decoder_input_ids", NEW))
    others = [name for name in _MAKERS if name in names and name != main and main != "inputs"]
    extras = (extra for name in others for extra in _MAKERS[name](model, name))
    for extra in itertools.chain([Example()], extras):
        for example, decoder in itertools.product(mains, decoders):
            yield example | extra | decoder


# -- what an input may look like ----------------------------------------------------------------


def _words(model: Any, name: str) -> Iterator[Example]:
    """Yield token ids, with an attention mask where they are `input_ids` with one row each."""
    names = inspect.signature(model.forward).parameters
    takes_mask = name == "input_ids" and "attention_mask" in names
    for example in _tokens(model, name, NEW + PAST_LENGTH):
        rows, length = example.inputs[name].shape[:2]
        mask = torch.ones((rows, length), dtype=torch.int64, device=model.device)
        masked = takes_mask and rows == BATCH
        yield example | (_example("attention_mask", mask, 1) if masked else Example())


def _tokens(model: Any, name: str, length: int) -> Iterator[Example]:
    """Yield ids of one token a position, then of several, as rows of their own or side by side."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=model.device)

    yield _example(name, zeros(BATCH, length), 1)
    for count in _values(model.config, _CODEBOOKS):
        yield _example(name, zeros(BATCH * count, length), 1)
        for streams in (count, count + 1):  # the words beside the codes
            yield _example(name, zeros(BATCH, length, streams), 1)


def _pixels(model: Any, name: str) -> Iterator[Example]:
    """Yield images of the size of the config."""
    for channels in _values(model.config, ("num_channels",)) or [3]:
        for size in _values(model.config, ("image_size",)) or _PIXELS:
            sides = tuple(size) if isinstance(size, Sequence) else (size, size)
            yield _example(name, _floats(model, BATCH, channels, *sides))


def _waveform(model: Any, name: str) -> Iterator[Example]:
    """Yield samples of a sound, with or without a dimension of channels."""
    ratios = _values(model.config, ("inputs_to_logits_ratio",))
    lengths = [*(_TOKEN_FRAMES * ratio for ratio in ratios), _SAMPLES]
    for length in lengths:
        yield _example(name, _floats(model, BATCH, length), 1)
        yield _example(name, _floats(model, BATCH, 1, length), 2)


def _frames(model: Any, name: str) -> Iterator[Example]:
    """Yield features of a sound, as frames of features or as features of frames.

    There are as many frames as encoders take, where they take no other number, or as belong to the
    example's words.
    """
    lengths = [
        _FRAMES,
        *(2 * count for count in _values(model.config, ("max_source_positions",))),
        *(
            count * (NEW + PAST_LENGTH)
            for count in _values(model.config, ("audio_length_per_tok",))
        ),
    ]
    bins = _values(model.config, _FEATURES)
    for features in (times * count for times in _STACKED for count in bins):
        for frames in lengths:
            yield _example(name, _floats(model, BATCH, frames, features), 1)
            yield _example(name, _floats(model, BATCH, features, frames), 2)


_MAKERS: dict[str, Callable[[Any, str], Iterator[Example]]] = {
    "input_ids": _words,
    "pixel_values": _pixels,
    "input_values": _waveform,
    "input_features": _frames,
}
"""What every input may look like, by its name; one called `inputs` may be any of them."""


def _example(name: str, value: Tensor, *lengths: int) -> Example:
    """Return one input of which the first dimension and the `lengths` are dynamic."""
    return Example({name: value}, {name: dict.fromkeys((0, *lengths), Dim.AUTO)})


def _floats(model: Any, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=model.dtype, device=model.device)


def longest_trial(model: Any) -> int:
    """Return the longest length that `model` may be run with to see whether it takes it.

    A position past a table raises on a processor; on a device it ends the process.
    """
    if model.device.type == "cpu":
        return 1 << 14
    declared = (declared_length(vars(part)) for part in configs(model.config))
    return min((length for length in declared if length is not None), default=1 << 14)


def configs(config: Any) -> list[Any]:
    """Return `config` and the configs inside it, at any depth."""
    parts = [config]
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        parts += configs(inner) if inner is not None else []
    return parts


def _values(config: Any, names: Iterable[str]) -> list[Any]:
    """Return the distinct values of fields of these names in `config` and the configs inside."""
    found = [getattr(part, name, None) for name in names for part in configs(config)]
    kept: list[Any] = []
    for value in (value() if callable(value) else value for value in found):
        if value is not None and value not in kept:
            kept.append(value)
    return kept
