"""Fold the rescaling of pruned RMSNorms into weights and epsilons, which checkpoints can hold.

An RMSNorm over a pruned axis stays exact because its mean is multiplied by r = new size / old size.
No checkpoint can hold that product, but

    x / sqrt(r * mean + eps)  =  r^(-1/2) * x / sqrt(mean + eps / r)

so that the same function is a plain RMSNorm whose gain (or the linear layer after it, where it has
none) is larger by r^(-1/2) and whose epsilon is larger by 1 / r (Zhang and Sennrich, "Root Mean
Square Layer Normalization", 2019, equation 4).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, fx

from graphprune.errors import BackendError
from graphprune.ir.aten import MOVES, name_of
from graphprune.ir.nodes import copy_of
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path, source_line
from graphprune.transforms.resize import RESCALE

_ATEN = torch.ops.aten

_POWERS = (
    _ATEN.rsqrt.default,
    _ATEN.sqrt.default,
    _ATEN.reciprocal.default,
    _ATEN.pow.Tensor_Scalar,
)


@dataclass(frozen=True)
class Folded:
    """A norm whose epsilon had to change.

    Parameters
    ----------
    module
        The dotted path of the module that computes it.
    before, after
        Its epsilon in the model that was captured, and now.
    """

    module: str
    before: float
    after: float


def fold_rescaled_norms(program: Program) -> Program:
    """`program` without the products that keep RMSNorms over pruned axes exact.

    Parameters
    ----------
    program
        Any program; one that holds no such product is returned as it is.

    Returns
    -------
    Program
        The same function, its gains and epsilons changed.

    Raises
    ------
    BackendError
        When a norm has no gain of its own that could take the factor.
    """
    return fold(program)[0]


def fold(program: Program) -> tuple[Program, tuple[Folded, ...]]:
    """Do as `fold_rescaled_norms` does, and say what became of every epsilon."""
    if not any(RESCALE in node.meta for node in program.graph.nodes):
        return program, ()
    graph, copies = copy_of(program.graph)
    (output,) = graph.find_nodes(op="output")
    output.meta = dict(program.graph.find_nodes(op="output")[0].meta)
    weights = {copies[node]: name for name, node in program.weight_nodes()}
    scales: dict[str, tuple[float, float]] = {}
    folded = []
    for node in list(graph.nodes):
        if RESCALE not in node.meta:
            continue
        norm = _Norm(node, weights)
        name = weights[norm.gain]
        if name in scales:
            raise BackendError(f"{name} is the gain of several norms over a pruned axis")
        scales[name] = (norm.scale, norm.offset)
        folded.append(Folded(module_path(norm.source), norm.epsilon * norm.ratio, norm.epsilon))
        node.replace_all_uses_with(norm.source)
        graph.erase_node(node)
    graph.lint()
    changed = {name: _scaled(program.weights[name], *scale) for name, scale in scales.items()}
    result = dataclasses.replace(program, graph_module=fx.GraphModule(program.graph_module, graph))
    return result.with_weights(changed), tuple(folded)


def _scaled(weight: Tensor, scale: float, offset: float) -> Tensor:
    """Return the w' whose gain a w' + b is `scale` times that of `weight`; `offset` is b / a."""
    with torch.no_grad():
        return (weight.double() * scale + (scale - 1) * offset).to(weight.dtype)


class _Norm:
    """One RMSNorm, followed forward from the product `node` to its gain; its epsilon is edited."""

    def __init__(self, node: fx.Node, weights: dict[fx.Node, str]) -> None:
        self.node = node
        self.weights = weights
        source, factor = node.args[:2]
        assert isinstance(source, fx.Node)
        assert isinstance(factor, float)
        self.source = source
        self.ratio = float(Fraction(*node.meta[RESCALE]))
        self.offset = 0.0
        if source.target is _ATEN.rms_norm.default:
            self.scale = factor
            epsilon = source.args[3] if len(source.args) > 3 else source.kwargs["eps"]
            self.epsilon = float(epsilon)  # type: ignore[arg-type]
            gain = source.args[2] if len(source.args) > 2 else source.kwargs.get("weight")
            if isinstance(gain, fx.Node):
                if not self._own(gain):
                    raise self._refusal("its gain is not a weight of its own")
            else:
                self._follow(node)
        else:
            self.scale = 1 / math.sqrt(self.ratio)
            self.epsilon = -1.0
            self._follow(node)

    def _refusal(self, why: str) -> BackendError:
        module = module_path(self.node) or "the model"
        line = source_line(self.node)
        where = f"{module} ({line})" if line else module
        return BackendError(f"the RMSNorm over a pruned axis in {where} has no plain form: {why}")

    def _follow(self, node: fx.Node) -> None:
        while True:
            if len(node.users) != 1:
                raise self._refusal("its result is used before any gain")
            (user,) = node.users
            other = next((arg for arg in user.args if arg is not node), None)
            if user.target is _ATEN.mul.Tensor and isinstance(other, fx.Node):
                if self._own(other):
                    return
            elif user.target is _ATEN.linear.default and user.args[0] is node:
                weight = user.args[1]
                if self.epsilon >= 0 and isinstance(weight, fx.Node) and self._own(weight):
                    return  # it is linear in what it takes: its weight is as good as a gain
                raise self._refusal("a linear layer without a weight of its own comes before any")
            elif user.target is _ATEN.add.Tensor and isinstance(other, float) and self.epsilon < 0:
                self.epsilon = other / self.ratio
                user.args = (user.args[0], self.epsilon)
            elif user.target is _ATEN.div.Tensor and user.args[1] is node:
                pass
            elif name_of(user) not in MOVES and user.target not in _POWERS:
                raise self._refusal(f"{user.target} comes before any gain")
            node = user

    def _own(self, node: fx.Node) -> bool:
        """Return whether `node` is a w + b of a weight w of its own; note w and b / a."""
        steps = []
        while node not in self.weights:
            if len(node.users) != 1 or node.op != "call_function":
                return False
            steps.append(node)
            inner = node.args[0] if node.args else None
            if not isinstance(inner, fx.Node):
                return False
            node = inner
        if len(node.users) != 1:
            return False
        slope, offset = 1.0, 0.0
        for step in reversed(steps):
            number = step.args[1] if len(step.args) > 1 else None
            if step.target is _ATEN.add.Tensor and isinstance(number, int | float):
                if "alpha" in step.kwargs:
                    return False
                offset += number
            elif step.target is _ATEN.mul.Tensor and isinstance(number, int | float):
                slope, offset = slope * number, offset * number
            elif name_of(step) not in MOVES:
                return False
        self.gain = node
        self.offset = offset / slope
        return True
