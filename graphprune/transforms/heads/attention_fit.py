"""Statistics of the heads of one attention on calibration data, and the edits fitted to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphprune import ranks
from graphprune.analysis.types import Types
from graphprune.calibration.damping import damped
from graphprune.errors import CalibrationError
from graphprune.ir.interpreter import call
from graphprune.ir.program import Program
from graphprune.plan.steps import Permutation
from graphprune.transforms.heads.followed import Followed, alike
from graphprune.transforms.heads.grouping import Grouping, Groups, group_by_weights, reorderable
from graphprune.transforms.heads.layout import HeadMap, Projection
from graphprune.transforms.heads.merge import equal_heads
from graphprune.transforms.heads.sharing import (
    Rotation,
    Shared,
    attended_values,
    rotated_cost,
    shared_keys,
    shared_subspace,
)
from graphprune.weights import deferred

_DISTANCES = 64
"""Positions between a query and a key over which products are averaged."""

_AT_MOST = 4096
"""Coordinates of value heads, as each query of their group attends to them, up to which products of
all pairs are held: 128 MiB."""


class AttentionFit:
    """The heads of one attention made equal within each group, in three steps.

    `observe` and then `share_keys`: heads are grouped, and keys become those of shared heads.
    `observe_attended` and then `share_values`: values do, as the shared keys let them be attended
    to. `observe_shared` and then `refit_output`: the output projection makes up for the rest.
    """

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
        self.weights = program.operands
        self.groups, self.similar, self.damp = groups, similar, damp
        self.notes: list[str] = []
        self.errors: dict[str, float] = {}
        self.reordering: tuple[Permutation, ...] = ()
        self._queries = self._keys = self._values = torch.zeros((), dtype=torch.float64)
        self._followed = tuple(Followed() for _ in found.operands)
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._way: Groups = ()
        self._linear = False
        self._attended = 0  # batches whose attended values are counted in
        self._sums = [torch.zeros((), dtype=torch.float64)] * 2

    # -- sharing heads --------------------------------------------------------------------------

    def observe(self, values: Mapping[fx.Node, Any]) -> None:
        """Count one batch in, before any edit."""
        query, key, value, output = self.map.projections
        inputs = output.inputs(values)
        self._before.append(inputs)
        made = [self._made(each, values) for each in (query, key, value)]
        moments = [torch.einsum("nksd,nkse->kde", made[0], made[0])]
        moments += [torch.einsum("nksd,nmse->kdme", each, each) for each in made[1:]]
        self._queries = self._queries + moments[0]
        self._keys, self._values = self._keys + moments[1], self._values + moments[2]
        made.append(inputs[:, output.indices])
        for each, operand, followed, whole in zip(
            made, self.map.operands, self._followed, (False, False, True, True), strict=True
        ):
            seen = operand.read(values)[:, :, :, : each.shape[2]]
            if len(each) != seen.shape[0] * seen.shape[1]:
                followed.misfits += 1
                continue
            pair = (each.reshape(seen.shape), seen)
            followed.add(*(part + 0j if whole else self._turning(part) for part in pair))

    def _made(self, projection: Projection, values: Mapping[fx.Node, Any]) -> Tensor:
        """Return what `projection` gives, ``[n, kv, slots, d]``, float64."""
        rows = self._rows(self.weights, projection)
        made = torch.einsum("ni,ksdi->nksd", projection.inputs(values), rows)
        if projection.bias:
            made = made + self.weights[projection.bias].double()[projection.indices]
        return made

    def _rows(self, weights: Mapping[str, Tensor], projection: Projection) -> Tensor:
        """Return the rows of `projection`, ``[kv, slots, d, in]``, float64."""
        matrix = projection.matrix.read(weights[projection.matrix.weight])[0]
        return matrix.double()[projection.indices]

    def _turning(self, part: Tensor) -> Tensor:
        """Return coordinates that are rotated together as complex numbers, then the fixed ones."""
        first, second = self.map.planes.unbind(1)
        turned = torch.complex(part[..., first], part[..., second])
        return torch.cat([turned, part[..., self.map.fixed] + 0j], -1)

    def share_keys(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that change when the keys of each group become equal.

        So do values where they cannot be shared as they are attended to: they are averaged.
        """
        self._add_up()
        # What is solved is small, and solved on the CPU.
        moments = [each.cpu() for each in (self._queries, self._keys, self._values)]
        self._queries, self._keys, self._values = moments
        weights = {name: deferred.made(weights[name]).cpu() for name in self._names()}
        self.weights = {name: deferred.made(self.weights[name]).cpu() for name in self._names()}
        if not all(bool(each.isfinite().all()) for each in moments):
            name = self.map.heads.name
            raise CalibrationError(f"{name}: its heads are not finite on the calibration data")
        outputs = self._columns(self.weights)
        uses = torch.einsum("oksd,okse->kde", outputs, outputs)
        rotation, self._linear = self._rotation(), self._values_linear()
        self._way = self._grouped(rotation, uses if self._linear else None)
        new = {**weights, **equal_heads(weights, self.map.heads, self._way)}
        if self._linear:
            self._write(new, self.map.projections[2], list(range(len(uses))), lambda rows: rows)
        if rotation is not None:
            fits = []
            for group in self._way:
                at = list(group)
                fits.append(shared_keys(_block(self._keys, at), self._queries[at], rotation))
                self._share_keys(new, at, fits[-1])
            total = max(sum(fit.total for fit in fits), 1e-150)
            self.errors["keys"] = sum(fit.error for fit in fits) / total
        return {name: weight for name, weight in new.items() if weight is not weights[name]}

    def _add_up(self) -> None:
        """Add up what all processes have observed."""
        held = [self._queries, self._keys, self._values]
        followed = [tensor for each in self._followed for tensor in each.sums]
        self._queries, self._keys, self._values, *added = ranks.padded_sum([*held, *followed])
        for each in self._followed:
            each.sums, added = added[:4], added[4:]

    def _names(self) -> set[str]:
        """Return the weights that this attention reads."""
        read = {member.weight for member in self.map.heads.members}
        for each in self.map.projections:
            read |= {each.matrix.weight, *([each.bias] if each.bias else [])}
        return read

    def _grouped(self, rotation: Rotation | None, uses: Tensor | None) -> Groups:
        """Choose which heads become one."""
        heads, size = self.map.heads, self.map.heads.size
        types = self.types if self.similar else None
        atom, why = reorderable(types, heads) if types and self.groups > 1 else (None, "")
        if why:
            self.notes.append(f"heads stay in order: {why}")
        if types is None or atom is None or (rotation is None and uses is None):
            way = group_by_weights(self.program, types, heads, self.groups)
            self.reordering = way.reordering
            return way.groups
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
        total_costs = (costs / parts[:, None, None]).sum(0)
        way = Grouping.cheapest(types, atom, total_costs, self.groups)
        self.reordering = way.reordering
        return way.groups

    def _rotation(self) -> Rotation | None:
        """Return how positions rotate queries and keys; None, with a note, if they do more."""
        query, key, *_ = self._followed
        why = next((why for each in (query, key) if (why := each.reason())), "")
        turns = key.turns
        shared = min(len(query.turns), len(key.turns))
        if not why:
            ratio = query.turns[:shared] / turns[:shared]
            steady = turns.abs() / turns[0].abs()
            if not (alike(ratio / ratio[0, 0]) and alike(steady)):
                why = "queries and keys are scaled apart by position or coordinate"
        if why:
            self.notes.append(f"keys: {why}")
            return None
        # A key lies before its query: it is turned back by so many positions.
        relative = (turns[:_DISTANCES] / turns[0]).conj()
        return Rotation.of(self.map.planes, self.map.fixed, relative)

    def _values_linear(self) -> bool:
        """Tell whether values and outputs are linear in what the heads hold; if not, note why."""
        for each in self._followed[2:]:
            why = each.reason()
            if not why and not alike(each.turns / each.turns[0, 0]):
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

    def _write(
        self,
        new: dict[str, Tensor],
        projection: Projection,
        at: list[int],
        change: Callable[[Tensor], Tensor],
    ) -> None:
        """Change the rows, and their biases, of the heads `at`, ``[heads, slots, d, ...]``."""
        name, bias = projection.matrix.weight, projection.bias
        rows_at = projection.indices[at]
        whole = projection.matrix.read(new[name])
        rows = change(self._rows(self.weights, projection)[at])
        whole[0][rows_at] = rows.to(whole.dtype)
        new[name] = projection.matrix.write(new[name], whole)
        if bias:
            old = self.weights[bias].detach()
            vector = new[bias].detach().clone()
            vector[rows_at] = change(old.double()[rows_at]).to(old.dtype)
            new[bias] = vector

    def _columns(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return what the output projection makes of every head, ``[out, kv, slots, d]``."""
        output = self.map.projections[3]
        whole = output.matrix.read(weights[output.matrix.weight])[0].double()
        return whole[:, output.indices]

    # -- sharing values ----------------------------------------------------------------------------

    @property
    def attends(self) -> bool:
        """Whether values are fitted as they are attended to: else there would be too many."""
        kv, slots, width = self.map.projections[3].indices.shape
        return self._linear and kv * slots * width * len(self._way[0]) <= _AT_MOST

    def observe_attended(self, values: Mapping[fx.Node, Any]) -> None:
        """Count in what each query head makes of every value head of its group.

        The attention is computed anew with the value heads of each group in turn.
        """
        _, _, operand, attended = self.map.operands
        dim, table = operand.heads
        width = len(self._way[0])
        found = torch.empty(0)
        for turn in range(width):
            source = torch.arange(values[operand.node].shape[dim])
            for group in self._way:
                for place, head in enumerate(group):
                    source[table[head]] = table[group[(place + turn) % width]]
            turned = values[operand.node].index_select(dim, source.to(self.program.device))
            made = attended.read({attended.node: self._computed(values, operand.node, turned)})
            if not turn:
                found = made.new_empty(*made.shape[:4], width, made.shape[4])
            for group in self._way:
                for place, head in enumerate(group):
                    found[:, :, head, :, (place + turn) % width] = made[:, :, head]
        # What comes out of the attention is what the output projection is given, but for a factor.
        rows = found.flatten(0, 1).flatten(1, 2).flatten(2) / self._factor
        given = self._before[self._attended] @ self._whole_output().mT
        self._attended += 1
        moments = torch.einsum("nua,nvb->uavb", rows, rows)
        wanted = torch.einsum("nua,no->uao", rows, given)
        self._sums = [self._sums[0] + moments, self._sums[1] + wanted]

    def _computed(self, values: Mapping[fx.Node, Any], node: fx.Node, value: Tensor) -> Tensor:
        """Return what the attention gives with another value of one of its operands."""
        product = self.map.operands[3].node

        def given(each: fx.Node) -> Any:
            return value if each is node else values[each]

        args, kwargs = fx.map_arg(product.args, given), fx.map_arg(product.kwargs, given)
        made: Tensor = call(product, args, kwargs)
        return made

    @property
    def _factor(self) -> float:
        """What comes out of the attention, as a multiple of what the output projection is given."""
        return float(self._followed[3].turns[0, 0].real)

    def _whole_output(self) -> Tensor:
        """Return the output projection as it was, ``[out, in]``, float64."""
        matrix = self.map.projections[3].matrix
        return matrix.read(self.weights[matrix.weight])[0].double().to(self.program.device)

    def share_values(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that change when the values of each group become equal."""
        if not self._linear:
            return {}
        weights = {name: deferred.made(weights[name]).cpu() for name in self._names()}
        columns = self._columns(self.weights)
        uses = torch.einsum("oksd,okse->kde", columns, columns)
        blocks = [_block(self._values, list(group)) for group in self._way]
        shared = [
            shared_subspace(block, uses[list(group)])
            for block, group in zip(blocks, self._way, strict=True)
        ]
        total = max(sum(fit.total for fit in shared), 1e-150)
        self.errors["values"] = sum(fit.error for fit in shared) / total
        outputs, pools = columns.clone(), torch.stack([fit.pool for fit in shared])
        for group, fit in zip(self._way, shared, strict=True):
            at = list(group)
            outputs[:, at] = torch.einsum("oksd,kde->okse", columns[:, at], fit.factors)
        if self.attends:
            moments, wanted = (each.cpu() for each in ranks.padded_sum(self._sums))
            self._sums = []
            number = torch.tensor([self._group_of(head) for head in range(len(uses))])
            users = number.repeat_interleave(columns.shape[2])
            begun = outputs.permute(1, 2, 0, 3).flatten(0, 1)
            pools, found = attended_values(moments, wanted, pools, begun, users, self.damp)
            outputs = found.unflatten(0, columns.shape[1:3]).permute(2, 0, 1, 3)
        new = dict(weights)
        _, _, value, output = self.map.projections
        whole = output.matrix.read(weights[output.matrix.weight])
        for group, block, pool in zip(self._way, blocks, pools, strict=True):
            at, scale = list(group), _scale(block, pool)
            self._write(new, value, at, partial(_pooled, pool / scale))
            whole[0][:, output.indices[at]] = (outputs[:, at] * scale).to(whole.dtype)
        name = output.matrix.weight
        new[name] = output.matrix.write(new[name], whole)
        return {name: weight for name, weight in new.items() if weight is not weights[name]}

    def _group_of(self, head: int) -> int:
        return next(number for number, group in enumerate(self._way) if head in group)

    # -- refitting the output -------------------------------------------------------------------

    def observe_shared(self, values: Mapping[fx.Node, Any]) -> None:
        """Take down what the output projection is given now, in the order of `observe`."""
        self._after.append(self.map.projections[3].inputs(values))

    def refit_output(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the output projection fitted to what it gave before the edit."""
        matrix = self.map.projections[3].matrix
        device = self.program.device
        old = matrix.read(self.weights[matrix.weight])[0].double().to(device)
        start = matrix.read(weights[matrix.weight])[0].double()
        gram, wanted = old.new_zeros(old.shape[1], old.shape[1]), torch.zeros_like(old.mT)
        squares = old.new_zeros(())
        for before, after in zip(self._before, self._after, strict=True):
            given = before @ old.mT
            gram += after.mT @ after
            wanted += after.mT @ given
            squares += given.square().sum()
        ranks.sum_of([gram, wanted, squares])
        power = float(squares)
        more = self.damp * float(gram.diagonal().mean())
        best = torch.linalg.solve(damped(gram, self.damp), wanted + more * start.mT).mT
        left = power - 2 * float((best.mT * wanted).sum()) + float(((best @ gram) * best).sum())
        self.errors["outputs"] = max(left, 0.0) / max(power, 1e-150)
        self._before, self._after = [], []
        whole = best[None].to(weights[matrix.weight].dtype)
        return {matrix.weight: matrix.write(weights[matrix.weight], whole)}


def _block(moments: Tensor, at: Sequence[int]) -> Tensor:
    """Return the moments of the heads `at`, ``[m d, m d]`` of ``[kv, d, kv, d]``."""
    width = moments.shape[1]
    return moments[at][:, :, at].reshape(len(at) * width, len(at) * width)


def _scale(block: Tensor, pool: Tensor) -> float:
    """Return the shared head's root mean square as a part of that of the heads it is made of."""
    heads = len(block) // len(pool)
    power = float(((pool @ block) * pool).sum()) * heads / max(float(block.trace()), 1e-150)
    return max(power, 1e-150) ** 0.5


def _pooled(pool: Tensor, rows: Tensor) -> Tensor:
    """Return the shared head for each of the heads in `rows`, ``[heads, 1, d, ...]``."""
    shared = torch.tensordot(pool, rows.flatten(0, 2), 1)
    return shared.expand(len(rows), 1, *shared.shape)
