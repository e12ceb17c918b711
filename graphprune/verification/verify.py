"""Verification: a rewritten program must equal the original with its removed slices zeroed.

The reference is made from the plan's index maps and the original graph alone; nothing of the
rewriter's slicing is shared. Removing zeroes; where units are chosen at run time, as experts are,
those that went are never chosen, since their logits are minus infinity. Merging replaces every head
of a run by the run's mean. The change of shape that follows must then be exact, whatever the edit
did to quality. Where a normalisation's statistics run over an axis that lost units (LayerNorm over
the residual stream), the reference takes them over what stays; a plain mean (RMSNorm) keeps its old
divisor, which zeroing does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.axes import Axis, Occurrence
from graphprune.analysis.inference import Types, infer
from graphprune.errors import VerificationError
from graphprune.ir.nodes import argument_names
from graphprune.ir.program import PRESENT, Program, caches_of
from graphprune.ir.sample_inputs import continuation, random_inputs
from graphprune.plan.plan import Place, Plan, Step

Left = tuple[int, Tensor, bool]
"""A dimension, its places that are left, and whether a result has zeros at the others."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class VerifyReport:
    """What was compared and how far apart it was.

    Parameters
    ----------
    max_relative_error
        Largest absolute difference of any output, over the largest absolute value of that output.
    max_weight_error
        The same over the weights of the program and those that the plan's index maps leave.
    tolerance
        What was allowed.
    outputs
        Error of each output.
    runs
        What was run, for people.
    """

    max_relative_error: float
    max_weight_error: float
    tolerance: float
    outputs: Mapping[str, float]
    runs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"max relative error {self.max_relative_error:.1e} "
            f"(tolerance {self.tolerance:.0e}; {', '.join(self.runs)})"
        )


def verify(
    original: Program,
    plan: Plan,
    program: Program,
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> VerifyReport:
    """Check that `program` is what `plan` makes of `original`.

    Parameters
    ----------
    original
        The program that the plan was made for, with its weights.
    plan
        What was removed and merged.
    program
        The rewritten program.
    tolerance
        Largest relative error allowed; by default 1e-4 in float32, and wider in half precision.
    seed
        Seed of the random inputs.

    Raises
    ------
    PlanError
        When the plan was made for another program.
    VerificationError
        Past tolerance, naming the output or weight and the error; also for other shapes, and for
        values that are not finite.
    """
    plan.check(original)
    allowed = _TOLERANCE.get(_dtype(original), 1e-4) if tolerance is None else tolerance
    reference = _Reference(original, plan)
    weights = {
        name: _error(weight, program.weights.get(name), name)
        for name, weight in reference.narrow.items()
    }
    if left := sorted(reference.gone.intersection(program.weights)):
        raise VerificationError(f"weight {left[0]} is still there, and should have gone")
    outputs: dict[str, float] = {}
    runs = []
    wide, narrow = _Session(reference), _Session(program)
    for run, inputs in _runs(original, seed):
        runs.append(run)
        try:
            got = narrow(inputs)
        except Exception as error:  # a wrong graph may fail in any way
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise VerificationError(f"the program does not run: {first}") from error
        for name, expected in wide(inputs).items():
            outputs[name] = max(outputs.get(name, 0.0), _error(expected, got.get(name), name))
    for errors, kind in ((weights, "weight"), (outputs, "output")):
        worst = max(errors, key=errors.__getitem__, default=None)
        if worst is not None and not errors[worst] <= allowed:
            raise VerificationError(
                f"{kind} {worst} is {errors[worst]:.1e} (relative) away from the masked original, "
                f"past the tolerance of {allowed:.0e}"
            )
    return VerifyReport(
        max(outputs.values(), default=0.0),
        max(weights.values(), default=0.0),
        allowed,
        outputs,
        tuple(runs),
    )


def masked(
    original: Program, plan: Plan, types: Types | None = None
) -> Callable[..., dict[str, Tensor]]:
    """`original` with what `plan` removes zeroed, to be called as a program is.

    Parameters
    ----------
    original
        The program that the plan was made for.
    plan
        What goes; it need not be one that the rewriter can carry out.
    types
        The types of `original`, where they are known; inferred by default.
    """
    return torch.no_grad()(_Reference(original, plan, types).__call__)


def _dtype(program: Program) -> torch.dtype:
    kinds = program.kinds
    return next(w.dtype for name, w in program.weights.items() if kinds[name] == "parameter")


def _runs(program: Program, seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    inputs = random_inputs(program, seed=seed)
    yield "full pass", inputs
    if program.is_decoder:
        yield "one more token on the cache", continuation(program, inputs, seed=seed + 1)


@dataclass
class _Session:
    """Runs a program step by step on its own KV cache; returns the other outputs."""

    call: Any
    cache: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.call(**inputs, **self.cache)
        self.cache = caches_of(outputs)
        return {k: v for k, v in outputs.items() if not k.startswith(PRESENT)}


def _error(expected: Tensor, found: Tensor | None, name: str) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    if found is None or found.shape != expected.shape:
        shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
        raise VerificationError(f"{name} is {shape}, not of shape {tuple(expected.shape)}")
    if expected.numel() == 0 or not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(expected, found) else float("inf")
    if not bool(torch.isfinite(expected).all()) or not bool(torch.isfinite(found).all()):
        raise VerificationError(f"{name} holds values that are not finite")
    scale = float(expected.abs().max()) or 1.0
    return float((expected - found).abs().max()) / scale


class _Reference:
    """The original graph on edited weights: removed slices zeroed, merged heads made equal.

    Attributes
    ----------
    narrow
        The edited weights with what goes left out, which the program must hold.
    gone
        The names of weights that go as a whole, which it must not hold.
    """

    def __init__(self, original: Program, plan: Plan, types: Types | None = None) -> None:
        self.original = original
        self.narrow: dict[str, Tensor] = dict(original.weights)
        self.origin: dict[Place, Tensor] = {}
        for step in plan.steps:
            self._edit(step)
        self.gone = {name for step in plan.steps for cut in step.cuts for name in cut.whole}
        for name in self.gone:
            del self.narrow[name]
        # What goes with its unit as a whole says nothing about the units of its own axes.
        self.origin = {place: at for place, at in self.origin.items() if place[0] not in self.gone}
        wide = {name: self._widen(name) for name in original.weights}
        self.weights = wide
        self.statistics: dict[fx.Node, list[Left]] = {}
        self.choices: dict[fx.Node, list[tuple[int, Tensor]]] = {}
        if self.origin:
            self._find_statistics_and_choices(types or infer(original))

    # -- weights --------------------------------------------------------------------------------

    def _edit(self, step: Step) -> None:
        lost: dict[Place, set[int]] = {}
        for cut in step.cuts:
            for weight, dim, indices in cut.indices():
                lost.setdefault((weight, dim), set()).update(indices)
        for place, gone in lost.items():
            size = self.narrow[place[0]].shape[place[1]]
            kept = [index for index in range(size) if index not in gone]
            moved = torch.full((size,), -1)
            moved[kept] = torch.arange(len(kept))
            self._shrink(place, kept, moved)
        for order in step.orders:
            self._shrink((order.weight, order.dim), list(order.places), _inverse(order.places))
        for merge in step.merges:
            for weight, dim, runs in merge.runs():
                self._pool((weight, dim), runs)

    def _pool(self, place: Place, runs: list[list[int]]) -> None:
        name, dim = place
        weight = self.narrow[name].detach().clone().movedim(dim, 0)
        members = torch.tensor(runs)
        pooled = weight[members].double().mean(dim=1).to(weight.dtype)
        weight[members[:, 0]] = pooled
        self.narrow[name] = weight.movedim(0, dim)
        size = len(weight)
        first = torch.arange(size)
        first[members] = members[:, :1].expand_as(members)
        kept = sorted(set(first.tolist()))
        moved = torch.empty(size, dtype=torch.long)
        moved[kept] = torch.arange(len(kept))
        self._shrink(place, kept, moved[first])

    def _shrink(self, place: Place, kept: list[int], moved: Tensor) -> None:
        """Keep only `kept`; `moved` tells where every index is found now (-1: nowhere)."""
        name, dim = place
        weight = self.narrow[name].detach()
        origin = self.origin.get(place, torch.arange(weight.shape[dim]))
        self.origin[place] = torch.where(origin >= 0, moved[origin.clamp(min=0)], -1)
        self.narrow[name] = weight.movedim(dim, 0)[kept].movedim(0, dim).contiguous()

    def _widen(self, name: str) -> Tensor:
        """The narrow weight at its original shape: copies of merged heads, zeros for what went."""
        if name not in self.narrow:
            return torch.zeros_like(self.original.weights[name])
        weight = self.narrow[name]
        for (other, dim), origin in self.origin.items():
            if other != name:
                continue
            weight = weight.movedim(dim, 0)[origin.clamp(min=0)]
            weight[origin < 0] = 0
            weight = weight.movedim(0, dim)
        return weight

    # -- running --------------------------------------------------------------------------------

    def _find_statistics_and_choices(self, types: Types) -> None:
        """Normalisations over, and choices from, axes that lost units, and which of them stay."""
        kept = self._kept(types)

        def stays(axis: Axis) -> Tensor | None:
            if kept.keys().isdisjoint(types.axes.atoms(axis)):  # it may be of any dynamic size
                return None
            found = torch.ones(axis.size).bool()
            for place in types.axes.occurrences(axis):
                if place.atom in kept:
                    found[_indices(place)[~kept[place.atom]].flatten()] = False
            return None if bool(found.all()) else found

        for entry in types.facts.statistics:
            left = stays(types.of[entry.node.all_input_nodes[0]][entry.dim])
            if left is not None:
                found = self.statistics.setdefault(entry.node, [])
                found.append((entry.dim, left.nonzero().flatten(), entry.clears))
        for choice in types.facts.choices:
            if (left := stays(choice.axis)) is not None:
                self.choices.setdefault(choice.node, []).append((choice.dim, left))

    def _kept(self, types: Types) -> dict[Axis, Tensor]:
        """Every atom that lost units -> which of them are left."""
        kept: dict[Axis, Tensor] = {}
        for (name, dim), origin in self.origin.items():
            for place in types.axes.occurrences(types.weight(name)[dim]):
                stays = (origin[_indices(place)] >= 0).flatten(1).any(1)
                kept[place.atom] = kept.get(place.atom, torch.zeros(place.atom.size).bool()) | stays
        return kept

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        filled = self.original.fill(inputs)
        arguments = (
            *(self.weights[name] for name in self.original.weights),
            *(filled[value.name] for value in self.original.inputs),
        )
        masked = _Masked(self.original.graph_module, self.statistics, self.choices)
        outputs = masked.run(*arguments)
        return {v.name: out for v, out in zip(self.original.outputs, outputs, strict=True)}


def _inverse(places: Sequence[int]) -> Tensor:
    """Where every index is found among `places`."""
    return torch.tensor(places).argsort()


def _indices(place: Occurrence) -> Tensor:
    """Row `u`: the indices that unit `u` of an atom holds at `place`."""
    rows = place.offset + torch.arange(place.atom.size)[:, None] * place.inner
    rows = rows + torch.arange(place.inner)
    for loop, stride in place.outer:
        rows = (rows[:, None] + (torch.arange(loop.size) * stride)[:, None]).flatten(1)
    return rows


class _Masked(fx.Interpreter):
    """Runs a graph with some statistics taken over what stays, and choices made from what stays."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        statistics: Mapping[fx.Node, list[Left]],
        choices: Mapping[fx.Node, list[tuple[int, Tensor]]],
    ) -> None:
        super().__init__(graph_module)
        self.statistics = statistics
        self.choices = choices

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        for dim, stays in self.choices.get(n, ()):
            shape = [1] * args[0].ndim
            shape[dim] = -1
            args = (args[0].masked_fill(~stays.view(shape), -torch.inf), *args[1:])
        return args, kwargs

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.statistics:
            result = super().run_node(n)
            return self._without_quotients_of_nothing(n, result)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return _over_what_stays(n, self.statistics[n], *args, **kwargs)

    def _without_quotients_of_nothing(self, n: fx.Node, result: Any) -> Any:
        """Zero divided by zero is zero: what goes may be divided by what goes along with it."""
        if n.target is not torch.ops.aten.div.Tensor or not bool(result.isnan().any()):
            return result
        (above, below), _ = self.fetch_args_kwargs_from_env(n)
        below = torch.as_tensor(below)
        return result.masked_fill((above == 0) & (below == 0), 0)


def _over_what_stays(
    node: fx.Node, left: Sequence[Left], whole: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """What `node` makes of the places of `whole` that are left, with zeros at those that went."""
    names = argument_names(node)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    narrow = whole
    for dim, kept, _ in left:
        narrow = narrow.index_select(dim, kept)
    if "normalized_shape" in given:
        lead = whole.ndim - len(given["normalized_shape"])
        given["normalized_shape"] = list(narrow.shape[lead:])
        affine = [(dim - lead, kept) for dim, kept, _ in left]
    elif "num_groups" in given:
        (_, kept, _), inner = left[0], whole.shape[1] // given["num_groups"]
        given["num_groups"] = len((kept // inner).unique())
        affine = [(0, kept)]
    else:
        affine = []
    for name in ("weight", "bias"):
        for dim, kept in affine:
            if given.get(name) is not None:
                given[name] = given[name].index_select(dim, kept)
    result = node.target(narrow, **given)  # type: ignore[operator]
    if not any(clears for _, _, clears in left):
        return result
    for dim, kept, _ in left:
        wide = [*result.shape[:dim], whole.shape[dim], *result.shape[dim + 1 :]]
        result = result.new_zeros(wide).index_copy(dim, kept, result)
    return result
