"""An encoder-decoder under way: what is encoded, and the caches of the tokens so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.backends.onnx.encoder_decoder.anatomy import TOKENS
from graphprune.backends.onnx.encoder_decoder.parts import Layout, Role
from graphprune.backends.onnx.session import open_session
from graphprune.errors import BackendError, first_line
from graphprune.ir.program import PAST, PRESENT, Program

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
}

_PRESENTS: dict[Layout, tuple[str, str]] = {
    "optimum": (PRESENT, PAST),
    "genai": ("present_", "past_"),
}
"""What the names of caches begin with: those that come out, and those that go in."""


@dataclass(frozen=True)
class Part:
    """One part of an encoder-decoder, ready to run.

    Parameters
    ----------
    shapes
        The shape of each input; what is no number is dynamic.
    types
        The type of each input that holds real numbers.
    run
        Gives the outputs by name.
    """

    shapes: Mapping[str, tuple[Any, ...]]
    types: Mapping[str, torch.dtype]
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def part_of_program(program: Program) -> Part:
    """Return a part that `program` computes."""
    values = program.inputs
    types = {value.name: value.dtype for value in values if value.dtype.is_floating_point}
    return Part({v.name: v.shape for v in values}, types, lambda inputs: program(**inputs))


def part_of_model(path: Path, provider: str, threads: int | None = None) -> Part:
    """Return a part that ONNX Runtime computes by the model at `path`.

    Raises
    ------
    BackendError
        When ONNX Runtime refuses the model, or fails when it is run.
    """
    session = open_session(path, provider, threads)
    inputs, names = session.get_inputs(), [value.name for value in session.get_outputs()]

    def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            arrays = session.run(names, {name: t.numpy() for name, t in given.items()})
        except Exception as error:  # its exceptions share no base but Exception
            raise BackendError(f"ONNX Runtime fails on {path.name}: {first_line(error)}") from error
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    types = {value.name: _TYPES[value.type] for value in inputs if value.type in _TYPES}
    return Part({value.name: tuple(value.shape) for value in inputs}, types, run)


class Decoding:
    """Rows of tokens on their way through a decoder.

    Parameters
    ----------
    parts
        The part of each role.
    layout
        The layout that their names are of.
    inputs
        What goes into the encoder, by the names that it has there.
    """

    def __init__(
        self, parts: Mapping[Role, Part], layout: Layout, inputs: Mapping[str, Tensor]
    ) -> None:
        self.parts = parts
        self.out, self.into = _PRESENTS[layout]
        self.held: dict[str, Tensor] = {}
        self._take(parts["encoder"].run(inputs))
        self.held |= {f"encoder_{name}": t for name, t in inputs.items() if "mask" in name}

    @classmethod
    def of_call(
        cls,
        program: Program,
        parts: Mapping[Role, Part],
        layout: Layout,
        call: Mapping[str, Tensor],
    ) -> Decoding:
        """Encode what goes into one call of `program`, but for its decoder's tokens."""
        inputs = [call[value.name] for value in program.inputs if value.name != TOKENS]
        return cls(parts, layout, dict(zip(parts["encoder"].shapes, inputs, strict=True)))

    def repeat(self, count: int) -> None:
        """Let every row be there `count` times."""
        self.choose(torch.arange(len(next(iter(self.held.values())))).repeat_interleave(count))

    def choose(self, rows: Tensor) -> None:
        """Go on with these rows, which may be there several times."""
        self.held = {name: tensor[rows] for name, tensor in self.held.items()}

    def advance(self, tokens: Tensor) -> Tensor:
        """Return the logits after new tokens of every row, ``[rows, tokens, vocabulary]``."""
        begun = any(name.startswith(self.into) for name in self.held)
        part = self.parts["next"] if begun or "first" not in self.parts else self.parts["first"]
        given = {name: self.held[name] for name in part.shapes if name in self.held}
        for name, shape in part.shapes.items():
            if name.startswith(self.into) and name not in given:
                given[name] = torch.zeros(len(tokens), shape[1], 0, shape[3]).to(part.types[name])
        outputs = part.run({**given, "input_ids": tokens})
        self._take(outputs)
        (logits,) = (t for name, t in outputs.items() if not name.startswith(self.out))
        return logits

    def _take(self, outputs: Mapping[str, Tensor]) -> None:
        """Keep the caches among outputs, and what is encoded, by the names of what takes them."""
        for name, tensor in outputs.items():
            if name.startswith(self.out):
                self.held[self.into + name.removeprefix(self.out)] = tensor
            elif name.endswith("hidden_state"):
                self.held["encoder_hidden_states"] = tensor
