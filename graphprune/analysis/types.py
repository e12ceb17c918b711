"""Conclusions from a typed graph: which axes can lose units, and what their units own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property

from torch import fx

from graphprune.analysis.axes import Atom, Axis
from graphprune.analysis.experts.ownership import Ownership, UnitEntries, UnitOwnership
from graphprune.analysis.index_maps import indices_by_unit
from graphprune.analysis.operators.facts import Frozen, Routing, Statistic
from graphprune.analysis.typed_graph import TypedGraph
from graphprune.analysis.zeros import Zeros
from graphprune.ir.aten import MOVES, SPLITS, is_operator, plain_name


class Types(TypedGraph):
    """The axis types of a program, and what they say of its units."""

    @cached_property
    def frozen(self) -> dict[Atom, Frozen]:
        """Every atom that must keep all its units -> the first reason found."""
        faults = {atom: owner.fault for atom, owner in self.owners.items() if owner.fault}
        return {**self._frozen_in_place, **faults}

    @cached_property
    def _frozen_in_place(self) -> dict[Atom, Frozen]:
        """Those of `frozen` for which a reason lies where one operator uses them."""
        found: dict[Atom, Frozen] = {}
        for routing in self.facts.routings:
            for atom in self.axes.atoms(routing.axis):
                if atom not in self.chosen:
                    found.setdefault(atom, Frozen(routing.axis, routing.why, routing.node))
        for entry in self.facts.frozen:
            for atom in self.axes.atoms(entry.axis):
                found.setdefault(atom, entry)
        for stack in self.facts.unit_stacks:
            for atom in self.axes.atoms(stack.axis):
                if atom not in self.chosen:
                    found.setdefault(atom, Frozen(stack.axis, "positions of a stack", stack.node))
        for weight, reader in self._unread():
            for atom in self.atoms_of[weight] - self._read:
                found.setdefault(atom, Frozen(atom, "nothing of it is read", reader))
        for atom, count in self.min_units.items():
            if count >= atom.size:
                why = "all of its units are needed at once"
                found.setdefault(atom, Frozen(atom, why, self._needing[atom]))
        for atom, contraction in self._zeros.leaks():
            if atom not in found:
                why = "it is summed over values that do not vanish when its weights are zeroed"
                found[atom] = Frozen(atom, why, contraction)
        return found

    @cached_property
    def chosen(self) -> frozenset[Atom]:
        """Atoms whose units are chosen at run time, and picked in weights by what was chosen.

        What weights the positions of a stack picks them.
        """
        picked = (use.axis for use in self.facts.uses if use.kind == "chosen")
        stacked = self._inside_all(entry.axis for entry in self.facts.unit_stacks)
        weighted = self._inside_all(entry.axis for entry in self.facts.routing_weights)
        return self._inside_all(picked) | (stacked & weighted)

    def _inside_all(self, axes: Iterable[Axis]) -> frozenset[Atom]:
        return frozenset(atom for axis in axes for atom in self.axes.atoms(axis))

    @cached_property
    def _read(self) -> frozenset[Atom]:
        """Atoms that an operator computes with: the others lie in parts that a slice leaves out.

        Those belong to sizes that were fixed when the program was captured, not to the model.
        """
        moving = MOVES | SPLITS
        return frozenset[Atom]().union(
            *(
                self.atoms_of.get(operand, frozenset())
                for node in self.program.graph.nodes
                if node.op == "output" or (is_operator(node) and plain_name(node) not in moving)
                for operand in node.all_input_nodes
            )
        )

    def _unread(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Weights of which something is not read, with the first node that reads them."""
        for _, node in self.program.weight_nodes():
            if node.users and not self.atoms_of[node] <= self._read:
                yield node, next(iter(node.users))

    @cached_property
    def _zeros(self) -> Zeros:
        return Zeros(self, self.chosen)

    # -- what units own -------------------------------------------------------------------------

    @cached_property
    def owners(self) -> dict[Atom, Ownership]:
        """Atoms whose units own parts of the graph -> what belongs to each of them."""
        entries: dict[Atom, tuple[UnitEntries, ...]] = {}

        def units_at(axis: Axis, index: int) -> Iterator[UnitEntries]:
            frozen = self._frozen_in_place
            if frozen.keys() >= set(self.axes.atoms(axis)):  # it may be of any dynamic size
                return
            for atom, unit in self._units(axis)[index]:
                if atom not in frozen:
                    entries.setdefault(atom, tuple(UnitEntries() for _ in range(atom.size)))
                    yield entries[atom][unit]

        for select in self.facts.unit_selects:
            for entry in units_at(select.axis, select.index):
                entry.selects.append(select.node)
        for stack in self.facts.unit_stacks:
            for position in range(stack.axis.size):
                for entry in units_at(stack.axis, position):
                    entry.stacked.setdefault(stack.node, set()).add(position)
        faults = self._nonzero_selects()
        return {
            atom: Ownership(found, fault=faults[atom])
            if atom in faults
            else self.unit_ownership.ownership(atom, found)
            for atom, found in entries.items()
        }

    def _nonzero_selects(self) -> dict[Atom, Frozen]:
        """Atoms of which a unit is read that is not zero where it is never chosen."""
        why = "a position of it is read that is not zero when it is never chosen"
        return {
            atom: Frozen(select.axis, why, select.node)
            for select in self.facts.unit_selects
            if select.source is not None
            for atom in self.axes.atoms(select.axis)
            if atom not in self._zeros.atoms[select.source]
        }

    def _units(self, axis: Axis) -> list[list[tuple[Atom, int]]]:
        """Every index of `axis` -> the units that it belongs to."""
        axis = self.axes.head(axis)
        if axis not in self._units_of_axes:
            found: list[list[tuple[Atom, int]]] = [[] for _ in range(axis.size)]
            for occurrence in self.axes.occurrences(axis):
                for unit, indices in enumerate(indices_by_unit(occurrence).tolist()):
                    for index in indices:
                        found[index].append((occurrence.atom, unit))
            self._units_of_axes[axis] = found
        return self._units_of_axes[axis]

    @cached_property
    def _units_of_axes(self) -> dict[Axis, list[list[tuple[Atom, int]]]]:
        return {}

    @cached_property
    def unit_ownership(self) -> UnitOwnership:
        """The search for what units leave behind."""
        weights = {node: name for name, node in self.program.weight_nodes()}
        graph = self.program.graph
        return UnitOwnership(graph, weights, self.zero_rules, self.written, self.base)

    # -- how many must stay ---------------------------------------------------------------------

    @cached_property
    def min_units(self) -> dict[Atom, int]:
        """The units of an atom that must stay: as many as are chosen, or give a finite variance."""
        found: dict[Atom, int] = {}
        for routing in self.facts.routings:
            for atom in self.axes.atoms(routing.axis):
                share = math.ceil(routing.min_units * atom.size / routing.axis.size)
                found[atom] = max(found.get(atom, 1), share)
        for entry in self.facts.statistics:
            for atom in self.axes.atoms(entry.axis) if entry.min_units > 1 else ():
                found[atom] = max(found.get(atom, 1), entry.min_units)
        return found

    @cached_property
    def _needing(self) -> dict[Atom, fx.Node]:
        entries: list[Routing | Statistic] = [*self.facts.routings, *self.facts.statistics]
        return {atom: entry.node for entry in entries for atom in self.axes.atoms(entry.axis)}
