"""The front end: a model becomes a `Program` through `torch.export`.

Nothing is traced symbolically: `torch.export` (non-strict) follows the model's own code and keeps
where every node came from. A transformers decoder is captured once, with its KV cache as inputs and
outputs and with batch, new and past lengths dynamic; that one graph then serves scoring,
verification, rewriting and export. Models on the meta device are captured without weights.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import (
    InputKind,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from graphprune.errors import CaptureError, UsageError, first_line
from graphprune.frontend.canonicalize import canonicalize
from graphprune.frontend.example_inputs import BATCH, NEW, PAST_LENGTH, Example, configs, example_of
from graphprune.ir.program import PAST, PRESENT, Kind, Program, Source, value_of
from graphprune.ir.provenance import module_path

FIXED_BATCH, FIXED_NEW, FIXED_PAST = 101, 103, 107
"""Sizes of a decoder captured on the meta device, where dynamic ones would cost four times the
time for a graph that can only be analysed: primes, so that no other size is taken for them."""

_FOLLOWED: ContextVar[tuple[Callable[..., ExportedProgram], ...]] = ContextVar(
    "followed", default=()
)
"""What else to try where a model decides by data what to do."""

_BRANCH = "graphprune_branch"
_ALONG = "captured along the way that its example takes at"
_EVERYWHERE = "captured with loops over what is found, such as experts, running over all places"


def capture(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    cache: bool | None = None,
    along_example: bool = False,
) -> Program:
    """Capture `model` into a program that shares its weights.

    Parameters
    ----------
    model
        A transformers model, or any `nn.Module`; may be on the meta device. It is captured in
        evaluation mode and left as it was.
    example_inputs
        Positional (a sequence) or keyword (a mapping) inputs. Not needed for transformers models,
        for which they follow from the config.
    dynamic_shapes
        As for `torch.export.export`; without it the first dimension of every example is dynamic
        where the model allows it.
    cache
        Whether a decoder is captured with its KV cache; by default it is wherever it has one.
    along_example
        Whether a model that looks at values to decide what to do is captured along the way that its
        example takes. The program is wrong for inputs that would go another way, and a note says
        where that is.

    Raises
    ------
    CaptureError
        When `torch.export` refuses, naming the module and line that it named.
    UsageError
        When a module that is no transformers model comes without example inputs.
    """
    with _evaluation_mode(model):
        if example_inputs is None:
            if not _is_transformers_model(model):
                raise UsageError(
                    f"{type(model).__name__} is no transformers model: give example_inputs"
                )
            return _capture_transformers(model, cache, along_example)
        with _following(*[_export_along_example] * along_example):
            return _capture_call(model, example_inputs, dynamic_shapes)


# -- plain modules ------------------------------------------------------------------------------


class _Flat(nn.Module):
    """Calls `inner` on tensors rebuilt from a flat list, and flattens what comes back.

    The outputs' names go to `record`, since export takes back what a forward does to its module.
    """

    def __init__(
        self,
        inner: nn.Module,
        spec: pytree.TreeSpec,
        keep: Callable[[str], bool],
        record: Callable[[list[str]], None],
    ) -> None:
        super().__init__()
        self.inner = inner
        self.spec = spec
        self.keep = keep
        self.record = record

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(list(flat), self.spec)
        names, leaves = _named_leaves(self.inner(*args, **kwargs), "output")
        chosen = [i for i, name in enumerate(names) if self.keep(name)]
        self.record([names[i] for i in chosen])
        return tuple(leaves[i] for i in chosen)


def _named_leaves(tree: Any, root: str) -> tuple[list[str], list[Tensor]]:
    """The tensors in `tree` with dotted names (`root` for a bare tensor)."""
    names, leaves = [], []
    if isinstance(tree, Mapping):  # a transformers ModelOutput among them
        tree = dict(tree)
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            keys = [
                str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
                for key in path
            ]
            names.append(
                ".".join(keys) if keys and not keys[0].isdigit() else ".".join([root, *keys])
            )
            leaves.append(leaf)
    return names, leaves


def _capture_call(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: Any = None,
    keep: Callable[[str], bool] = lambda name: True,
    source: Source | None = None,
    notes: tuple[str, ...] = (),
) -> Program:
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        raise UsageError("example_inputs is a tensor: give a tuple of inputs, such as (x,)")
    flat, spec = pytree.tree_flatten((args, kwargs))
    if not flat or not all(isinstance(leaf, Tensor) for leaf in flat):
        raise UsageError("example_inputs must hold tensors only (nested in tuples, lists, dicts)")
    parameters = list(inspect.signature(model.forward).parameters)
    named = dict(zip(parameters, args, strict=False)) | kwargs
    names, _ = _named_leaves(named, "input")
    if dynamic_shapes is None:
        attempts = [({0: Dim.AUTO} if leaf.ndim else None for leaf in flat)]
        if all(leaf.ndim and leaf.shape[0] == 1 for leaf in flat):
            # A batch of one would be taken as a constant.
            flat = [torch.cat([leaf, leaf]) for leaf in flat]
        shapes: Any = (tuple(attempts[0]),)
    else:
        leaves = pytree.tree_leaves(dynamic_shapes, is_leaf=lambda x: x is None or _is_dims(x))
        shapes = (tuple(leaves),)
    recorded: list[list[str]] = []
    wrapper = _Flat(model, spec, keep, recorded.append)
    exported = _export(wrapper, tuple(flat), shapes, type(model).__name__)
    return _program(exported, model, names, recorded[-1], source, notes)


def _is_dims(tree: Any) -> bool:
    """Whether `tree` describes one tensor of a `dynamic_shapes` argument."""
    keys = isinstance(tree, Mapping) and all(isinstance(key, int) for key in tree)
    return keys or (isinstance(tree, tuple | list) and not any(map(_is_dims, tree)))


# -- transformers models ------------------------------------------------------------------------


def _is_transformers_model(model: nn.Module) -> bool:
    import transformers

    return isinstance(model, transformers.PreTrainedModel)


class _Decoder(nn.Module):
    """A decoder as a function of ids, mask and past keys and values.

    Positions are counted on the mask, so that a batch padded on either side is right without an
    input of its own.
    """

    def __init__(self, inner: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.inner = inner
        self.layers = layers
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
        first = result["logits"] if "logits" in result else result["last_hidden_state"]
        return (first, *(tensor for layer in kept for tensor in (layer.keys, layer.values)))


def _filled_cache(past: Sequence[Tensor], layers: Sequence[int]) -> Any:
    """A transformers cache that already holds `past` (keys and values in turn) at `layers`."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(max(layers) + 1)]
    for position, index in enumerate(layers):
        layer = cache.layers[index]
        keys, values = past[2 * position], past[2 * position + 1]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def _capture_transformers(model: Any, cache: bool | None, along_example: bool = False) -> Program:
    source = Source(
        model.config, type(model), generation_config=getattr(model, "generation_config", None)
    )
    example = functools.cache(lambda: example_of(model))
    on_meta = model.device.type == "meta"
    follow = [_export_with_all_found, *[_export_along_example] * along_example]
    follow = [] if on_meta else follow
    with _exportable_experts(model), _broadcast_masks() as broadcast, _following(*follow):
        program = _captured_with(model, cache, source, example)
    branched = any(note.startswith((_ALONG, _EVERYWHERE)) for note in program.notes)
    if (broadcast or branched) and not on_meta:
        what = (
            "branches on data in more ways than one"
            if branched
            else "makes a mask that is no function of each place alone"
        )
        _check_outputs(program, model, example(), what)
    return program


def _captured_with(
    model: Any, cache: bool | None, source: Source, example: Callable[[], Example]
) -> Program:
    """Capture `model` with its cache where it has one and where that is wanted."""
    if cache is not False:
        layers, why = _cache_layers(model)
        if layers:
            try:
                return _capture_decoder(model, layers, source)
            except CaptureError as error:
                if cache:
                    raise
                why = str(error)
        if cache:
            raise CaptureError(f"{type(model).__name__} has no KV cache to capture: {why}")
        notes = (f"captured without a cache: {why}",) if why and model.can_generate() else ()
    else:
        notes = ("captured without a cache, as asked",)
    return _capture_whole(model, source, notes, example())


@contextlib.contextmanager
def _broadcast_masks() -> Iterator[list[Any]]:
    """Let masks that transformers makes with `vmap` be made by broadcasting, as its others are.

    A graph cannot be read through `vmap`. A mask is a function of four indices, which gives the
    same for all of them at once where it works on each place alone; `_check_masks` looks whether
    it does. Yields the functions that were broadcast.
    """
    from transformers import masking_utils

    before = masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex
    seen: list[Any] = []

    def broadcast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mask(*indices: Tensor) -> Tensor:
            seen.append(function)
            made = function(*masking_utils._non_vmap_expansion_sdpa(*indices))
            return made.expand([index.shape[0] for index in indices])

        return mask

    masking_utils._vmap_expansion_sdpa = broadcast
    masking_utils.TransformGetItemToIndex = contextlib.nullcontext  # it serves `vmap` alone
    try:
        yield seen
    finally:
        masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex = before


def _check_outputs(program: Program, model: Any, example: Example, what: str) -> None:
    """Refuse a program that does not compute what the model does, which `what` would explain.

    It is run on the example, and on other tokens that the model takes.
    """
    names = [value.name for value in program.inputs]
    inputs = {name: tensor for name, tensor in example.inputs.items() if name in names}
    name = program.outputs[0].name
    for each in (inputs, _other_tokens(model, inputs)):
        try:
            with torch.no_grad():
                result = model(**each, return_dict=True)
        except Exception:  # noqa: BLE001 - tokens drawn at random may mean anything
            continue
        expected = result[name] if name in result else result["last_hidden_state"]
        try:
            found = program(**each)[name]
        except Exception as error:  # a graph of another way fails in any way
            raise CaptureError(
                f"{type(model).__name__} {what}: {_first_line_and_place(error)}"
            ) from error
        off = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        if not off <= torch.finfo(found.dtype).eps ** 0.5:
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


def _capture_whole(model: Any, source: Source, notes: tuple[str, ...], example: Example) -> Program:
    """Capture a model as one call, with as many dynamic sizes as its graph holds for."""
    first = {name: {0: of[0]} for name, of in example.dims.items()}
    fixed = dict.fromkeys(example.dims)
    attempts = ((example.dims, ""), (first, "a length"), (fixed, "a batch size and a length"))

    def captured(shapes: Mapping[str, Any], notes: tuple[str, ...]) -> Program:
        return _capture_call(
            model,
            example.inputs,
            shapes,
            keep=lambda name: name.split(".")[0] not in _INNER,
            source=source,
            notes=notes,
        )

    for shapes, what in attempts:
        why = f"captured for {what} of its own: its graph holds for no other" if what else ""
        said = (*notes, why) if why else notes
        try:
            program = captured(shapes, said)
            if shared := _mask_dims(program):
                with contextlib.suppress(CaptureError):
                    program = captured({**shapes, **shared}, said)
        except CaptureError:
            if shapes is fixed:
                raise
            continue
        if all(_holds_for(program, *sizes) for sizes in ((3, 7), (2, 11))):
            break
        longer = _from_lengths_on(program, [tensor.shape for tensor in example.inputs.values()])
        if longer is not None:
            return longer
    return program


def _mask_dims(program: Program) -> dict[str, Any]:
    """Dynamic dimensions for tokens and masks whose sizes are told apart though they are one.

    A graph that only cuts its mask to length, or broadcasts it, does not say that they are equal.
    """
    shapes = {value.name: value.shape for value in program.inputs}
    dims: dict[str, Any] = {}
    for name, shape in shapes.items():
        tokens = name.replace("attention_mask", "input_ids")
        sizes = shapes.get(tokens, ())[: len(shape)]  # there may be several tokens at one place
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
    """`program` for signals of the example's length on, where its graph holds for longer ones.

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
    longer = replace(program, ranges=ranges, notes=(*program.notes, why))
    if not least or not all(_holds_for(longer, 3, more, least) for more in (7, 11)):
        return None
    return longer


def _holds_for(
    program: Program, batch: int, length: int, least: Mapping[str, int] | None = None
) -> bool:
    """Whether the graph takes these sizes for its dynamic ones: tried on tensors without data.

    Some code takes other ways for other sizes, of which `torch.export` keeps one. Lengths are
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
            weights = [torch.empty(w.shape, dtype=w.dtype) for w in program.weights.values()]
            inputs = [
                torch.empty([sizes.get(s, s) for s in v.shape], dtype=v.dtype)  # type: ignore[arg-type]
                for v in program.inputs
            ]
            fx.Interpreter(program.graph_module).run(*weights, *inputs)
    except Exception:  # noqa: BLE001 - operators refuse sizes in any way
        return False
    return True


def _cache_layers(model: Any) -> tuple[list[tuple[int, Tensor, Tensor]], str]:
    """(layer, keys, values) that a short run leaves in the model's cache, or why there is none."""
    names = inspect.signature(model.forward).parameters
    if getattr(model.config, "is_encoder_decoder", False):
        return [], "an encoder-decoder is captured as one call"
    if not {"past_key_values", "use_cache", "input_ids"} <= set(names):
        return [], "its forward takes no past_key_values"
    ids = torch.zeros((BATCH, NEW), dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _without_pad_token(model.config):
            warnings.simplefilter("ignore")
            result = model(input_ids=ids, use_cache=True, return_dict=True)
    except Exception as error:  # noqa: BLE001 - any model code may fail in any way here
        return [], f"a short run failed: {_first_line_and_place(error)}"
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


@contextlib.contextmanager
def _without_pad_token(config: Any) -> Iterator[None]:
    """Let no model look for padding in its ids, which it cannot on the meta device."""
    token = getattr(config, "pad_token_id", None)
    if token is not None:
        with contextlib.suppress(Exception):  # some configs insist on one
            config.pad_token_id = None
    try:
        yield
    finally:
        if token is not None:
            config.pad_token_id = token


def _capture_decoder(
    model: Any, layers: Sequence[tuple[int, Tensor, Tensor]], source: Source
) -> Program:
    fixed = model.device.type == "meta"
    rows, new, held = BATCH, NEW, PAST_LENGTH
    if fixed:
        rows, new, held = FIXED_BATCH, FIXED_NEW, FIXED_PAST
    ids = torch.zeros((rows, new), dtype=torch.int64, device=model.device)
    mask = torch.ones((rows, held + new), dtype=torch.int64, device=model.device)
    past, names = [], []
    for position, (_, keys, values) in enumerate(layers):
        for kind, like in (("key", keys), ("value", values)):
            shape = (rows, like.shape[1], held, like.shape[3])
            past.append(torch.zeros(shape, dtype=like.dtype, device=model.device))
            names.append(f"{position}.{kind}")
    wrapper = _Decoder(model, [index for index, _, _ in layers])
    shapes, fallback = _decoder_dims(len(past)), None
    notes: tuple[str, ...] = ()
    if fixed:
        shapes = (None, None, [None] * len(past))
        notes = ("captured without weights and with fixed sizes: it can be analysed, not run",)
    else:
        fallback = ({0: Dim.AUTO, 1: Dim.AUTO},) * 2 + ([{0: Dim.AUTO, 2: Dim.AUTO}] * len(past),)
    exported = _export(wrapper, (ids, mask, past), shapes, type(model).__name__, fallback)
    inputs = ["input_ids", "attention_mask", *(PAST + name for name in names)]
    outputs = ["logits", *(PRESENT + name for name in names)]
    sizes = {rows, new, held, new + held} if fixed else set()
    return _program(exported, model, inputs, outputs, source, notes, sizes)


def _decoder_dims(caches: int) -> tuple[Any, ...]:
    """Names for the dynamic sizes of ids, mask and caches, so that all caches share one length."""
    batch, new, held = Dim("batch", min=1), Dim("new", min=1), Dim("past", min=0)
    return {0: batch, 1: new}, {0: batch, 1: Dim.AUTO}, [{0: batch, 2: held}] * caches


@contextlib.contextmanager
def _exportable_experts(model: Any) -> Iterator[None]:
    """Let packed experts run as batched products, which every back end can express."""
    switched = [c for c in configs(model.config) if hasattr(c, "_experts_implementation")]
    before = [c._experts_implementation for c in switched]
    for config in switched:
        config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        for config, value in zip(switched, before, strict=True):
            config._experts_implementation = value


# -- torch.export -------------------------------------------------------------------------------


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _export(
    module: nn.Module, args: tuple[Any, ...], shapes: Any, name: str, fallback: Any = None
) -> ExportedProgram:
    try:
        return _exported(module, args, shapes)
    except Exception as error:
        for attempt in _FOLLOWED.get():
            with contextlib.suppress(Exception):  # then the first error says more
                return attempt(module, args, shapes, error)
        if fallback is not None:
            return _export(module, args, fallback, name)
        advice = ""
        if isinstance(error, GuardOnDataDependentSymNode):
            advice = "; along_example=True captures the way that the example takes"
        raise CaptureError(
            f"torch.export could not capture {name}: {_first_line_and_place(error)}{advice}"
        ) from error


def _exported(module: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    # Without no_grad, the grad-mode switches in transformers' rotary code become sub-graphs.
    with torch.no_grad(), warnings.catch_warnings(), _quietly(), _unmoved():
        warnings.simplefilter("ignore")
        return torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)


def _export_with_all_found(
    module: nn.Module, args: tuple[Any, ...], shapes: Any, error: Exception
) -> ExportedProgram:
    """The graph in which a loop over the places that are found runs over all that there are.

    For what is not found, such as an expert that no token chose, code does nothing:
    `_check_outputs` looks whether it does.
    """
    with _AllFound() as mode:
        exported = _exported(module, args, shapes)
    if not mode.count:
        raise error
    exported.graph_module.meta[_BRANCH] = _EVERYWHERE
    return exported


class _AllFound(TorchFunctionMode):
    """Lets `nonzero` find every place of a vector of fixed length."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.nonzero, torch.nonzero) and not kwargs.get("as_tuple"):
            (vector,) = args
            if vector.dim() == 1 and type(vector.shape[0]) is int:
                self.count += 1
                return [_Place([place]) for place in range(vector.shape[0])]
        result = func(*args, **kwargs)
        if func is torch.where and len(args) == 1:
            # Code that goes on where nothing is found does the same for nothing.
            torch._check(result[0].shape[0] > 0)
        return result


class _Place(list[int]):
    """A row of what `nonzero` gives: a list of one index, or the index, as code takes it."""

    def item(self) -> int:
        return self[0]

    __index__ = __int__ = item


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """Let a module that is already where it is moved to stay as it is.

    `torch.export` lets no module be moved while it is traced, but some code moves one to its own
    type each time.
    """
    move = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        held = (*self.parameters(), *self.buffers())
        there = all(
            device in (None, t.device) and (not t.is_floating_point() or dtype in (None, t.dtype))
            for t in held
        )
        return self if there and form is None else move(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def _export_along_example(
    module: nn.Module, args: tuple[Any, ...], shapes: Any, error: Exception
) -> ExportedProgram:
    """The graph of the way that the values of `args` take where `error` met a branch on data."""
    if not isinstance(error, GuardOnDataDependentSymNode):
        raise error
    with functorch.patch(fake_tensor_propagate_real_tensors=True):
        exported = _exported(module, args, shapes)
    for node in exported.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                value.real_tensor = None  # as large as what it stands for
                value.fake_mode.propagate_real_tensors = False
    _check_dynamic(exported, shapes)
    where = _first_line_and_place(error).rpartition(" (at ")[2].rstrip(")")
    aside = "inputs that go another way there are computed wrongly"
    exported.graph_module.meta[_BRANCH] = f"{_ALONG} {where}: {aside}"
    return exported


def _check_dynamic(exported: ExportedProgram, shapes: Any) -> None:
    """Refuse a graph that took a size for a constant which was to be dynamic."""
    kinds = exported.graph_signature.input_specs
    nodes = exported.graph.find_nodes(op="placeholder")
    inputs = [
        node for node, spec in zip(nodes, kinds, strict=True) if spec.kind == InputKind.USER_INPUT
    ]
    wanted = pytree.tree_leaves(shapes, is_leaf=lambda tree: tree is None or isinstance(tree, dict))
    for node, dims in zip(inputs, wanted, strict=True):
        for dim, how in (dims or {}).items():
            size = node.meta["val"].shape[dim]
            constant = type(size) is int or size.node.maybe_as_int() is not None
            if constant and how not in (None, Dim.STATIC):
                raise CaptureError(f"dimension {dim} of {node.name} became a constant")


@contextlib.contextmanager
def _following(*attempts: Callable[..., ExportedProgram]) -> Iterator[None]:
    """Try `attempts`, too, where a model decides by data what to do."""
    token = _FOLLOWED.set(attempts)
    try:
        yield
    finally:
        _FOLLOWED.reset(token)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep `torch.export` from printing the graph so far before it raises, and its guards."""
    from torch.export import _trace

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    _trace.print = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _trace.print  # type: ignore[attr-defined]
        logger.setLevel(level)


def _first_line_and_place(error: BaseException) -> str:
    where = ""
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "/transformers/models/" in path or "/torch/" not in path and "/graphprune/" not in path:
            where = f" (at {'/'.join(path.split('/')[-2:])}:{trace.tb_lineno})"
        trace = trace.tb_next
    return first_line(error, typed=True) + where


def _program(
    exported: ExportedProgram,
    model: nn.Module,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: Source | None = None,
    notes: tuple[str, ...] = (),
    dynamic: Collection[int] = (),
) -> Program:
    graph_module = exported.graph_module
    if said := graph_module.meta.pop(_BRANCH, ""):
        notes = (*notes, said)
    graph = graph_module.graph
    canonical, aliases = _ties(model)
    originals: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    originals.update(model.named_buffers(remove_duplicate=False))
    stored = set(model.state_dict(keep_vars=True))
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    weights: dict[str, Tensor] = {}
    kinds: dict[str, Kind] = {}
    nodes: dict[str, fx.Node] = {}
    user: list[fx.Node] = []
    for spec in exported.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            user.append(node)
            continue
        target = (spec.target or "").removeprefix("inner.")
        name = canonical.get(target, target)
        if name in nodes:
            # A tied weight has a placeholder per name; one of them is enough.
            node.replace_all_uses_with(nodes[name])
            graph.erase_node(node)
            continue
        nodes[name] = node
        tensor = originals.get(name, exported.constants.get(spec.target or ""))
        assert tensor is not None, f"torch.export lifted {name!r} and kept no value"
        weights[name] = tensor.detach()
        if spec.kind == InputKind.PARAMETER:
            kinds[name] = "parameter"
        elif spec.kind == InputKind.BUFFER:
            kinds[name] = "buffer" if name in stored else "derived"
        else:
            kinds[name] = "constant"
    constants = {nodes[n]: weights[n] for n, kind in kinds.items() if kind == "constant"}
    lifted = canonicalize(graph, constants, dynamic)
    for name in [n for n, kind in kinds.items() if kind == "constant" and not nodes[n].users]:
        graph.erase_node(nodes[name])
        del weights[name], kinds[name]
    made = {".".join(filter(None, (module_path(n), n.name))): v for n, v in lifted.items()}
    weights = {**made, **weights}
    kinds = {**dict.fromkeys(made, "constant"), **kinds}
    (output,) = graph.find_nodes(op="output")
    count = len(output_names)
    output.args = (tuple(output.args[0][-count:]),)
    graph.lint()
    graph_module.recompile()
    return Program(
        graph_module=graph_module,
        weights=weights,
        kinds=kinds,
        aliases=aliases,
        inputs=tuple(value_of(name, node) for name, node in zip(input_names, user, strict=True)),
        outputs=tuple(
            value_of(name, node) for name, node in zip(output_names, output.args[0], strict=True)
        ),
        source=source,
        ranges=dict(exported.range_constraints),
        notes=notes,
    )


def _ties(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Every name of a tied weight -> its first name; and the same without the first names."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        canonical[name] = first.setdefault(id(tensor), name)
    return canonical, {name: to for name, to in canonical.items() if name != to}
