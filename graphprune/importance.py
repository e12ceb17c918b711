"""Importance of the units of groups: what a unit's removal is thought to cost.

A criterion looks at a program and gives a score for every unit of every group; higher is more
important. Criteria that score single weights (magnitude, Taylor) say only how; summing over the
slice of a unit in each member, and combining members, is done here once for any axis type.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphprune.calibration import Calibration, next_token_loss
from graphprune.contractions import Matrix, contractions
from graphprune.coupling import Coupling, Group, Member
from graphprune.errors import CalibrationError, SelectionError, UsageError
from graphprune.program import Program
from graphprune.progress import Track, silent
from graphprune.reconstruction import removal_errors
from graphprune.sparsity import wanda_scores
from graphprune.statistics import observe

Aggregate = Literal["sum", "mean", "max", "product", "last"]
"""How the scores of a unit in the weights of its group become one; "last" is the score in the
weight that the graph uses last, such as an output or down projection."""

Scores = dict[str, Tensor]
"""Group name -> float64 scores, shape ``[*parents' sizes, size]``."""


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Parameters
    ----------
    program, coupling
        The program and its analysis.
    groups
        The groups to score.
    calibration
        Batches to run the program on, or None.
    aggregate
        How members are combined.
    seed
        Seed of whatever is random.
    track
        Wraps long loops in a progress bar.
    """

    program: Program
    coupling: Coupling
    groups: Sequence[Group]
    calibration: Calibration | None = None
    aggregate: Aggregate = "sum"
    seed: int = 0
    track: Track = silent

    def sizes(self, group: Group) -> tuple[int, ...]:
        """The shape of the scores of `group`: the sizes of its parents, and its own."""
        return (*(self.coupling.group(parent).size for parent in group.parents), group.size)

    def data(self) -> Calibration:
        """The calibration batches.

        Raises
        ------
        CalibrationError
            When there are none, or they do not fit the program.
        """
        if self.calibration is None:
            raise CalibrationError("this criterion needs calibration data, and none was given")
        self.calibration.check(self.program)
        return self.calibration

    def consumers(self, criterion: str) -> dict[str, list[tuple[Matrix, Tensor]]]:
        """For each group the matrices that sum over it, and the unit of each of their columns.

        `criterion` names who asks. Units are ``[parts, in]``, counted over all parents, -1 for a
        column of none.

        Raises
        ------
        SelectionError
            When nothing sums over a group.
        """
        matrices = contractions(self.program).matrices
        found = {group.name: _consumers(self, group, matrices) for group in self.groups}
        if lonely := [name for name, consumers in found.items() if not consumers]:
            raise SelectionError(
                f"{lonely[0]}: {criterion} scores what consumes it, and nothing does"
            )
        return found

    def parameters(self) -> list[str]:
        """Names of the parameters that the groups reach into, each once."""
        kinds = self.program.kinds
        names = dict.fromkeys(name for group in self.groups for name in group.weights())
        return [name for name in names if kinds[name] == "parameter"]


class Criterion(ABC):
    """Scores units of groups; subclasses register themselves by `name`."""

    name: ClassVar[str]
    requires_calibration: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            CRITERIA[cls.name] = cls

    @abstractmethod
    def scores(self, evidence: Evidence) -> Scores:
        """The score of every unit of ``evidence.groups``; higher is more important."""


CRITERIA: dict[str, type[Criterion]] = {}
"""Every criterion by name."""


def criterion(name: str) -> Criterion:
    """The criterion called `name`.

    Raises
    ------
    UsageError
        When there is none, with the nearest name.
    """
    if name not in CRITERIA:
        from graphprune.options import nearest

        raise UsageError(f"there is no criterion {name!r}{nearest(name, CRITERIA)}")
    return CRITERIA[name]()


# -- criteria on single weights -------------------------------------------------------------------

Measure = Literal["sum", "l1", "l2"]
"""How the elements of a slice become one number: their sum, sum of absolutes, or of squares."""


class WeightCriterion(Criterion):
    """Measures the slice of each unit in each weight of its group.

    Subclasses say what stands at each element (the weight itself, its gradient times the weight)
    and by which measure a slice is reduced.
    """

    measure: ClassVar[Measure]

    def scores(self, evidence: Evidence) -> Scores:
        """Reduce the slice of each unit in each weight, then combine the weights of the group.

        Raises
        ------
        SelectionError
            When the program was captured on the meta device.
        """
        per_weight: dict[str, dict[str, Tensor]] = {group.name: {} for group in evidence.groups}
        places = _members_by_weight(evidence)
        names = evidence.parameters()
        if any(evidence.program.weights[name].is_meta for name in names):
            raise SelectionError(f"{self.name}: the program was captured without weights to score")
        for name, elements in evidence.track(self.elements(evidence, names), "scoring weights"):
            dims = {member.dim for _, member in places[name]}
            lines = {dim: _reduce(elements, dim, self.measure) for dim in dims}
            for group, member in places[name]:
                found = per_weight[group.name]
                score = _sum_units(lines[member.dim], group, member)
                found[name] = found[name] + score if name in found else score
        order = _use_order(evidence.program)
        finished = {
            group: [self.finish(found[name]) for name in sorted(found, key=order.__getitem__)]
            for group, found in per_weight.items()
        }
        return {group: _combine(found, evidence.aggregate) for group, found in finished.items()}

    @abstractmethod
    def elements(self, evidence: Evidence, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, a tensor of the weight's shape) for the weights called `names`, one by one."""

    def finish(self, total: Tensor) -> Tensor:
        """Turn the reduced slices of one weight into scores."""
        return total


def _members_by_weight(evidence: Evidence) -> dict[str, list[tuple[Group, Member]]]:
    found: dict[str, list[tuple[Group, Member]]] = {}
    for group in evidence.groups:
        for member in group.members:
            found.setdefault(member.weight, []).append((group, member))
    return found


_BLOCK = 1 << 20
"""Elements that are reduced at once: few enough to stay in the processor's cache."""


def _reduce(elements: Tensor, dim: int, measure: Measure) -> Tensor:
    """Reduce all dimensions but `dim` in one pass over the elements; float64."""
    if elements.ndim == 1:
        elements = elements[:, None]
    others = [other for other in range(elements.ndim) if other != dim]
    wide = torch.promote_types(elements.dtype, torch.float32)
    rows = max(1, _BLOCK * len(elements) // elements.numel())
    lines = [
        _SINGLE[measure](block.to(wide)).sum(others).double() for block in elements.split(rows)
    ]
    return torch.cat(lines) if dim == 0 else torch.stack(lines).sum(0)


_SINGLE: dict[Measure, Callable[[Tensor], Tensor]] = {
    "sum": lambda elements: elements,
    "l1": Tensor.abs,
    "l2": Tensor.square,
}


def _sum_units(line: Tensor, group: Group, member: Member) -> Tensor:
    """Sum scores along a dimension over the slice of every unit: ``[*parents' sizes, size]``."""
    units = _units(line, group, member)
    keep = [member.outer_groups.index(parent) for parent in group.parents]
    gone = [dim for dim in range(units.ndim) if dim not in (*keep, units.ndim - 2)]
    order = sorted(keep)
    return units.sum(gone).permute(*(order.index(dim) for dim in keep), len(keep))


def _units(line: Tensor, group: Group, member: Member) -> Tensor:
    """A dimension's places as a view ``[*outer, size, width]``: those of every unit of `group`."""
    loops = [*member.outer, (group.size, member.width), (member.width, 1)]
    sizes, strides = zip(*loops, strict=True)
    return line.as_strided(sizes, strides, member.offset)


def _use_order(program: Program) -> dict[str, int]:
    """Name of a weight -> when the graph first uses it."""
    places = {node: at for at, node in enumerate(program.graph.nodes)}
    return {
        name: min((places[user] for user in node.users), default=0)
        for name, node in program.weight_nodes()
    }


def _combine(scores: Sequence[Tensor], aggregate: Aggregate) -> Tensor:
    """Scores in the weights of a group, in the order in which the graph uses them, as one."""
    if aggregate == "last":
        return scores[-1]
    stacked = torch.stack(list(scores))
    if aggregate == "sum":
        return stacked.sum(0)
    if aggregate == "mean":
        return stacked.mean(0)
    return stacked.amax(0) if aggregate == "max" else stacked.prod(0)


class L1(WeightCriterion):
    """Sum of absolute weights of the slice (LLM-Pruner's L1; no root)."""

    name = "l1"
    measure: ClassVar[Measure] = "l1"

    def elements(self, evidence: Evidence, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The weights themselves."""
        for name in names:
            yield name, evidence.program.weights[name].detach()


class L2(L1):
    """Sum of squared weights of the slice (LLM-Pruner's L2; no root)."""

    name = "l2"
    measure = "l2"


class Magnitude(L2):
    """Another name for `l2`."""

    name = "magnitude"


class Taylor(WeightCriterion):
    """First-order Taylor expansion of the loss, element-wise: sum of |g w| over the slice.

    LLM-Pruner (Ma et al. 2305.11627, equation 4, "Element^1"): the change of the next-token loss on
    the calibration text when a weight is set to zero, to first order. The gradient is that of the
    mean loss over all calibration samples.
    """

    name = "taylor"
    measure: ClassVar[Measure] = "l1"
    requires_calibration = True

    def elements(self, evidence: Evidence, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The product g w."""
        for name, gradient in loss_gradients(evidence, names):
            yield name, gradient.mul_(evidence.program.weights[name].detach())


class TaylorVector(Taylor):
    """First-order Taylor expansion of the loss, vector-wise: |sum of g w| over the slice.

    LLM-Pruner (Ma et al. 2305.11627, equation 3, "Vector"): signs cancel within a slice.
    """

    name = "taylor-vector"
    measure = "sum"

    def finish(self, total: Tensor) -> Tensor:
        """The absolute value after the sum."""
        return total.abs()


class TaylorSecond(Taylor):
    """Second-order term of the loss's Taylor expansion, element-wise: sum of w F w over the slice.

    F is the diagonal of the empirical Fisher matrix, the mean over the calibration samples of the
    squared gradient of each sample's loss, in place of the Hessian's (LLM-Pruner, Ma et al.
    2305.11627, section 3.2, "Element^2"; its code leaves the factor 1/2 out as well, which moves no
    rank).
    """

    name = "taylor-second"

    def elements(self, evidence: Evidence, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The product w F w."""
        for name, _, fisher in sample_gradients(evidence, names):
            yield name, fisher.mul_(evidence.program.weights[name].detach().square())


class TaylorMixed(Taylor):
    """First and second order together, element-wise: sum of |g w - 1/2 w F w| over the slice.

    LLM-Pruner (Ma et al. 2305.11627, equation 5), with F as in `TaylorSecond`.
    """

    name = "taylor-mixed"

    def elements(self, evidence: Evidence, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The difference g w - 1/2 w F w."""
        for name, gradient, fisher in sample_gradients(evidence, names):
            weight = evidence.program.weights[name].detach()
            yield name, gradient.mul_(weight).sub_(fisher.mul_(weight.square()), alpha=0.5)


class Wanda(WeightCriterion):
    """Weights times the norms of their inputs: sum of |w| ||x|| over the slice.

    The score of Wanda (Sun et al. 2306.11695, equation 1) for single weights, summed over what a
    unit takes with it. A weight that no activation is multiplied with (a bias) counts by itself.
    """

    name = "wanda"
    measure: ClassVar[Measure] = "l1"
    requires_calibration = True

    def elements(self, evidence: Evidence, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The product |w| ||x||."""
        held = [m for m in contractions(evidence.program).matrices if m.weight in names]
        found = observe(evidence.program, held, evidence.data(), track=evidence.track)
        for name in names:
            weight = evidence.program.weights[name].detach()
            scores = weight.float().abs()
            for matrix in held:
                if matrix.weight == name:
                    values = wanda_scores(matrix.read(weight), found[matrix.name])
                    scores = matrix.write(scores, values)
            yield name, scores


class Obs(Criterion):
    """What the consumers of a group lose when the unit leaves and the rest is refitted.

    Optimal brain surgeon on each consumer's output (Hassibi and Stork 1993, equation 5), greedily:
    units leave in small batches, the cheapest first, and the score of a unit is the squared error
    that its leaving adds, summed over consumers' outputs and tokens. Unlike the other criteria it
    knows which units can stand for each other; `reconstruct` then makes the refit real.
    """

    name = "obs"
    requires_calibration = True

    def scores(self, evidence: Evidence) -> Scores:
        """Greedy removal in the consumers of every group.

        Raises
        ------
        SelectionError
            When nothing sums over a group.
        """
        data, held = evidence.data(), evidence.consumers(self.name)
        needed = {m.name: m for each in held.values() for m, _ in each}
        given = evidence.program, list(needed.values()), data
        found = observe(*given, "gram", track=evidence.track)
        scores: Scores = {}
        for group in evidence.track(evidence.groups, "scoring groups"):
            total = torch.zeros(math.prod(evidence.sizes(group)), dtype=torch.float64)
            for matrix, units in held[group.name]:
                weight = matrix.read(evidence.program.weights[matrix.weight])
                gram = found[matrix.name].gram
                assert gram is not None
                for part in range(len(weight)):
                    if bool((units[part] >= 0).any()):
                        errors = removal_errors(weight[part], gram[part], units[part])
                        total[: len(errors)] += errors
            scores[group.name] = total.view(evidence.sizes(group))
        return scores


class Gate(Criterion):
    """Expected sensitivity of the loss to a gate on the unit: E_x |dL(x) / d xi| at xi = 1.

    The head importance of Michel et al. (1905.10650, equation 2), for any group: the gate stands
    where the unit's activations come into what sums over them, so that its gradient is the inner
    product of activation and gradient. Here the absolute value is taken of each sample, as in the
    paper's formula; `GateToken` and `GateBatch` take it where its published codes do.
    """

    name = "gate"
    requires_calibration = True
    absolute: ClassVar[Literal["token", "sample", "batch"]] = "sample"

    def scores(self, evidence: Evidence) -> Scores:
        """Gradients of gates of one, by the chain rule at the consumers' inputs.

        Raises
        ------
        SelectionError
            When nothing sums over a group.
        CalibrationError
            As `loss_gradients` does.
        """
        data, held = evidence.data(), evidence.consumers(self.name)
        totals = {
            group.name: torch.zeros(math.prod(evidence.sizes(group)), dtype=torch.float64)
            for group in evidence.groups
        }
        sources = {use.source for each in held.values() for m, _ in each for use in m.uses}
        batches = list(_samples(data) if self.absolute == "sample" else data)
        for batch in evidence.track(batches, "taking gradients of gates"):
            values = _activations(evidence.program, batch, sources)
            for name, consumers in held.items():
                gates = [
                    _gates(rows, units[part], len(totals[name]))
                    for matrix, units in consumers
                    for use in matrix.uses
                    for part, rows in use.rows(values)
                ]
                if self.absolute == "token":
                    totals[name] += sum(each.abs().sum(0) for each in gates)
                else:
                    totals[name] += torch.stack([each.sum(0) for each in gates]).sum(0).abs()
        return {g.name: totals[g.name].view(evidence.sizes(g)) for g in evidence.groups}


class GateToken(Gate):
    """As `gate`, with the absolute value of every token (both codes of the paper's authors)."""

    name = "gate-token"
    absolute = "token"


class GateBatch(Gate):
    """As `gate`, with the absolute value of every batch (transformers' example ``bertology``)."""

    name = "gate-batch"
    absolute = "batch"


def _activations(
    program: Program, batch: Mapping[str, Tensor], sources: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """Values of the graph's nodes; those of `sources` are multiplied with the loss's gradient."""
    filled = program.fill(batch)
    inputs = [*program.weights.values(), *(filled[value.name] for value in program.inputs)]
    interpreter = _Keeping(program.graph_module, sources)
    with torch.enable_grad():
        outputs = interpreter.run(*(tensor.detach() for tensor in inputs))
        loss = _finite_loss(outputs[0], batch)
        kept = {node: interpreter.kept[node] for node in sources}
        gradients = torch.autograd.grad(loss, list(kept.values()), allow_unused=True)
    values = {n: v.detach() if isinstance(v, Tensor) else v for n, v in interpreter.env.items()}
    for (node, value), gradient in zip(kept.items(), gradients, strict=True):
        values[node] = torch.zeros_like(value) if gradient is None else value.detach() * gradient
    return values


class _Keeping(fx.Interpreter):
    """Runs a graph with a gradient at every one of `sources`."""

    def __init__(self, module: fx.GraphModule, sources: Collection[fx.Node]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.sources = sources
        self.kept: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.sources and isinstance(value, Tensor):
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.kept[n] = value
        return value


def _gates(rows: Tensor, units: Tensor, count: int) -> Tensor:
    """``[n, units]``: sums over the columns of each unit."""
    found = torch.zeros(len(rows), count + 1, dtype=torch.float64)
    at = torch.where(units < 0, count, units)
    return found.index_add_(1, at, rows.double())[:, :count]


def _consumers(
    evidence: Evidence, group: Group, matrices: Sequence[Matrix]
) -> list[tuple[Matrix, Tensor]]:
    """The matrices that sum over `group`; and ``[parts, in]``: the unit of each column, or -1."""
    found = []
    for matrix in matrices:
        weight = evidence.program.weights[matrix.weight]
        for member in group.members:
            if member.weight != matrix.weight:
                continue
            line = _unit_numbers(evidence, group, member, weight.shape[member.dim])
            shape = [1] * weight.ndim
            shape[member.dim] = len(line)
            units = matrix.read(line.view(shape).expand(weight.shape).contiguous())
            if bool((units[:, :1] == units).all()) and bool((units >= 0).any()):
                found.append((matrix, units[:, 0]))
    return found


def _unit_numbers(evidence: Evidence, group: Group, member: Member, size: int) -> Tensor:
    """``[size]``: which unit (counted over all parents) is at each place of a dimension, or -1."""
    sizes = evidence.sizes(group)
    numbers = torch.arange(math.prod(sizes)).view(sizes)
    line = torch.full((size,), -1)
    units = _units(line, group, member)
    keep = [member.outer_groups.index(parent) for parent in group.parents]
    order = sorted(keep)
    numbers = numbers.permute(*(keep.index(dim) for dim in order), len(keep))
    shape = [1] * units.ndim
    for dim, count in zip((*order, units.ndim - 2), numbers.shape, strict=True):
        shape[dim] = count
    units.copy_(numbers.reshape(shape).expand_as(units))
    return line


def loss_gradients(evidence: Evidence, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, gradient) of the mean next-token loss on the calibration batches.

    Gradients are taken of the weights called `names` only, and given away one by one.

    Raises
    ------
    CalibrationError
        Without calibration batches, or when they do not fit the program or the loss is not finite.
    """
    data = evidence.data()
    batches = evidence.track(data, "taking gradients")
    yield from _gradients(evidence.program, batches, data.samples, names)


def sample_gradients(
    evidence: Evidence, names: Sequence[str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, mean gradient, mean squared gradient) over the samples, taken one at a time.

    Raises
    ------
    CalibrationError
        As `loss_gradients` does.
    """
    data, weights = evidence.data(), evidence.program.weights
    total = {name: torch.zeros_like(weights[name]) for name in names}
    squares = {name: torch.zeros_like(weights[name]) for name in names}
    for sample in evidence.track(list(_samples(data)), "taking gradients"):
        for name, gradient in _gradients(evidence.program, [sample], 1, names):
            total[name].add_(gradient, alpha=1 / data.samples)
            squares[name].addcmul_(gradient, gradient, value=1 / data.samples)
    for name in names:
        yield name, total.pop(name), squares.pop(name)


def _gradients(
    program: Program, batches: Iterable[Mapping[str, Tensor]], samples: int, names: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """(name, gradient) of the mean loss on `batches`, which hold `samples` samples together."""
    weights = {name: weight.detach() for name, weight in program.weights.items()}
    leaves = {name: weights[name].requires_grad_() for name in names}
    for batch in batches:
        with torch.enable_grad():
            outputs = program.run(weights, batch)
            rows = len(next(iter(batch.values())))
            loss = _finite_loss(outputs[program.outputs[0].name], batch) * (rows / samples)
        loss.backward()
    for name, leaf in leaves.items():
        gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        leaf.grad = None
        yield name, gradient.detach()


def _finite_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    loss = next_token_loss(logits, batch)
    if not bool(torch.isfinite(loss)):
        raise CalibrationError("the loss on the calibration data is not finite")
    return loss


def _samples(calibration: Calibration) -> Iterator[dict[str, Tensor]]:
    """Every sample as a batch of one."""
    for batch in calibration:
        for row in range(len(next(iter(batch.values())))):
            yield {name: tensor[row : row + 1] for name, tensor in batch.items()}


class Random(Criterion):
    """Uniformly random scores: the baseline that every criterion must beat."""

    name = "random"

    def scores(self, evidence: Evidence) -> Scores:
        """Independent of the order of groups: each is seeded by its name."""
        found = {}
        for group in evidence.groups:
            seed = zlib.crc32(f"{evidence.seed}:{group.name}".encode())
            generator = torch.Generator().manual_seed(seed)
            sizes = evidence.sizes(group)
            found[group.name] = torch.rand(sizes, generator=generator, dtype=torch.float64)
        return found


def check_scores(scores: Mapping[str, Tensor], evidence: Evidence) -> None:
    """Refuse scores that are missing, misshapen or not finite.

    Raises
    ------
    SelectionError
        Naming the group.
    """
    for group in evidence.groups:
        found = scores.get(group.name)
        if found is None or tuple(found.shape) != evidence.sizes(group):
            raise SelectionError(f"{group.name}: the criterion gave no scores of the right shape")
        if not bool(torch.isfinite(found).all()):
            raise SelectionError(f"{group.name}: the criterion gave scores that are not finite")
