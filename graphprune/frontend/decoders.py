"""Capture of a transformers decoder with its KV cache as inputs and outputs."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from graphprune.frontend.example_inputs import BATCH, NEW, PAST_LENGTH, longest_trial
from graphprune.frontend.from_exported import few_values, to_program
from graphprune.frontend.patches.transformers_code import without_pad_token
from graphprune.frontend.sizes import LENGTHS, ROWS, conditions_of, limited
from graphprune.frontend.torch_export import Follow, export, line_and_place
from graphprune.ir.nodes import size_of
from graphprune.ir.program import PAST, PRESENT, Note, Program
from graphprune.ir.provenance import Source
from graphprune.weights.models import light_zeros, values_lent

_STAND_INS = (101, 103, 107)
"""Batch, new and past length of a decoder captured on the meta device, where dynamic
ones would cost four times the time for a graph that can only be analyzed: primes, so that no other
size is taken for them."""


def cache_layers(
    model: Any, *, without_data: bool = False
) -> tuple[list[tuple[int, Tensor, Tensor]], str]:
    """Return (layer, keys, values) that a short run leaves in the cache, or why there is none.

    Without data, sizes alone are computed.
    """
    names = inspect.signature(model.forward).parameters
    if getattr(model.config, "is_encoder_decoder", False):
        return [], "an encoder-decoder is captured as one call"
    if not {"past_key_values", "use_cache", "input_ids"} <= set(names):
        return [], "its forward takes no past_key_values"
    ids = torch.zeros((BATCH, NEW), dtype=torch.int64, device=model.device)
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True) if without_data else nullcontext()
        with torch.no_grad(), warnings.catch_warnings(), without_pad_token(model.config), mode:
            warnings.simplefilter("ignore")
            result = model(input_ids=ids, use_cache=True, return_dict=True)
    except Exception as error:  # noqa: BLE001 - any model code may fail in any way here
        return [], f"a short run failed: {line_and_place(error)}"
    held = getattr(result, "past_key_values", None)
    found = []
    for index, layer in enumerate(getattr(held, "layers", ())):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor)):
            continue
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[2] != NEW:
            return [], f"layer {index} caches something other than keys and values per token"
        found.append((index, keys, values))
    others = [layer for layer in getattr(held, "layers", ()) if not hasattr(layer, "keys")]
    if others:
        return [], f"its cache holds a {type(others[0]).__name__}"
    return found, "" if found else "a short run left nothing in it"


def capture_decoder(
    model: Any,
    layers: Sequence[tuple[int, Tensor, Tensor]],
    source: Source,
    *,
    follow: Sequence[Follow] = (),
    fixed: bool = False,
) -> Program:
    """Capture `model` with a cache of `layers`, as `cache_layers` finds them.

    Where `fixed` is said, and on the meta device, sizes that would be dynamic are numbers.

    Raises
    ------
    CaptureError
        When `torch.export` refuses.
    """
    fixed = fixed or model.device.type == "meta"
    rows, new, held = _STAND_INS if fixed else (BATCH, NEW, PAST_LENGTH)
    ids = torch.zeros((rows, new), dtype=torch.int64, device=model.device)
    mask = torch.ones((rows, held + new), dtype=torch.int64, device=model.device)
    past, names = [], []
    for position, (_, keys, values) in enumerate(layers):
        for kind, like in (("key", keys), ("value", values)):
            shape = (rows, like.shape[1], held, like.shape[3])
            empty = light_zeros(torch.Size(shape), like.dtype)
            past.append(empty if model.device.type == "cpu" else empty.to(model.device))
            names.append(f"{position}.{kind}")
    first: list[str] = []
    wrapper = _Decoder(model, [index for index, _, _ in layers], first.append)
    shapes, fallback = _decoder_dims(len(past)), None
    notes: tuple[Note, ...] = ()
    if fixed:
        shapes = (None, None, [None] * len(past))
        text = "captured without weights and with fixed sizes: it can be analyzed, not run"
        notes = (Note("stand-ins", text),)
    else:
        fallback = ({0: Dim.AUTO, 1: Dim.AUTO},) * 2 + ([{0: Dim.AUTO, 2: Dim.AUTO}] * len(past),)
    name = type(model).__name__
    args = (ids, mask, past)
    exported = export(wrapper, args, shapes, name, follow=follow, fallback=fallback)
    inputs = ["input_ids", "attention_mask", *(PAST + name for name in names)]
    outputs = [first[-1], *(PRESENT + name for name in names)]
    stand_ins = {rows: "batch", new: "new", held: "past", new + held: "total"} if fixed else {}
    program = to_program(exported, model, inputs, outputs, source, notes, stand_ins)
    if fixed:
        return program
    conditions = conditions_of(exported, program)
    most = longest_trial(model)
    candidates = [dict(_sizes(program, *each)) for each in _candidates() if sum(each[1:]) <= most]
    with few_values(program, model) as compared:
        found = limited(
            compared,
            conditions,
            wrapper.computed,
            lambda sizes: _inputs(program, sizes, model),
            candidates,
        )
    return replace(found, weights=program.weights)


def _candidates() -> Iterator[tuple[int, int, int]]:
    """Yield rows, new and past lengths to try: whole texts, and one more token after a text."""
    for rows, length in itertools.product(ROWS, LENGTHS):
        yield rows, length, 0
        yield rows, 1, length


def _sizes(program: Program, rows: int, new: int, past: int) -> Iterator[tuple[str, int]]:
    for value in program.inputs:
        held = past if value.name.startswith(PAST) else past * (value.name == "attention_mask")
        wanted = (rows, None, past, None) if value.name.startswith(PAST) else (rows, new + held)
        for symbol, size in zip(value.shape, wanted, strict=True):
            if size is not None and str(symbol).isidentifier():  # no sum of past and new
                yield str(symbol), size


def _inputs(program: Program, sizes: Mapping[str, int], model: Any) -> list[Tensor]:
    """Make random tokens and a random past of these sizes."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 2
    made = []
    for value, node in program.input_nodes():
        shape = [size_of(size, sizes) for size in node.meta["val"].shape]
        if value.name.startswith(PAST):
            tensor = torch.randn(shape, generator=generator).to(value.dtype)
        elif value.name == "input_ids":
            tensor = torch.randint(0, vocabulary, shape, generator=generator)
        else:
            tensor = torch.ones(shape, dtype=value.dtype)
        made.append(tensor.to(model.device))
    return made


def _decoder_dims(caches: int) -> tuple[Any, ...]:
    """Name the dynamic sizes of ids, mask and caches, so that all caches share one length."""
    batch, new, held = Dim("batch", min=1), Dim("new", min=1), Dim("past", min=0)
    return {0: batch, 1: new}, {0: batch, 1: Dim.AUTO}, [{0: batch, 2: held}] * caches


class _Decoder(nn.Module):
    """A decoder as a function of ids, mask and past keys and values.

    Positions are counted on the mask, so that a batch padded on either side is right without an
    input of its own. What the model calls its first output goes to `record`.
    """

    def __init__(
        self, inner: nn.Module, layers: Sequence[int], record: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.inner = inner
        self.layers = layers
        self.record = record
        self.takes_positions = "position_ids" in inspect.signature(inner.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = _filled_cache(past, self.layers)
        extra = {}
        if self.takes_positions:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            extra["position_ids"] = positions[:, -input_ids.shape[1] :]
        result = self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **extra,
        )
        kept = [cache.layers[index] for index in self.layers]
        name = "logits" if "logits" in result else "last_hidden_state"
        self.record(name)
        return (result[name], *(tensor for layer in kept for tensor in (layer.keys, layer.values)))

    def computed(self, ids: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Return what the decoder gives with the values of its weights."""
        with values_lent(self.inner):
            result: tuple[Tensor, ...] = self(ids, mask, list(past))
        return result


def _filled_cache(past: Sequence[Tensor], layers: Sequence[int]) -> Any:
    """Return a cache that already holds `past` (keys and values in turn) at `layers`."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(max(layers) + 1)]
    for position, index in enumerate(layers):
        layer = cache.layers[index]
        keys, values = past[2 * position], past[2 * position + 1]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache
