"""Run models beside a program, on random weights and inputs that reveal a wrong structure.

A model's own weights may hide what is wrong with its sizes: where attention is all but even, two
heads of four give what one head of eight does, and half precision is off by more than both. So
weights are drawn whose scores, gates and norms are far from even, and everything runs in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.backends.huggingface.model import LENGTH, ROWS, drawing, mismatch, quiet
from graphprune.errors import first_line
from graphprune.ir.aten import random_nodes
from graphprune.ir.nodes import copy_of
from graphprune.ir.program import PRESENT, Program
from graphprune.ir.sample_inputs import random_inputs
from graphprune.weights.deferred import Deferred, converted
from graphprune.weights.models import lent, named_tensors

TOLERANCE = 1e-4
"""Parts of many models compute in float32 whatever their weights are in."""

_SCALES = (1.0, 0.1, None)
"""Of drawn weights, tried until all outputs are finite; None is the program's own weights."""

_DRAWN = 1_048_583
"""Numbers that are drawn for one weight, again and again where it holds more: drawing takes far
longer than computing with them. It is prime, so that rows and columns are not alike."""


class Trial:
    """Runs of a program and of models that may stand for it, all with the same drawn weights.

    Parameters
    ----------
    program
        The program; of its weights only the sizes are used, and buffers.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        # Some kernels lack the first type, in which other numbers are drawn at random.
        types = [torch.float64, torch.float32]
        self._types = types[1:] if random_nodes(program.graph) else types
        self.inputs: dict[str, Tensor] = {}
        self._weights: Mapping[str, Tensor] = {}
        self._expected: dict[str, Tensor] = {}

    def difference(self, model: nn.Module) -> str:
        """Say how `model` differs from the program; "" where it does not."""
        return self.compare(model)[0]

    def compare(self, model: nn.Module) -> tuple[str, Exception | None]:
        """Compare as `difference` does, and return the exception that `model` raised, if it did."""
        if not self._expected:
            try:
                self._run_program()
            except Exception as error:  # noqa: BLE001 - a capture may have kept its example's sizes
                return f"the program does not run on other inputs: {first_line(error)}", None
        try:
            found = self.run(model)
        except Exception as error:  # noqa: BLE001 - model code may fail in any way
            if len(self._types) > 1 and _is_about_types(error):
                self._take_narrower_type()
                return self.compare(model)
            return f"the model does not run: {first_line(error)}", error
        why = mismatch(self._expected, found, TOLERANCE)
        return why and f"{why} where both have drawn weights", None

    def run(self, model: nn.Module, **changed: Any) -> Any:
        """Return what `model` gives for the inputs, with those that are `changed`.

        The program was compared with a model before.
        """
        with self._lent(model), torch.no_grad(), quiet(), drawing():
            return model(**{**self.inputs, **changed}, return_dict=True)

    # -- the program's side -----------------------------------------------------------------------

    def _run_program(self) -> None:
        """Draw inputs and weights, and keep what the program gives."""
        while True:
            dtype = self._types[0]
            program = _in_type(self.program, dtype)
            self.inputs = random_inputs(program, batch=ROWS, length=LENGTH)
            try:
                for scale in _SCALES:
                    self._weights = _drawn(self.program, dtype, scale)
                    self._expected = self._outputs(program)
                    if all(tensor.isfinite().all() for tensor in self._expected.values()):
                        break
                return
            except Exception as error:
                if len(self._types) == 1 or not _is_about_types(error):
                    raise
                self._take_narrower_type()

    def _outputs(self, program: Program) -> dict[str, Tensor]:
        device = program.device
        weights = {
            n: converted(weight, weight.dtype, device) for n, weight in self._weights.items()
        }
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        with torch.no_grad(), drawing():
            outputs = program.run(weights, inputs)
        return {n: t.cpu() for n, t in outputs.items() if not n.startswith(PRESENT)}

    def _take_narrower_type(self) -> None:
        del self._types[0]
        self._expected = {}

    # -- the model's side -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _lent(self, model: nn.Module) -> Iterator[None]:
        """Let `model` have the drawn weights for a while, and all else in the trial's type."""
        weights = {}
        for name, tensor in named_tensors(model).items():
            drawn = self._weights.get(self.program.aliases.get(name, name))
            if drawn is not None and drawn.shape == tensor.shape:
                weights[name] = drawn
            elif tensor.is_floating_point():
                weights[name] = tensor.detach().to(self._types[0])
        with lent(model, weights):
            yield


def _is_about_types(error: Exception) -> bool:
    """Return whether a kernel is missing for the type, rather than sizes being wrong."""
    said = str(error)
    return any(word in said for word in ("not implemented for", "dtype", "scalar type", "Double"))


def _in_type(program: Program, dtype: torch.dtype) -> Program:
    """Return `program` with every cast to a floating type as one to `dtype`; weights are left."""
    graph, _ = copy_of(program.graph)

    def swap(value: Any) -> Any:
        return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, swap)
            node.kwargs = fx.node.map_aggregate(node.kwargs, swap)
    inputs = tuple(dataclasses.replace(value, dtype=swap(value.dtype)) for value in program.inputs)
    module = fx.GraphModule(nn.Module(), graph)
    return dataclasses.replace(program, graph_module=module, inputs=inputs)


def _drawn(program: Program, dtype: torch.dtype, scale: float | None) -> Mapping[str, Tensor]:
    """Weights of the sizes of the program's, on the CPU; buffers and single numbers are its own.

    Where weights lie in files, all are drawn where they are used, each time alike.
    """
    drawn = {}
    later = any(isinstance(weight, Deferred) for weight in program.weights.values())
    for name, weight in program.weights.items():
        if not weight.is_floating_point():
            drawn[name] = weight.detach().cpu()
        elif program.kinds[name] != "parameter" or not weight.shape or scale is None:
            drawn[name] = converted(weight, dtype, torch.device("cpu"))
        else:
            draw = functools.partial(_draw, name, tuple(weight.shape), dtype, scale)
            drawn[name] = Deferred(draw, weight.shape, dtype) if later else draw()
    return drawn


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
    """Draw the weight called `name`.

    A matrix keeps the magnitude of what goes in, so that scores of attention differ by about one.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return torch.rand(shape, generator=generator, dtype=dtype).add_(0.5)
    count = math.prod(shape)
    numbers = torch.randn(min(count, _DRAWN), generator=generator, dtype=dtype)
    if count > _DRAWN:
        numbers = numbers.repeat(-(-count // _DRAWN))[:count]
    return numbers.view(shape).mul_(scale / max(shape[1:]) ** 0.5)
