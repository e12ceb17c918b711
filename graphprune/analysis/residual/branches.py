"""Residual branches: what is added to a residual stream, with all that leads there alone.

Where a branch adds nothing, its sum is the stream as it was. Zeros are followed to that sum, as
they are for experts (`graphprune.analysis.experts.ownership`), and whatever only led there goes:
weights, and caches that nothing else reads. No name of a module and no form of layer is looked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphprune.analysis.attention.attentions import attentions
from graphprune.analysis.experts.ownership import Removal, UnitEntries
from graphprune.analysis.groups import common_path
from graphprune.analysis.residual.sums import ResidualSum, residual_sums
from graphprune.analysis.types import Types
from graphprune.errors import PlanError, UsageError, nearest
from graphprune.ir.aten import name_of
from graphprune.ir.program import PAST, PRESENT
from graphprune.ir.provenance import layer_of
from graphprune.plan.steps import Branch


@dataclass(frozen=True, eq=False)
class ResidualBranch:
    """A branch of a graph.

    Parameters
    ----------
    name
        The module that its matrices share.
    term
        The node that is added to the stream.
    sum
        Where that is.
    weights
        The weights that go with it when it goes alone.
    caches
        The parts of the KV cache that do, such as ``3.key``.
    attends
        Whether an attention is in it.
    """

    name: str
    term: fx.Node
    sum: ResidualSum
    weights: tuple[str, ...]
    caches: tuple[str, ...]
    attends: bool

    @property
    def layer(self) -> str:
        """The numbered layer that it lies in, or ""."""
        return layer_of(self.name)


@dataclass(frozen=True, eq=False)
class Absence:
    """The rest of a graph without some branches.

    Parameters
    ----------
    removal
        What takes the place of sums, and which nodes go.
    caches
        The parts of the KV cache that go.
    lengths
        Sizes that were read off a cache that goes -> the input, and the dimension of it, that tells
        the same.
    """

    removal: Removal
    caches: tuple[str, ...]
    lengths: Mapping[fx.Node, tuple[fx.Node, int]]


class Branches:
    """The residual branches of a program.

    Parameters
    ----------
    types
        The axis types of the program.
    """

    def __init__(self, types: Types) -> None:
        self.types, self.program = types, types.program
        self._weights = {node: name for name, node in self.program.weight_nodes()}
        self._inputs = dict(self.program.input_nodes())
        outputs = {value.name: node for value, node in self.program.output_nodes()}
        self._caches = {
            value.name.removeprefix(PAST): (node, outputs[PRESENT + value.name.removeprefix(PAST)])
            for value, node in self._inputs.items()
            if value.name.startswith(PAST)
        }

    @cached_property
    def all(self) -> tuple[ResidualBranch, ...]:
        """The branches that own a matrix, in order; none lies inside another one."""
        found: list[tuple[fx.Node, ResidualSum, Removal, tuple[str, ...]]] = []
        inside: set[fx.Node] = set()
        for each in residual_sums(self.types):
            for term in each.terms:
                removal, caches = self._without([term])
                if removal.stuck is None and self._matrices(removal.dead):
                    found.append((term, each, removal, caches))
                    inside |= removal.dead - {term}
        names = self._names([removal.dead for _, _, removal, _ in found])
        attending = {each.node for each in attentions(self.types)}
        return tuple(
            ResidualBranch(
                name,
                term,
                sum_,
                self.owned(removal),
                caches,
                not attending.isdisjoint(removal.dead),
            )
            for name, (term, sum_, removal, caches) in zip(names, found, strict=True)
            if term not in inside
        )

    def named(self, name: str) -> ResidualBranch:
        """Return the branch called `name`.

        Raises
        ------
        UsageError
            When there is none, with the nearest name.
        """
        if name not in self._by_name:
            hint = nearest(name, self._by_name)
            raise UsageError(f"the program has no residual branch {name!r}{hint}")
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, ResidualBranch]:
        return {branch.name: branch for branch in self.all}

    def records(self, names: Sequence[str]) -> tuple[Branch, ...]:
        """Return what a plan holds of the branches called `names`, that go in this order.

        Raises
        ------
        PlanError
            When they cannot all go: nothing would be left of the cache, or of the branches.
        """
        records: list[Branch] = []
        held, seen = set[str](), set[str]()
        for count, name in enumerate(names, start=1):
            absence = self.without(names[:count])
            owned = [each for each in self.owned(absence.removal) if each not in held]
            shapes = {each: tuple(self.program.weights[each].shape) for each in owned}
            caches = tuple(each for each in absence.caches if each not in seen)
            records.append(Branch(name, shapes, caches))
            held.update(owned)
            seen.update(caches)
        return tuple(records)

    def without(self, names: Iterable[str]) -> Absence:
        """Return what is left without the branches called `names`.

        Raises
        ------
        PlanError
            When they cannot all go, saying why.
        UsageError
            When there is no such branch.
        """
        gone = [self.named(name) for name in dict.fromkeys(names)]
        if len(gone) == len(self.all):
            raise PlanError(f"all of the {len(gone)} residual branches would go")
        removal, caches = self._without([branch.term for branch in gone])
        if removal.stuck is not None:
            raise PlanError(f"{gone[-1].name}: {name_of(removal.stuck)} cannot do without it")
        if caches and len(caches) == len(self._caches):
            raise PlanError(
                f"{gone[-1].name}: nothing would be left in the KV cache, which tells how long the "
                "text before is"
            )
        return Absence(removal, caches, self._lengths(removal, caches))

    def _without(self, terms: Sequence[fx.Node]) -> tuple[Removal, tuple[str, ...]]:
        """Return what is left without `terms`, and the caches that nothing else reads."""
        entries = [UnitEntries(selects=list(terms))]
        caches = dict(self._caches)
        while True:  # a cache that another part reads stays, and with it what is written there
            unasked = {present for _, present in caches.values()}
            removal = self.types.unit_ownership.without(entries, unasked)
            gone = {
                name: (past, present)
                for name, (past, present) in caches.items()
                if all(user in removal.dead or _reads_size(user) for user in past.users)
            }
            if len(gone) == len(caches):
                return removal, tuple(gone)
            caches = gone

    def _lengths(
        self, removal: Removal, caches: Collection[str]
    ) -> dict[fx.Node, tuple[fx.Node, int]]:
        """Return where sizes are read that were read off a cache that goes."""
        gone = [self._caches[name][0] for name in caches]
        left = [node for _, node in self.program.input_nodes() if node not in gone]
        found = {}
        for user in (user for past in gone for user in past.users if user not in removal.dead):
            sizes = ((node, at) for node in left for at in range(node.meta["val"].ndim))
            same = [at for at in sizes if _size(*at) == str(user.meta["val"])]
            if not same:
                raise PlanError(f"nothing else tells the size {user.meta['val']} of a cache")
            found[user] = same[0]
        return found

    def owned(self, removal: Removal) -> tuple[str, ...]:
        """Return the weights that go with a removal."""
        return tuple(name for node, name in self._weights.items() if node in removal.dead)

    def _matrices(self, dead: Collection[fx.Node]) -> list[str]:
        """Return the parameters among `dead` of two dimensions or more."""
        kinds, weights = self.program.kinds, self.program.weights
        return [
            name
            for node, name in self._weights.items()
            if node in dead
            and kinds[name] == "parameter"
            and sum(size > 1 for size in weights[name].shape) > 1
        ]

    def _names(self, removed: Sequence[Collection[fx.Node]]) -> list[str]:
        taken: dict[str, int] = defaultdict(int)
        names = []
        for dead in removed:
            path = common_path(self._matrices(dead)) or "model"
            taken[path] += 1
            names.append(path if taken[path] == 1 else f"{path}:{taken[path]}")
        return names


def _reads_size(node: fx.Node) -> bool:
    return name_of(node) == "sym_size"


def _size(node: fx.Node, dim: int) -> str:
    return str(node.meta["val"].shape[dim])
