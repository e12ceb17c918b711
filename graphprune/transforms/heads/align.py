"""Making the key and value heads of each group equal before they are merged, by calibration data.

The edit leaves all sizes as they are: keys and values of a group become those of one shared head,
queries and outputs take the factor of their own head, and outputs are then refitted to give what
they gave. Merging equal heads is exact, so that all that the edit costs is what is measured here.
Layers follow each other: each sees what the layers before it give after their edit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.analysis.axes import Atom
from graphprune.analysis.inference import Types
from graphprune.analysis.matrices import contractions
from graphprune.calibration.data import Calibration
from graphprune.calibration.layerwise import Run, segments, unpadded
from graphprune.calibration.statistics import damped
from graphprune.errors import CalibrationError
from graphprune.io.progress import Progress, no_progress
from graphprune.ir.program import Program
from graphprune.ir.provenance import module_path
from graphprune.plan.plan import Order
from graphprune.transforms.heads.layout import (
    HeadMap,
    Projection,
    Unmapped,
    head_atom,
    map_heads,
    moves_of,
    sites_of,
)
from graphprune.transforms.heads.merge import Heads, equal_heads
from graphprune.transforms.heads.sharing import (
    Groups,
    Rotation,
    Shared,
    cheapest,
    neighbours,
    rotated_cost,
    shared_keys,
    shared_subspace,
)

_DISTANCES = 64
"""Positions between a query and a key over which products are averaged."""

_EXACT = 1e-4
"""Part of the squares up to which an operand is what its projection gave; rounding of bfloat16."""

_SAME = 1e-2
"""Relative difference up to which two factors are one."""


@dataclass(frozen=True)
class Aligned:
    """What aligning made.

    Parameters
    ----------
    program
        The program at its old size, whose KV heads are equal within every group.
    moves
        Name of the heads -> how they come to lie beside those that they are equal to.
    errors
        Name of the heads -> relative squared error of "keys" (their products with queries),
        "values" (what the outputs make of them) and "outputs" (after the refit).
    notes
        Name of the heads -> of what only the mean was taken, or what else was not done, and why.
    """

    program: Program
    moves: Mapping[str, tuple[Order, ...]]
    errors: Mapping[str, Mapping[str, float]]
    notes: Mapping[str, str]


@torch.no_grad()
def align(
    program: Program,
    types: Types,
    chosen: Sequence[Heads],
    groups: int,
    calibration: Calibration,
    *,
    similar: bool = True,
    damp: float = 0.01,
    track: Progress = no_progress,
) -> Aligned:
    """Make the KV heads of every group of `chosen` equal.

    Values take the best shared subspace of what outputs make of them, keys the best shared head of
    what queries make of them (`transforms.heads.sharing`), and each output projection is the least
    squares fit, damped towards its aligned self, of what it gave on the same inputs. Where keys or
    values are no linear map of the inputs (a norm of their own), or their heads cannot be told
    apart, they are averaged, with the reason.

    Parameters
    ----------
    program, types
        The program, and its axis types.
    chosen, groups
        KV heads that can be merged, and how many are to be left of each.
    calibration
        Batches to run it on.
    similar
        Whether to group the heads that cost the least to share, instead of neighbours.
    damp
        Damping of the refit, as a part of the mean second moment of its inputs.
    track
        Wraps the loop over layers in a progress bar.

    Raises
    ------
    CalibrationError
        When the batches do not fit the program, or what heads compute on them is not finite.
    """
    calibration.check(program)
    held = contractions(program)
    notes: dict[str, str] = {}
    maps: list[HeadMap] = []
    for heads in chosen:
        try:
            maps.append(map_heads(types, held, heads))
        except Unmapped as why:
            notes[heads.name] = f"keys and values: {why}"
    fits = [_Fit(program, types, found, groups, similar, damp) for found in maps]
    parted = [
        replace(projection.matrix, weight=found.heads.name)
        for found in maps
        for projection in found.projections
    ]
    runs = Run.all(program, unpadded(calibration))
    changed: dict[str, Tensor] = {}
    moves: dict[str, tuple[Order, ...]] = {}
    for heads in chosen:
        if heads.name in notes:
            way, moves[heads.name], _ = grouping(program, types if similar else None, heads, groups)
            changed |= equal_heads({**program.weights, **changed}, heads, way)
    for run in runs:
        run.replace(changed)
    for nodes in track(segments(program, parted), "aligning heads"):
        inside = set(nodes)
        here = [fit for fit in fits if fit.map.projections[3].node in inside]
        for see, edit in _STAGES if here else ():
            for run in runs:
                values = run.copied(nodes)
                for node in nodes:
                    run.step(node, values)
                for fit in here:
                    see(fit, values)
            for fit in here:
                changed |= edit(fit, {**program.weights, **changed})
            for run in runs:
                run.replace(changed)
        for run in runs:
            run.advance(nodes)
    for fit in fits:
        name = fit.map.heads.name
        moves[name] = fit.moves
        if fit.notes:
            notes[name] = "; ".join(fit.notes)
    errors = {fit.map.heads.name: fit.errors for fit in fits}
    return Aligned(program.with_weights(changed), moves, errors, notes)


def grouping(
    program: Program, types: Types | None, heads: Heads, groups: int
) -> tuple[Groups, tuple[Order, ...], str]:
    """Which of `heads` become one, how they come to be neighbours, and why they stay in order.

    Given `types`, those whose keys and values are made by the most similar weights go together,
    unless the heads are not alike. No data is needed.
    """
    atom, why = _movable(types, heads) if types and groups > 1 else (None, "")
    if types is None or atom is None:
        return neighbours(heads.size, groups), (), why
    costs = torch.zeros(heads.size, heads.size, dtype=torch.float64)
    for weight, dim, slices in heads.slices():
        rows = program.weights[weight].detach().double().movedim(dim, 0)
        if rows.ndim > 1:
            each = torch.stack([rows[at].flatten() for at in slices])
            costs += torch.cdist(each, each).square() / each.square().sum().clamp(min=1e-150)
    way = cheapest(costs, groups)
    return way, moves_of(types, atom, _flat(way)), ""


def _movable(types: Types, heads: Heads) -> tuple[Atom | None, str]:
    """The axis of `heads` and their queries if its units may change places, else why not."""
    try:
        atom = head_atom(types, heads)
    except Unmapped as why:
        return None, str(why)
    if len(sites_of(types, atom)) > len(heads.sites):
        return None, "another attention has its heads in the same order"
    if atom not in types.frozen:
        return atom, ""
    reason = types.frozen[atom]
    return None, f"{reason.why} at {reason.node.target} in {module_path(reason.node)}"


def _flat(way: Groups) -> list[int]:
    return [head for group in way for head in group]


class _Fit:
    """What is seen of the heads of one attention, and what follows from it."""

    def __init__(
        self,
        program: Program,
        types: Types,
        found: HeadMap,
        groups: int,
        similar: bool,
        damp: float,
    ) -> None:
        self.program, self.types, self.map = program, types, found
        self.groups, self.similar, self.damp = groups, similar, damp
        self.notes: list[str] = []
        self.errors: dict[str, float] = {}
        self.moves: tuple[Order, ...] = ()
        self._queries = self._keys = self._values = torch.zeros((), dtype=torch.float64)
        self._followed = tuple(_Followed() for _ in found.operands)
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []

    # -- before the edit ------------------------------------------------------------------------

    def see(self, values: Mapping[fx.Node, Any]) -> None:
        """Count one batch in."""
        query, key, value, output = self.map.projections
        inputs = output.inputs(values)
        self._before.append(inputs)
        made = [self._made(each, values) for each in (query, key, value)]
        moments = [torch.einsum("nksd,nkse->kde", made[0], made[0])]
        moments += [torch.einsum("nksd,nmse->kdme", each, each) for each in made[1:]]
        self._queries = self._queries + moments[0]
        self._keys, self._values = self._keys + moments[1], self._values + moments[2]
        made.append(inputs[:, output.places])
        for each, operand, followed, whole in zip(
            made, self.map.operands, self._followed, (False, False, True, True), strict=True
        ):
            seen = operand.read(values)[:, :, :, : each.shape[2]]
            if len(each) != seen.shape[0] * seen.shape[1]:
                followed.fits = False
                continue
            pair = (each.reshape(seen.shape), seen)
            followed.add(*(part + 0j if whole else self._turning(part) for part in pair))

    def _made(self, projection: Projection, values: Mapping[fx.Node, Any]) -> Tensor:
        """``[n, kv, slots, d]``: what `projection` gives, float64."""
        rows = self._rows(self.program.weights, projection)
        made = torch.einsum("ni,ksdi->nksd", projection.inputs(values), rows)
        if projection.bias:
            made = made + self.program.weights[projection.bias].double()[projection.places]
        return made

    def _rows(self, weights: Mapping[str, Tensor], projection: Projection) -> Tensor:
        """``[kv, slots, d, in]``, float64."""
        matrix = projection.matrix.read(weights[projection.matrix.weight])[0]
        return matrix.double()[projection.places]

    def _turning(self, part: Tensor) -> Tensor:
        """Coordinates that are rotated together as complex numbers, then the fixed ones."""
        first, second = self.map.planes.unbind(1)
        turned = torch.complex(part[..., first], part[..., second])
        return torch.cat([turned, part[..., self.map.fixed] + 0j], -1)

    # -- the edit -------------------------------------------------------------------------------

    def aligned(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights whose heads are equal within each group."""
        moments = (self._queries, self._keys, self._values)
        if not all(bool(each.isfinite().all()) for each in moments):
            name = self.map.heads.name
            raise CalibrationError(f"{name}: its heads are not finite on the calibration data")
        outputs = self._columns(self.program.weights)
        uses = torch.einsum("oksd,okse->kde", outputs, outputs)
        rotation, linear = self._rotation(), self._values_linear()
        way = self._way(rotation, uses if linear else None)
        new = {**weights, **equal_heads(weights, self.map.heads, way)}
        fits: dict[str, list[Shared]] = {"keys": [], "values": []}
        for group in way:
            at = list(group)
            if rotation is not None:
                shared = shared_keys(_block(self._keys, at), self._queries[at], rotation)
                self._share_keys(new, at, shared)
                fits["keys"].append(shared)
            if linear:
                shared = shared_subspace(_block(self._values, at), uses[at])
                self._share_values(new, at, shared)
                fits["values"].append(shared)
        self.errors |= {
            what: sum(fit.error for fit in found) / max(sum(fit.total for fit in found), 1e-150)
            for what, found in fits.items()
            if found
        }
        return {name: weight for name, weight in new.items() if weight is not weights[name]}

    def _way(self, rotation: Rotation | None, uses: Tensor | None) -> Groups:
        """Which heads become one."""
        heads, size = self.map.heads, self.map.heads.size
        types = self.types if self.similar else None
        atom, why = _movable(types, heads) if types and self.groups > 1 else (None, "")
        if why:
            self.notes.append(f"heads stay in order: {why}")
        if types is None or atom is None or (rotation is None and uses is None):
            way, self.moves, _ = grouping(self.program, types, heads, self.groups)
            return way
        costs = torch.zeros(2, size, size, dtype=torch.float64)
        totals = [0.0, 0.0]
        for pair in itertools.combinations(range(size), 2):
            at, (a, b) = list(pair), pair
            if rotation is not None:
                cost, total = rotated_cost(_block(self._keys, at), self._queries[at], rotation)
                costs[0, a, b] = costs[0, b, a] = cost
                totals[0] += total
            if uses is not None:
                shared = shared_subspace(_block(self._values, at), uses[at])
                costs[1, a, b] = costs[1, b, a] = shared.error
                totals[1] += shared.total
        parts = torch.tensor(totals, dtype=torch.float64).clamp(min=1e-150)
        way = cheapest((costs / parts[:, None, None]).sum(0), self.groups)
        self.moves = moves_of(types, atom, _flat(way))
        return way

    def _rotation(self) -> Rotation | None:
        """How positions rotate queries and keys; None, with the reason noted, if they do more."""
        query, key, *_ = self._followed
        why = next((why for each in (query, key) if (why := each.reason())), "")
        turns = key.turns
        shared = min(len(query.turns), len(key.turns))
        if not why:
            ratio = query.turns[:shared] / turns[:shared]
            steady = turns.abs() / turns[0].abs()
            if not (_alike(ratio / ratio[0, 0]) and _alike(steady)):
                why = "queries and keys are scaled apart by position or coordinate"
        if why:
            self.notes.append(f"keys: {why}")
            return None
        # A key lies before its query: it is turned back by so many positions.
        relative = (turns[:_DISTANCES] / turns[0]).conj()
        return Rotation.of(self.map.planes, self.map.fixed, relative)

    def _values_linear(self) -> bool:
        """Whether values and outputs are linear in what the heads hold; if not, that is noted."""
        for each in self._followed[2:]:
            why = each.reason()
            if not why and not _alike(each.turns / each.turns[0, 0]):
                why = "coordinates are scaled apart"
            if why:
                self.notes.append(f"values: {why}")
                return False
        return True

    def _share_keys(self, new: dict[str, Tensor], at: list[int], shared: Shared) -> None:
        query, key, *_ = self.map.projections
        pool = shared.pool / _scale(_block(self._keys, at), shared.pool)
        factors = shared.factors * _scale(_block(self._keys, at), shared.pool)
        self._write(new, key, at, lambda rows: _pooled(pool, rows))
        self._write(new, query, at, lambda rows: torch.einsum("kde,ksd...->kse...", factors, rows))

    def _share_values(self, new: dict[str, Tensor], at: list[int], shared: Shared) -> None:
        _, _, value, output = self.map.projections
        scale = _scale(_block(self._values, at), shared.pool)
        self._write(new, value, at, lambda rows: _pooled(shared.pool / scale, rows))
        columns = self._columns(self.program.weights)[:, at]
        factored = torch.einsum("oksd,kde->okse", columns, shared.factors * scale)
        name = output.matrix.weight
        whole = output.matrix.read(new[name])
        whole[0][:, output.places[at]] = factored.to(whole.dtype)
        new[name] = output.matrix.write(new[name], whole)

    def _write(
        self,
        new: dict[str, Tensor],
        projection: Projection,
        at: list[int],
        change: Callable[[Tensor], Tensor],
    ) -> None:
        """Rows, and their biases, of the heads `at`, ``[heads, slots, d, ...]``, changed."""
        name, bias = projection.matrix.weight, projection.bias
        places = projection.places[at]
        whole = projection.matrix.read(new[name])
        rows = change(self._rows(self.program.weights, projection)[at])
        whole[0][places] = rows.to(whole.dtype)
        new[name] = projection.matrix.write(new[name], whole)
        if bias:
            old = self.program.weights[bias].detach()
            vector = new[bias].detach().clone()
            vector[places] = change(old.double()[places]).to(old.dtype)
            new[bias] = vector

    def _columns(self, weights: Mapping[str, Tensor]) -> Tensor:
        """``[out, kv, slots, d]``: what the output projection makes of every head, float64."""
        output = self.map.projections[3]
        whole = output.matrix.read(weights[output.matrix.weight])[0].double()
        return whole[:, output.places]

    # -- after the edit -------------------------------------------------------------------------

    def see_again(self, values: Mapping[fx.Node, Any]) -> None:
        """Take down what the output projection is given now, in the order of `see`."""
        self._after.append(self.map.projections[3].inputs(values))

    def refitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The output projection fitted to what it gave before the edit."""
        matrix = self.map.projections[3].matrix
        old = matrix.read(self.program.weights[matrix.weight])[0].double()
        start = matrix.read(weights[matrix.weight])[0].double()
        pairs = list(zip(self._before, self._after, strict=True))
        gram = sum((after.mT @ after for _, after in pairs), torch.zeros(()))
        wanted = sum((after.mT @ (before @ old.mT) for before, after in pairs), torch.zeros(()))
        power = sum(float((before @ old.mT).square().sum()) for before, _ in pairs)
        more = self.damp * float(gram.diagonal().mean())
        best = torch.linalg.solve(damped(gram, self.damp), wanted + more * start.mT).mT
        left = power - 2 * float((best.mT * wanted).sum()) + float(((best @ gram) * best).sum())
        self.errors["outputs"] = max(left, 0.0) / max(power, 1e-150)
        self._before, self._after = [], []
        whole = best[None].to(weights[matrix.weight].dtype)
        return {matrix.weight: matrix.write(weights[matrix.weight], whole)}


_STAGES = ((_Fit.see, _Fit.aligned), (_Fit.see_again, _Fit.refitted))
"""What is looked at, and the edit that follows from it."""


class _Followed:
    """Whether an operand is what its projection made, each position times factors of its own."""

    def __init__(self) -> None:
        self.fits = True
        self._crossed = torch.zeros(0, 0, dtype=torch.complex128)
        self._power = torch.zeros(0, 0, dtype=torch.float64)
        self._total = 0.0

    def add(self, made: Tensor, seen: Tensor) -> None:
        """``[batch, positions, kv, slots, coordinates]``, complex."""
        over = (0, 2, 3)
        self._crossed = _added(self._crossed, (made.conj() * seen).sum(over))
        self._power = _added(self._power, made.abs().square().sum(over))
        self._total += float(seen.abs().square().sum())

    @property
    def turns(self) -> Tensor:
        """``[positions, coordinates]``: the factors."""
        return self._crossed / self._power.clamp(min=1e-150)

    def reason(self) -> str:
        """Why it is not, or ""."""
        if not self.fits:
            return "they are not one for each input"
        explained = self._crossed.abs().square() / self._power.clamp(min=1e-150)
        if self._total - float(explained.sum()) > _EXACT * self._total:
            return "more is done with them than to rotate them by position"
        return ""


def _added(one: Tensor, other: Tensor) -> Tensor:
    """The sum of tables of which one may have more rows."""
    if len(one) < len(other):
        one, other = other, one
    if not len(other):
        return one
    found = one.clone()
    found[: len(other)] += other
    return found


def _alike(factors: Tensor) -> bool:
    return bool(((factors - 1).abs() < _SAME).all())


def _block(moments: Tensor, at: Sequence[int]) -> Tensor:
    """``[m d, m d]`` of ``[kv, d, kv, d]``: the moments of the heads `at`."""
    width = moments.shape[1]
    return moments[at][:, :, at].reshape(len(at) * width, len(at) * width)


def _scale(block: Tensor, pool: Tensor) -> float:
    """The shared head's root mean square, as a part of that of the heads that it is made of."""
    heads = len(block) // len(pool)
    power = float(((pool @ block) * pool).sum()) * heads / max(float(block.trace()), 1e-150)
    return max(power, 1e-150) ** 0.5


def _pooled(pool: Tensor, rows: Tensor) -> Tensor:
    """``[heads, 1, d, ...]``: the shared head for each of the heads in `rows`, of that shape."""
    shared = torch.tensordot(pool, rows.flatten(0, 2), 1)
    return shared.expand(len(rows), 1, *shared.shape)
