"""The IR: a captured graph of ATen operators together with its weights."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from graphprune.errors import UsageError, nearest
from graphprune.io.extensions import extension
from graphprune.ir import input_sizes
from graphprune.ir.devices import device_of, module_on
from graphprune.ir.provenance import Source
from graphprune.weights.deferred import converted, made
from graphprune.weights.overlay import overlaid
from graphprune.weights.placement import Placement
from graphprune.weights.tensors import type_name

if TYPE_CHECKING:
    from os import PathLike


Kind = Literal["parameter", "buffer", "derived", "constant"]
"""A weight is a parameter, a persistent buffer, a buffer that checkpoints do not hold ("derived",
such as rotary frequencies), or a constant that capture lifted out of the code."""

PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of the cache inputs and outputs of a decoder."""


@dataclass(frozen=True)
class Value:
    """An input or output of a program.

    Parameters
    ----------
    name
        As users and ONNX see it, such as ``past_key_values.0.key``.
    node
        The name of its node in the graph.
    shape
        Sizes; a dynamic size is the name of its symbol.
    dtype
        Element type.
    """

    name: str
    node: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def is_cache(self) -> bool:
        """Whether it is a cache that goes in, which is empty before the first token."""
        return self.name.startswith(PAST)


NoteKind = Literal[
    "",
    "no-cache",
    "stand-ins",
    "fixed-size",
    "least-size",
    "limited-size",
    "example-path",
    "full-loops",
    "optional-input",
    "state",
    "no-source",
    "unread-weights",
]


@dataclass(frozen=True)
class Note:
    """A remark on how a program was captured: a kind for code, a text of one sentence for people.

    Parameters
    ----------
    kind
        ``no-cache``: a model that generates has none. ``stand-ins``: no weights; dynamic sizes are
        numbers. ``fixed-size``, ``least-size``, ``limited-size``: of an input. ``example-path``: of
        a branch on data, the example's. ``full-loops``: loops over what is found take everything.
        ``optional-input``: types of tokens are zero if left out. ``state``: what a call writes is
        not kept. ``no-source``: its transformers model is unknown. ``unread-weights``: files hold
        weights that the model has not. "": old archives.
    """

    kind: NoteKind
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A captured model: an ATen graph whose placeholders are its weights, then its inputs.

    A program is never edited; passes return new ones, which share the tensors that did not change.

    Parameters
    ----------
    graph_module
        The graph; its output is a flat tuple.
    weights
        Every parameter, buffer and constant by the model's own dotted name, in the order of the
        placeholders, in the type in which it is stored. A tied weight is one entry. Those that lie
        in files are read where they are used (`graphprune.weights.deferred`).
    kinds
        The kind of each weight.
    aliases
        Tied name -> the name that holds the weight in `weights`.
    inputs, outputs
        What goes in and out, in order.
    source
        The transformers model behind it, if any.
    ranges
        Ranges of the dynamic sizes, as `torch.export` gives them.
    notes
        What capture had to fix, limit, assume or leave out.
    stand_ins
        Sizes that stand for dynamic ones in a program without weights -> "batch", "new", "past" or
        "total" (new and past); empty for programs that run.
    limits
        Dynamic sizes for which the graph does not hold everywhere -> the least and the most (None
        where there is none) that it takes; other sizes are refused when the program is called.
    """

    graph_module: fx.GraphModule
    weights: Mapping[str, Tensor]
    kinds: Mapping[str, Kind]
    aliases: Mapping[str, str]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    source: Source | None = None
    ranges: Mapping[Any, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    stand_ins: Mapping[int, str] = field(default_factory=dict)
    limits: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    placement: Placement = Placement()

    # -- looking --------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The `torch.fx` graph."""
        return self.graph_module.graph

    @property
    def context_length(self) -> int | None:
        """The longest text that the model's config declares, in tokens; None where it does not."""
        return None if self.source is None else self.source.context_length

    @property
    def is_decoder(self) -> bool:
        """Return whether a KV cache goes in and out."""
        return any(value.is_cache for value in self.inputs)

    @property
    def lacks_values(self) -> bool:
        """Return whether weights are on the meta device: there is a graph and nothing to run."""
        return any(weight.is_meta for weight in self.weights.values())

    def within(self, symbol: int | str, wanted: int) -> int:
        """Return a size for `symbol`, as near to `wanted` as it may be; a number is itself."""
        if isinstance(symbol, int):
            return symbol
        least, most = self._bounds.get(symbol, (0, None))
        return max(least, wanted if most is None else min(most, wanted))

    @functools.cached_property
    def _bounds(self) -> Mapping[str, tuple[int, int | None]]:
        return input_sizes.bounds(self.ranges, self.limits)

    def weight_nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Every weight's name with its placeholder."""
        yield from zip(self.weights, self.graph.find_nodes(op="placeholder"), strict=False)

    def input_nodes(self) -> Iterator[tuple[Value, fx.Node]]:
        """Every input with its placeholder."""
        placeholders = self.graph.find_nodes(op="placeholder")
        yield from zip(self.inputs, placeholders[len(self.weights) :], strict=True)

    def output_nodes(self) -> Iterator[tuple[Value, fx.Node]]:
        """Every output with the node that computes it."""
        (output,) = self.graph.find_nodes(op="output")
        yield from zip(self.outputs, output.args[0], strict=True)

    def weight(self, name: str) -> Tensor:
        """Return the weight called `name`, which may be a tied name.

        Raises
        ------
        UsageError
            When the program has no such weight.
        """
        name = self.aliases.get(name, name)
        if name not in self.weights:
            hint = nearest(name, [*self.weights, *self.aliases])
            raise UsageError(f"the program has no weight {name!r}{hint}")
        return self.weights[name]

    @property
    def device(self) -> torch.device:
        """The device that the program computes on: as it was placed, or where its weights lie."""
        return self.placement.device or device_of(self.weights.values())

    @functools.cached_property
    def compute_types(self) -> Mapping[str, torch.dtype]:
        """The type in which the graph computes with each weight, which may be stored in another."""
        return {name: node.meta["val"].dtype for name, node in self.weight_nodes()}

    @property
    def operands(self) -> dict[str, Tensor]:
        """Every weight as the graph computes with it: in its compute type, on the device.

        Those that have to be read or converted for it are so where they are used, each time.
        """
        return self.as_operands(self.weights)

    def as_operands(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return other weights of the program as `operands` gives its own."""
        device, types = self.placement.device, self.compute_types
        return {n: converted(w, types[n], device or w.device) for n, w in weights.items()}

    def take(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the weights called `names` as the graph computes with them."""
        operands = self.as_operands({name: self.weights[name] for name in names})
        return {name: made(weight) for name, weight in operands.items()}

    def parameter_count(self) -> int:
        """Return the number of parameters; tied ones count once."""
        return sum(weight.numel() for weight in self._parameters())

    def kv_bytes_per_token(self) -> int:
        """Return the bytes that one more token takes in the KV cache (0 when there is none)."""
        total = 0
        for value in self.inputs:
            if value.is_cache:
                _, heads, _, width = value.shape
                total += int(heads) * int(width) * value.dtype.itemsize
        return total

    def __repr__(self) -> str:
        kind = "Program" if self.source is None else self.source.model_class.__name__
        types = ", ".join(sorted({type_name(w.dtype) for w in self._parameters()}))
        lines = [f"{kind}: {self.parameter_count():,} parameters ({types or 'no weights'})"]
        for word, values in (("in", self.inputs), ("out", self.outputs)):
            plain = [value for value in values if not value.name.startswith((PAST, PRESENT))]
            shown = [f"{value.name} [{', '.join(map(str, value.shape))}]" for value in plain]
            if cached := len(values) - len(plain):
                shown.append(f"{cached} of the KV cache")
            lines.append(f"  {word:4}{', '.join(shown)}")
        if per_token := self.kv_bytes_per_token():
            lines.append(f"  KV cache {per_token:,} bytes per token")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the biggest groups too, in a terminal of IPython."""
        printer.text(extension("graphprune.renderers", "program")(self))

    def _repr_html_(self) -> str:
        """Show the biggest groups too, in a notebook."""
        return str(extension("graphprune.renderers", "program")(self, as_html=True))

    def _parameters(self) -> Iterator[Tensor]:
        return (w for name, w in self.weights.items() if self.kinds[name] == "parameter")

    def fingerprint(self) -> str:
        """Return a digest of names, kinds and shapes of parameters and buffers, not of values.

        Plans are made for it; that their groups reach the same slices is checked beside it.
        """
        held = {
            name: (self.kinds[name], *weight.shape)
            for name, weight in self.weights.items()
            if self.kinds[name] != "constant"
        }
        left_out = input_sizes.TYPES if self._types_may_be_zero else None
        promised = [v.name for v in (*self.inputs, *self.outputs) if v.name != left_out]
        text = repr((sorted(held.items()), sorted(self.aliases.items()), promised))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # -- running --------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, *args: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the program; positional arguments follow the order of `inputs`.

        For a decoder the cache may be left out (it is then empty), as may an attention mask (it is
        then all ones) and, where a note says so, types of tokens (they are then zero).

        Returns
        -------
        dict
            Tensors by output name.

        Raises
        ------
        UsageError
            When an input is missing, unknown, no tensor, or of a size that an operator refuses.
        """
        named = input_sizes.by_position([value.name for value in self.inputs], args)
        return self.run(self.operands, {**named, **inputs})

    def run(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on other `weights` of the same shapes, in the caller's grad mode."""
        given = self.placed(weights, inputs)
        with input_sizes.named(self.input_nodes, self._bounds, given[len(self.weights) :]):
            # Called as a module it prints what fails, whoever catches that.
            outputs = module_on(self.graph_module, device_of(given)).forward(*given)
        return {value.name: out for value, out in zip(self.outputs, outputs, strict=True)}

    def placed(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return what the graph's placeholders are, in order: `weights`, and `inputs` filled in."""
        filled = self.fill(inputs, device_of(weights.values()))
        return [*(weights[name] for name in self.weights), *(filled[v.name] for v in self.inputs)]

    def fill(
        self, inputs: Mapping[str, Tensor], device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """Return `inputs` with what may be left out, on `device` or that of the program.

        Raises
        ------
        UsageError
            When an input is missing or unknown.
        """
        names, device = [value.name for value in self.inputs], device or self.device
        if unknown := [name for name in inputs if name not in names]:
            raise UsageError(f"no input {unknown[0]!r}; the program takes {', '.join(names)}")
        filled = input_sizes.given_on(inputs, device)
        batch = next((len(tensor) for tensor in inputs.values() if tensor.ndim), 1)
        past = 0
        for value in self.inputs:
            if not value.is_cache:
                continue
            if value.name not in filled:
                rows, heads, held, width = value.shape
                held = 0 if isinstance(held, str) else held
                shape = (batch if isinstance(rows, str) else rows, int(heads), held, int(width))
                filled[value.name] = torch.zeros(shape, dtype=value.dtype, device=device)
            past = filled[value.name].shape[2]
        input_sizes.fill_beside_tokens(filled, names, batch, past, self._types_may_be_zero)
        for name in names:
            if name not in filled:
                raise UsageError(f"input {name!r} is missing; the program takes {', '.join(names)}")
        input_sizes.check_inputs(self.inputs, self.limits, filled)
        return filled

    @property
    def _types_may_be_zero(self) -> bool:
        return any(note.kind == "optional-input" for note in self.notes)

    # -- deriving -------------------------------------------------------------------------------

    def with_weights(self, weights: Mapping[str, Tensor]) -> Program:
        """Return the same graph with some weights replaced by others of the same shape.

        They are held in the type in which the weights are stored, and in a scratch file where all
        that is held would go past the limit of memory.

        Raises
        ------
        UsageError
            When a name is unknown or a shape differs, or a value is too large for the stored type.
        OutputError
            When there is no room for a scratch file.
        """
        given = {}
        for name, tensor in weights.items():
            old = self.weight(name)
            if old.shape != tensor.shape:
                raise UsageError(f"{name} is {tuple(old.shape)}, not {tuple(tensor.shape)}")
            given[self.aliases.get(name, name)] = tensor
        return dataclasses.replace(self, weights=overlaid(self.weights, given, self.placement))

    def to_module(self) -> Any:
        """Make an `nn.Module` to train, with weights of its own; see `graphprune.backends.module`.

        A transformers model comes back as its own class wherever that can hold the program.
        """
        return extension("graphprune.backends", "module")(self)

    def exported(self) -> Any:
        """Make an `ExportedProgram` with weights of its own, for torch's own tools."""
        return extension("graphprune.backends", "exported")(self)

    # -- writing --------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | PathLike[str], **options: Any) -> None:
        """Write a Hugging Face directory; see `graphprune.backends.huggingface.save`."""
        self.write("huggingface", directory, **options)

    def export_onnx(self, path: str | PathLike[str], **options: Any) -> Any:
        """Write an ONNX model; see `graphprune.backends.onnx.export`."""
        return self.write("onnx", path, **options)

    def save(self, directory: str | PathLike[str]) -> None:
        """Write an archive that `graphprune.load` reads; see `graphprune.backends.archive`."""
        self.write("archive", directory)

    def write(self, backend: str, path: str | PathLike[str], **options: Any) -> Any:
        """Write the program to `path` by a back end that is installed.

        Parameters
        ----------
        backend
            A name in the entry-point group ``graphprune.backends``: "huggingface", "onnx",
            "archive", or one of another distribution.
        path, options
            As the back end takes them; it is called with the program, `path` and the options.

        Raises
        ------
        UsageError
            When no such back end is installed, with the nearest name.
        """
        return extension("graphprune.backends", backend)(self, path, **options)


def caches_of(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the caches among `outputs`, by the names of the inputs that take them next."""
    return {
        PAST + name.removeprefix(PRESENT): tensor
        for name, tensor in outputs.items()
        if name.startswith(PRESENT)
    }


def value_of(name: str, node: fx.Node) -> Value:
    """Return the program value called `name` that `node` stands for."""
    fake = node.meta["val"]
    return Value(name, node.name, tuple(map(_size, fake.shape)), fake.dtype)


def _size(size: int | torch.SymInt) -> int | str:
    if isinstance(size, int):
        return size
    # A dimension that the code turned out to fix stays a symbolic size, of a number.
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression)
