"""Low-rank adapters of a program's matrices, made by peft and merged into the weights.

peft adapts modules, and a program has none. So every matrix (`graphprune.analysis.matrices`) gets a
module of its shape without values for peft to adapt: a linear layer, or a stack of them for
experts and groups. Where a matrix is multiplied with the last axis of activations, what peft's
adapter gives runs beside the product, with its dropout; elsewhere (experts, convolutions) the
weight is replaced by its sum with the adapter's, which leaves no place for dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from graphprune.analysis.matrices import Matrix, Use
from graphprune.calibration.logits import Logits, run_to_logits, saves_memory
from graphprune.ir.aten import PRODUCTS, name_of
from graphprune.ir.interpreter import Hooks
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program
from graphprune.training.trainable import Batch, mixed_precision

_ADAPTER = "default"


class Adapters:
    """LoRA adapters (Hu et al. 2106.09685): ``W + alpha / rank B A``, where A and B are trained.

    Parameters
    ----------
    program
        The program.
    matrices
        What to adapt.
    rank, alpha, dropout
        Of LoRA.
    zeros
        Name of a weight -> which elements stay as they are, of the weight's shape.
    seed
        What A is drawn with; B starts at zero.
    """

    def __init__(
        self,
        program: Program,
        matrices: Sequence[Matrix],
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.05,
        zeros: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self._program, self._zeros = program, dict(zeros or {})
        self._held = {n: weight.detach() for n, weight in program.take(program.weights).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._layers = _adapted(matrices, rank, alpha, dropout)
        self._modules = nn.ModuleList(self._layers.values())
        _move(self._modules, program.device)
        self.parameters = {
            name: each for name, each in self._modules.named_parameters() if each.requires_grad
        }
        self._inside: list[Matrix] = []
        beside: dict[fx.Node, tuple[fx.Node, nn.Module]] = {}
        for matrix, layer in self._layers.items():
            if matrix.outer == 0 and all(_is_beside(use) for use in matrix.uses):
                zero = self._zeros.get(matrix.weight)
                side = _Side(layer, None if zero is None else matrix.read(zero)[0])
                beside.update({use.node: (use.source, side) for use in matrix.uses})
            else:
                self._inside.append(matrix)
        self._beside = beside

    def logits(self, batch: Batch, output: str, training: bool) -> Logits:
        """Return an output of the program with its adapters."""
        self._modules.train(training)
        with mixed_precision(self._program):
            return run_to_logits(
                self._program,
                batch,
                output,
                weights=self._with(self._inside),
                hooks=Hooks(after=self._with_side),
                hooked=self._beside,
                again=saves_memory(self._program),
            )

    def _with_side(self, node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        """Return the value of a node, with what an adapter beside it makes of its activations."""
        if node not in self._beside:
            return value
        source, side = self._beside[node]
        return value + side(values[source]).to(value.dtype)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Merge the adapters into the weights."""
        merged = self._with(list(self._layers))
        return {matrix.weight: merged[matrix.weight] for matrix in self._layers}

    def _with(self, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        """All weights, with the adapters of `matrices` added; differentiable."""
        deltas: dict[str, Tensor] = {}
        for matrix in matrices:
            weight = self._held[matrix.weight]
            none = torch.zeros(weight.shape, device=weight.device)
            delta = matrix.write(none, self._layers[matrix].get_delta_weight(_ADAPTER))
            deltas[matrix.weight] = deltas.get(matrix.weight, 0) + delta
        weights = dict(self._held)
        for name, delta in deltas.items():
            zero = self._zeros.get(name)
            kept = delta if zero is None else delta.masked_fill(zero, 0)
            weights[name] = (weights[name].to(kept.dtype) + kept).to(weights[name].dtype)
        return weights


def _move(modules: nn.Module, device: torch.device) -> None:
    """Move the parameters; all were drawn on the CPU, so that a seed gives the same everywhere."""
    for module in modules.modules():
        for name, each in module._parameters.items():
            if each is not None and each.device != device:
                moved = each.detach().to(device)
                module._parameters[name] = nn.Parameter(moved, requires_grad=each.requires_grad)


def _adapted(
    matrices: Sequence[Matrix], rank: int, alpha: float, dropout: float
) -> dict[Matrix, Any]:
    """Make a layer of peft for every matrix, whose own weight takes no memory."""
    from peft import LoraConfig, inject_adapter_in_model

    single = {f"m{at}": each for at, each in enumerate(matrices) if each.shape[0] == 1}
    stacks = {f"m{at}": each for at, each in enumerate(matrices) if each.shape[0] > 1}
    linears = nn.ModuleDict({name: _linear(*each.shape[1:]) for name, each in single.items()})
    experts = nn.ModuleDict({name: _Stack(*each.shape) for name, each in stacks.items()})
    given: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    if single:
        linear = LoraConfig(**given, lora_dropout=dropout, target_modules=list(single))
        inject_adapter_in_model(linear, linears)
    if stacks:
        names = [f"{name}.weight" for name in stacks]
        inject_adapter_in_model(
            LoraConfig(**given, target_modules=[], target_parameters=names), experts
        )
    return {
        matrix: (linears if name in single else experts)[name]
        for name, matrix in sorted({**single, **stacks}.items(), key=lambda each: int(each[0][1:]))
    }


def _empty(*shape: int) -> nn.Parameter:
    """Zeros of this shape that take the memory of one."""
    return nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


def _linear(outside: int, inside: int) -> nn.Linear:
    linear = nn.Linear(inside, outside, bias=False, device="meta")
    linear.weight = _empty(outside, inside)
    return linear


class _Stack(nn.Module):
    """A weight of ``[parts, out, in]``."""

    def __init__(self, parts: int, outside: int, inside: int) -> None:
        super().__init__()
        self.weight = _empty(parts, outside, inside)

    def forward(self, x: Tensor) -> Tensor:
        return x  # pragma: no cover - peft wants one; the graph is what runs


class _Side(nn.Module):
    """The addend of an adapter; `zero`, ``[out, in]``, says where its matrix stays zero."""

    def __init__(self, layer: Any, zero: Tensor | None) -> None:
        super().__init__()
        self.layer, self.zero = layer, zero

    def forward(self, x: Tensor) -> Tensor:
        """``alpha / rank B A dropout(x)``, in the element type of the adapter."""
        inner, outer = self.layer.lora_A[_ADAPTER], self.layer.lora_B[_ADAPTER]
        x = self.layer.lora_dropout[_ADAPTER](x.to(inner.weight.dtype))
        if self.zero is None:
            return outer(inner(x)) * self.layer.scaling[_ADAPTER]
        delta = self.layer.get_delta_weight(_ADAPTER)
        return functional.linear(x, delta.masked_fill(self.zero, 0))


def _is_beside(use: Use) -> bool:
    """Return whether a product is of the last axis of the activations with the whole matrix."""
    args = arguments_of(use.node)
    product = name_of(use.node)
    if product == "linear":
        left, right = args["input"], args["weight"]
    elif product in PRODUCTS - {"bmm"}:
        left, right = (args[key] for key in list(args)[:2])
    elif product == "addmm" and args["alpha"] == 1:
        left, right = args["mat1"], args["mat2"]
    else:
        return False
    while right.op != "placeholder" and len(right.all_input_nodes) == 1:
        (right,) = right.all_input_nodes
    return left is use.source and right.op == "placeholder"
