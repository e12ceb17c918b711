"""Weights whose norms run over units that go: what stays is scaled as it was by all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphprune.analysis.typed_graph import Length, NormalizedWeight
from graphprune.analysis.types import Types
from graphprune.ir.interpreter import run_part
from graphprune.ir.program import Program
from graphprune.plan.plan import Plan
from graphprune.verification.narrow_weights import NarrowWeights
from graphprune.weights.deferred import deferred, made


def kept_norms(types: Types, plan: Plan) -> list[NormalizedWeight]:
    """Return the weights of whose norms `plan` takes a part."""
    cuts = (cut for step in plan.steps for cut in step.cuts)
    touched = {(weight, dim) for cut in cuts for weight, dim, _ in cut.indices()}
    return [
        each
        for each in types.normalized_weights
        if each.foldable
        and any(
            (each.name, dim) in touched and not each.atoms.isdisjoint(types.atoms_in(axis))
            for dim, axis in enumerate(types.weight(each.name))
        )
    ]


def narrow_weights(original: Program, plan: Plan, types: Types) -> NarrowWeights:
    """Return what `plan` leaves of the weights of `original`, with norms of all units.

    Each is made anew where it is used.
    """
    kept = kept_norms(types, plan)
    folded = [each for each in kept if each.length is None]
    values = run_part(original, [each.result for each in folded], {})
    weights = dict(original.weights)
    weights |= {each.name: value for each, value in zip(folded, values, strict=True)}
    lengths = {each.name: each.length for each in kept if each.length is not None}
    for name, length in lengths.items():  # per unit of norm, until it is known what stays
        whole = weights[length.name]
        weights[length.name] = whole / _norm(weights[name], length, whole)
    found = NarrowWeights({name: deferred(weight) for name, weight in weights.items()}, plan)
    for name, length in lengths.items():
        per_unit = found.values[length.name]
        found.values[length.name] = per_unit * _norm(found.values[name], length, per_unit)
    for name in _without_use(original, folded):
        found.values.pop(name, None)
    return found


def _norm(weight: Tensor, length: Length, like: Tensor) -> Tensor:
    return made(weight).square().sum(length.dims, keepdim=True).sqrt().reshape_as(like)


def _without_use(original: Program, kept: Sequence[NormalizedWeight]) -> list[str]:
    """Return the names of weights that only said how to normalize others."""
    dead = {each.result for each in kept}
    for node in reversed(original.graph.nodes):
        if node.users and dead.issuperset(node.users):
            dead.add(node)
    own = {each.weight for each in kept}
    return [name for name, node in original.weight_nodes() if node in dead - own]
