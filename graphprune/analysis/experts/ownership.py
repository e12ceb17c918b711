"""Ownership: parts of a graph that go with their units, such as experts in a loop over modules.

A loop over modules ties each of them to a unit of a choice by a literal: ``chosen == 3``, or
``mask[3]``. When nothing chooses that unit, what is read there is zero (or empty), and so is what
is computed from it alone. The branch ends where that is added to something else: the sum is then
the other operand, and whatever led to the branch and is not used elsewhere goes, weights and all.
No form of loop is looked for: zeros are followed from operator to operator, by the same
rules by which the analysis follows them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from graphprune.analysis.axes import Axis
from graphprune.analysis.operators.facts import Frozen, ZeroPropagation, ZeroRule
from graphprune.ir.aten import name_of, plain_name
from graphprune.ir.nodes import arguments_of, symbols_of

_ATEN = torch.ops.aten

_FINDING = {_ATEN.where.default, _ATEN.nonzero.default, _ATEN.nonzero_numpy.default}
"""Operators whose results are as long as there are positions where their operand holds."""


@dataclass(frozen=True, eq=False)
class UnitEntries:
    """The nodes by which units of an axis come into a graph.

    Parameters
    ----------
    selects
        Nodes that are zero when the units are never chosen.
    stacked
        Node that stacks a list of tensors -> the positions of those that belong to the units.
    """

    selects: list[fx.Node] = field(default_factory=list)
    stacked: dict[fx.Node, set[int]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Removal:
    """The rest of a graph without some units.

    Parameters
    ----------
    absorbed
        Sum of a branch and something else -> the something else, which takes its place.
    stacked
        Node that stacks a list of tensors -> the positions of those that leave the list.
    dead
        Nodes that nothing uses any more, weights among them.
    stuck
        The first operator that would have to do without the units, and cannot; None where all can.
    """

    absorbed: Mapping[fx.Node, fx.Node]
    stacked: Mapping[fx.Node, Collection[int]]
    dead: Set[fx.Node]
    stuck: fx.Node | None = None

    def instead(self, node: fx.Node) -> fx.Node:
        """Return what takes the place of `node` in the end."""
        while node in self.absorbed:
            node = self.absorbed[node]
        return node


@dataclass(frozen=True, eq=False)
class Ownership:
    """The weights and nodes that belong to each unit of an axis.

    Parameters
    ----------
    entries
        Of each unit, where it comes into the graph.
    weights
        Of each unit, the names of the weights that nothing else uses, as many of each.
    nodes
        Of each unit, the nodes that go with it.
    fault
        Why no unit can go; None where all can.
    """

    entries: tuple[UnitEntries, ...]
    weights: tuple[tuple[str, ...], ...] = ()
    nodes: tuple[Set[fx.Node], ...] = ()
    fault: Frozen | None = None


class UnitOwnership:
    """Follows through a graph what units leave behind.

    Parameters
    ----------
    graph
        The graph.
    weights
        Placeholder of a weight -> its name; no other placeholder ever goes.
    zero_rules
        Where each result is zero.
    written
        Nodes that write their first operand in place.
    base
        The tensor whose memory a node shares.
    """

    def __init__(
        self,
        graph: fx.Graph,
        weights: Mapping[fx.Node, str],
        zero_rules: Mapping[fx.Node, ZeroPropagation],
        written: Collection[fx.Node],
        base: Callable[[fx.Node], fx.Node],
    ) -> None:
        self.weights = weights
        self.zero_rules = zero_rules
        self.written = written
        self.base = base
        self.overwritten = {base(node) for node in written}
        self.order = {node: at for at, node in enumerate(graph.nodes)}

    def ownership(self, axis: Axis, entries: tuple[UnitEntries, ...]) -> Ownership:
        """Return what belongs to each unit of `axis`, which come in at `entries`."""
        removals = [self.without([each]) for each in entries]
        # As many as ever go at once, too: what two leave may meet first where both end.
        removed = {f"its unit {unit} does": removal for unit, removal in enumerate(removals)}
        removed["its first units do"] = self.without(entries[:-1])
        removed["its last units do"] = self.without(entries[1:])
        for what, removal in removed.items():
            if removal.stuck is not None:
                why = f"{what} not go by never being chosen"
                return Ownership(entries, fault=Frozen(axis, why, removal.stuck))
        owned = [self._owned(removal) for removal in removals]
        ranks = [[node.meta["val"].ndim for node in each] for each in owned]
        for unit, found in enumerate(ranks):
            if 0 in found or found != ranks[0]:
                return Ownership(entries, fault=self._unlike(axis, entries, removals, ranks, unit))
        names = tuple(tuple(self.weights[node] for node in each) for each in owned)
        return Ownership(entries, names, tuple(removal.dead for removal in removals))

    def _owned(self, removal: Removal) -> list[fx.Node]:
        return sorted(removal.dead & self.weights.keys(), key=self.order.__getitem__)

    def _unlike(
        self,
        axis: Axis,
        entries: Sequence[UnitEntries],
        removals: Sequence[Removal],
        ranks: Sequence[list[int]],
        unit: int,
    ) -> Frozen:
        """Return why `unit` and the first one cannot count as equals."""
        fewer = min((0, unit), key=lambda each: len(ranks[each]))
        dead = removals[fewer].dead
        for weight in sorted(self.weights, key=self.order.__getitem__):
            others = [user for user in weight.users if user not in dead]
            if others and len(others) < len(weight.users):
                why = f"{self.weights[weight]} of its unit {fewer} is used elsewhere, too"
                return Frozen(axis, why, others[0])
        why = f"its units 0 and {unit} have different weights of their own"
        if 0 in ranks[unit]:
            why = f"its unit {unit} owns a single number"
        inlets = [n for each in (0, unit) for n in (*entries[each].selects, *entries[each].stacked)]
        return Frozen(axis, why, max(inlets, key=self.order.__getitem__))

    def without(self, units: Collection[UnitEntries], unasked: Collection[fx.Node] = ()) -> Removal:
        """Return what is left without all of `units`, in time linear in their branches.

        `unasked` are outputs of the graph that nobody asks for any more.
        """
        selects = [node for entries in units for node in entries.selects]
        stacked: dict[fx.Node, set[int]] = {}
        for entries in units:
            for node, found in entries.stacked.items():
                stacked.setdefault(node, set()).update(found)
        flow = _ZeroFlow(self, selects)
        dead = self._dead(selects, flow.absorbed, stacked, unasked)
        stuck = flow.stuck or self._first_alive(selects, flow, dead)
        return Removal(flow.absorbed, stacked, dead, stuck)

    def _dead(
        self,
        selects: Iterable[fx.Node],
        absorbed: Mapping[fx.Node, fx.Node],
        stacked: Mapping[fx.Node, Collection[int]],
        unasked: Collection[fx.Node],
    ) -> set[fx.Node]:
        """Return the nodes that nothing uses once branches have ended where they are absorbed."""
        dead: set[fx.Node] = set()

        def uses(user: fx.Node, node: fx.Node) -> bool:
            if user in dead or (user in absorbed and absorbed[user] is not node):
                return False
            if user in stacked:
                tensors: Any = user.args[0]
                return any(t is node for i, t in enumerate(tensors) if i not in stacked[user])
            return user.op != "output" or node not in unasked

        pending = [
            *selects,
            *unasked,
            *(other for node in absorbed for other in node.all_input_nodes),
        ]
        pending += [other for node in stacked for other in node.all_input_nodes]
        while pending:
            node = pending.pop()
            fixed = node.op != "call_function" and node not in self.weights
            if node in dead or fixed or any(uses(user, node) for user in node.users):
                continue
            dead.add(node)
            pending += node.all_input_nodes
        return dead

    def _first_alive(
        self, selects: Iterable[fx.Node], flow: _ZeroFlow, dead: Collection[fx.Node]
    ) -> fx.Node | None:
        """Return the first operator that needs what is read, or writes into what stays."""
        left = [n for n in dead if n in self.written and self.base(n) not in dead]
        if alive := [node for node in selects if node not in dead]:
            users = [user for node in flow.zero if node not in dead for user in node.users]
            left += [u for u in users if u not in flow.zero and u not in flow.absorbed]
            left = left or alive
        return min(left, key=self.order.__getitem__, default=None)


class _ZeroFlow:
    """Follows zeros and emptiness from `selects` on, to where they are absorbed."""

    def __init__(self, ownership: UnitOwnership, selects: Iterable[fx.Node]) -> None:
        self.ownership = ownership
        self.zero_rules, self.written = ownership.zero_rules, ownership.written
        self.zero: set[fx.Node] = set(selects)
        self.absorbed: dict[fx.Node, fx.Node] = {}
        self.stuck: fx.Node | None = None
        self._empty: set[Any] = set()
        order = ownership.order
        queue = [(order[user], user) for node in self.zero for user in node.users]
        heapq.heapify(queue)
        while queue:
            _, node = heapq.heappop(queue)
            if node in self.zero or node in self.absorbed or node.op != "call_function":
                continue
            if self._is_zero(node):
                self.zero.add(node)
            elif (other := self._absorbing(node)) is not None:
                self.absorbed[node] = other
            elif node in self.written and self._is_gone(node.args[0]):
                self.stuck = self.stuck or node
            for user in node.users if self._is_gone(node) else ():
                heapq.heappush(queue, (order[user], user))

    def _is_gone(self, node: Any) -> bool:
        """Return whether a tensor is zero everywhere, or empty."""
        while node in self.absorbed:
            node = self.absorbed[node]
        return node in self.zero

    # -- zeros ----------------------------------------------------------------------------------

    def _is_zero(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        operands = [o for o in node.all_input_nodes if not isinstance(o.meta["val"], torch.SymInt)]
        if self._finds(node):
            self._empty |= symbols_of(node) - symbols_of(*operands)
            return True
        if self._is_empty(value):
            return True
        if not any(map(self._is_gone, operands)):
            return False
        if name_of(node) == "where" and self._is_gone(node.args[0]):
            other = arguments_of(node)["other"]
            return self._is_gone(other) if isinstance(other, fx.Node) else other == 0
        rule = self.zero_rules.get(node, ZeroRule.NEVER)
        if isinstance(rule, tuple):
            return all(any(map(self._is_gone, term)) for term in rule)
        if rule is ZeroRule.AS_FIRST:
            return self._is_gone(operands[0])
        if rule is ZeroRule.ANY_OPERAND:
            return any(map(self._is_gone, operands))
        if rule in (ZeroRule.ALL_OPERANDS, ZeroRule.ALL_HOLDERS):
            return all(map(self._is_gone, operands))
        return False

    def _finds(self, node: fx.Node) -> bool:
        """Return whether positions are looked for where nothing is."""
        if node.target is _ATEN.index.Tensor:
            return any(map(self._is_mask_of_nothing, arguments_of(node)["indices"]))
        return node.target in _FINDING and self._is_gone(node.args[0])

    def _is_mask_of_nothing(self, node: Any) -> bool:
        return self._is_gone(node) and node.meta["val"].dtype is torch.bool

    def _is_empty(self, value: Any) -> bool:
        """Return whether one of the sizes is zero where nothing was found."""
        if not self._empty:
            return False
        if isinstance(value, torch.Tensor):
            return any(map(self._is_nought, value.shape))
        if isinstance(value, tuple | list):
            return all(map(self._is_empty, value))
        return self._is_nought(value)

    def _is_nought(self, size: Any) -> bool:
        if not isinstance(size, torch.SymInt):
            return False
        return bool(size.node.expr.xreplace(dict.fromkeys(self._empty, sympy.S.Zero)) == 0)

    # -- sums -----------------------------------------------------------------------------------

    def _absorbing(self, node: fx.Node) -> fx.Node | None:
        """Return the operand that `node` is equal to when others of its operands are gone."""
        name, given = plain_name(node), arguments_of(node)
        other: Any = None
        if name in ("add", "sub"):
            if self._is_gone(given["other"]):
                other = given["self"]
            elif name == "add" and given["alpha"] == 1 and self._is_gone(given["self"]):
                other = given["other"]
        elif name in ("index_add", "scatter_add"):
            other = given["self"] if self._is_gone(given.get("source", given.get("src"))) else None
        elif name in ("index_put", "index_copy"):
            other = given["self"] if self._writes_nothing(given) else None
        elif name == "where" and self._is_gone(given["condition"]):
            other = given["other"]
        elif name == "masked_fill" and self._is_gone(given["mask"]):
            other = given["self"]
        if not isinstance(other, fx.Node) or not _same_form(other, node):
            return None
        return other if self._may_share(node, other) else None

    def _may_share(self, node: fx.Node, other: fx.Node) -> bool:
        """Return whether `node` may be `other` itself: nothing still used is written over."""
        if node in self.written or node not in self.ownership.overwritten:
            return True
        while other in self.absorbed and len(other.users) == 1:
            other = self.absorbed[other]
        made = other.op == "call_function" and self.ownership.base(other) is other
        return made and len(other.users) == 1

    def _writes_nothing(self, given: Mapping[str, Any]) -> bool:
        if given.get("accumulate") and self._is_gone(given["values"]):
            return True
        indices = [given["index"]] if "index" in given else given["indices"]
        return any(
            self._is_mask_of_nothing(index) or self._is_empty(index.meta["val"])
            for index in indices
            if index is not None
        )


def _same_form(left: fx.Node, right: fx.Node) -> bool:
    one, two = left.meta.get("val"), right.meta.get("val")
    if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
        return False
    return one.dtype == two.dtype and list(map(str, one.shape)) == list(map(str, two.shape))
