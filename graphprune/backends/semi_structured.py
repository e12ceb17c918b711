"""2:4 weights as torch's semi-structured tensors, which sparse tensor cores multiply.

Of every four neighbors along the inputs two at most are not zero. Two values and two indices of
two bits are held in place of four values, and the matrix product skips the zeros (NVIDIA Ampere and
later: twice the dense rate in theory; Mishra et al. 2104.08378, sections 3 and 4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune.errors import BackendError
from graphprune.weights.tensors import type_name

MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (32, 128)}
"""Outputs and inputs must be multiples of these, so that both libraries that torch calls (CUTLASS,
cuSPARSELt) take a weight."""

_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class SemiStructured:
    """The weights that can be semi-structured, and why others cannot.

    Parameters
    ----------
    layers
        Names of those that can.
    others
        Name of every other one -> why not.
    dense_bytes, bytes
        What the values of `layers` take as dense and as semi-structured tensors.
    """

    layers: tuple[str, ...]
    others: Mapping[str, str]
    dense_bytes: int
    bytes: int

    @classmethod
    def of(cls, weights: Iterable[tuple[str, Tensor]]) -> SemiStructured:
        """Look at names and weights ``[out, in]``, of which one is held at a time.

        Examples
        --------
        >>> weight = torch.tensor([0.0, 1, 0, 2], dtype=torch.float16).repeat(64, 16)
        >>> found = SemiStructured.of({"up": weight, "down": weight.mT}.items())
        >>> found.layers, found.others, found.bytes / found.dense_bytes
        (('up',), {'down': 'it is not 2:4 along its inputs'}, 0.5625)
        """
        layers, others, dense, small = [], {}, 0, 0
        for name, weight in weights:
            if reason := why_not(weight):
                others[name] = reason
                continue
            layers.append(name)
            dense += weight.nbytes
            small += weight.nbytes // 2 + weight.numel() // 8  # two bits for each value kept
        return cls(tuple(layers), others, dense, small)


def why_not(weight: Tensor) -> str:
    """Say why `weight` cannot be semi-structured; "" where it can.

    Parameters
    ----------
    weight
        ``[out, in]``.
    """
    if weight.ndim != 2:
        return "it is no matrix"
    if weight.dtype not in MULTIPLES:
        kinds = ", ".join(type_name(dtype) for dtype in MULTIPLES)
        return f"it is {type_name(weight.dtype)}, not one of {kinds}"
    rows, columns = MULTIPLES[weight.dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        shape = "x".join(map(str, weight.shape))
        return f"{shape} are no multiples of {rows}x{columns}"
    return "" if is_two_of_four(weight) else "it is not 2:4 along its inputs"


def is_two_of_four(weight: Tensor) -> bool:
    """Return whether two at most of every four neighbors along the last axis are not zero."""
    if weight.shape[-1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def to_semi_structured(model: nn.Module) -> SemiStructured:
    """Make the weights of the linear layers of `model` that are 2:4 semi-structured, in place.

    Parameters
    ----------
    model
        A model on an NVIDIA GPU, in 16 bits, that was loaded from a checkpoint which `sparsify`
        made with ``pattern=2:4``. It is for inference from then on.

    Returns
    -------
    SemiStructured
        Which layers were converted, and why the others were not.

    Raises
    ------
    BackendError
        When no layer can be converted, or the model is not on a GPU that has sparse tensor cores;
        nothing is converted then.
    """
    linears = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    alone = {name: m.weight for name, m in linears.items() if shared[id(m.weight)] == 1}
    found = SemiStructured.of((name, weight.detach()) for name, weight in alone.items())
    others = {**found.others, **dict.fromkeys(linears.keys() - alone.keys(), "it is tied")}
    if not found.layers:
        name, reason = next(iter(others.items()), ("the model", "it has no linear layer"))
        raise BackendError(f"no weight can be semi-structured; {name}: {reason}")
    for name in found.layers:
        _check_device(name, alone[name].device)
    made = {name: torch.sparse.to_sparse_semi_structured(alone[name]) for name in found.layers}
    for name, weight in made.items():
        linears[name].weight = nn.Parameter(weight, requires_grad=False)
    return SemiStructured(found.layers, others, found.dense_bytes, found.bytes)


def _check_device(name: str, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise BackendError(
            f"{name} is on {device}: semi-structured tensors need an NVIDIA GPU with sparse "
            f"tensor cores (compute capability {'.'.join(map(str, _CAPABILITY))} or later)"
        )
