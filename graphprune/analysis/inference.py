"""The analysis: every dimension of every node gets an axis, by the rules of its operator."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from graphprune.analysis.axes import UNIT, Atom, Axes, Axis, Product, Sum
from graphprune.analysis.operators import RULES
from graphprune.analysis.operators.rule import (
    Attention,
    Choice,
    Content,
    Facts,
    Frozen,
    Law,
    Op,
    Statistic,
    Type,
    Zero,
)
from graphprune.analysis.ownership import Branches, Ownership, Seeds
from graphprune.ir.aten import MOVES, is_mutating, is_view, name_of, plain_name, rule_name
from graphprune.ir.program import PAST, PRESENT, Program

_FIRST_PRIME = 1_000_003


@dataclass(frozen=True, eq=False)
class Types:
    """What inference found out about a program.

    Parameters
    ----------
    program
        The program.
    axes
        The store of axes.
    of
        Every tensor node -> its axes (a list of them for several results).
    facts
        Literals, reasons to freeze and uses of axes, as the rules said them.
    laws
        Where each result vanishes when the weights of a unit are zeroed: a law, or a sum of
        products of nodes.
    written
        Nodes that write one of their operands in place.
    dynamic
        The integers that stand for dynamic sizes -> the expressions that they stand for.
    """

    program: Program
    axes: Axes
    of: dict[fx.Node, Any]
    facts: Facts
    laws: dict[fx.Node, Law]
    written: frozenset[fx.Node]
    dynamic: Mapping[int, sympy.Expr]

    def weight(self, name: str) -> Type:
        """The axes of the weight called `name` (which may be a tied name)."""
        node = self._weight_nodes[self.program.aliases.get(name, name)]
        found: Type = self.of[node]
        return found

    @cached_property
    def _weight_nodes(self) -> dict[str, fx.Node]:
        return dict(self.program.weight_nodes())

    @cached_property
    def frozen(self) -> dict[Atom, Frozen]:
        """Every atom that must keep all its units -> the first reason found."""
        faults = {atom: owner.fault for atom, owner in self.owners.items() if owner.fault}
        return {**self._frozen_in_place, **faults}

    @cached_property
    def _frozen_in_place(self) -> dict[Atom, Frozen]:
        """Those of `frozen` for which a reason lies where one operator uses them."""
        found: dict[Atom, Frozen] = {}
        for choice in self.facts.choices:
            for atom in self.axes.atoms(choice.axis):
                if atom not in self.chosen:
                    found.setdefault(atom, Frozen(choice.axis, choice.why, choice.node))
        for entry in self.facts.frozen:
            for atom in self.axes.atoms(entry.axis):
                found.setdefault(atom, entry)
        for gathering in self.facts.gatherings:
            for atom in self.axes.atoms(gathering.axis):
                if atom not in self.chosen:
                    frozen = Frozen(gathering.axis, "places of a stack", gathering.node)
                    found.setdefault(atom, frozen)
        for atom, least in self.least.items():
            if least >= atom.size:
                why = "all of its units are needed at once"
                found.setdefault(atom, Frozen(atom, why, self._needing[atom]))
        for atom, contraction in self._leaks():
            if atom not in found:
                why = "it is summed over values that do not vanish when its weights are zeroed"
                found[atom] = Frozen(atom, why, contraction)
        return found

    @cached_property
    def chosen(self) -> frozenset[Atom]:
        """Atoms whose units are chosen at run time, and picked in weights by what was chosen.

        What weighs the places of a stack picks them.
        """
        picked = (mark.axis for mark in self.facts.marks if mark.kind == "chosen")
        gathered = self._inside_all(entry.axis for entry in self.facts.gatherings)
        weighed = self._inside_all(entry.axis for entry in self.facts.weighings)
        return self._inside_all(picked) | (gathered & weighed)

    def _inside_all(self, axes: Iterable[Axis]) -> frozenset[Atom]:
        return frozenset(atom for axis in axes for atom in self.axes.atoms(axis))

    @cached_property
    def owners(self) -> dict[Atom, Ownership]:
        """Atoms whose units own branches of the graph -> what belongs to each of them."""
        seeds: dict[Atom, tuple[Seeds, ...]] = {}

        def units_at(axis: Axis, index: int) -> Iterator[Seeds]:
            frozen = self._frozen_in_place
            if frozen.keys() >= set(self.axes.atoms(axis)):  # it may be of any dynamic size
                return
            for atom, unit in self._units(axis)[index]:
                if atom not in frozen:
                    seeds.setdefault(atom, tuple(Seeds() for _ in range(atom.size)))
                    yield seeds[atom][unit]

        for reading in self.facts.readings:
            for at in units_at(reading.axis, reading.index):
                at.readings.append(reading.node)
        for gathering in self.facts.gatherings:
            for place in range(gathering.axis.size):
                for at in units_at(gathering.axis, place):
                    at.places.setdefault(gathering.node, set()).add(place)
        faults = self._unread()
        return {
            atom: Ownership(found, fault=faults[atom])
            if atom in faults
            else self.branches.ownership(atom, found)
            for atom, found in seeds.items()
        }

    def _unread(self) -> dict[Atom, Frozen]:
        """Atoms of which a place is read that does not vanish where it is never chosen."""
        why = "a place of it is read that is not zero when it is never chosen"
        return {
            atom: Frozen(reading.axis, why, reading.node)
            for reading in self.facts.readings
            for atom in (self.axes.atoms(reading.axis) if reading.source is not None else ())
            if atom not in self._zeros[reading.source]  # type: ignore[index]
        }

    def _units(self, axis: Axis) -> list[list[tuple[Atom, int]]]:
        """Every place of `axis` -> the units that it belongs to."""
        axis = self.axes.head(axis)
        if axis in self._read_axes:
            return self._read_axes[axis]
        found: list[list[tuple[Atom, int]]] = [[] for _ in range(axis.size)]
        self._read_axes[axis] = found
        for place in self.axes.occurrences(axis):
            for unit in range(place.atom.size):
                starts = [place.offset + unit * place.inner]
                for loop, stride in place.outer:
                    starts = [s + o * stride for s in starts for o in range(loop.size)]
                for start in starts:
                    for index in range(start, start + place.inner):
                        found[index].append((place.atom, unit))
        return found

    @cached_property
    def _read_axes(self) -> dict[Axis, list[list[tuple[Atom, int]]]]:
        return {}

    @cached_property
    def branches(self) -> Branches:
        """What follows through the graph what units leave behind."""
        weights = {node: name for name, node in self.program.weight_nodes()}
        graph = self.program.graph
        return Branches(graph, weights, self.laws, self.written, self._base)

    @cached_property
    def least(self) -> dict[Atom, int]:
        """How many units of an atom must stay: as many as are chosen, or give a finite variance."""
        found: dict[Atom, int] = {}
        for choice in self.facts.choices:
            for atom in self.axes.atoms(choice.axis):
                share = math.ceil(choice.least * atom.size / choice.axis.size)
                found[atom] = max(found.get(atom, 1), share)
        for entry in self.facts.statistics:
            for atom in self.axes.atoms(entry.axis) if entry.least > 1 else ():
                found[atom] = max(found.get(atom, 1), entry.least)
        return found

    @cached_property
    def _needing(self) -> dict[Atom, fx.Node]:
        entries: list[Choice | Statistic] = [*self.facts.choices, *self.facts.statistics]
        return {atom: entry.node for entry in entries for atom in self.axes.atoms(entry.axis)}

    def _leaks(self) -> Iterator[tuple[Atom, fx.Node]]:
        """Atoms that are summed over where no operand vanishes when their weights are zeroed."""
        zeros = self._zeros
        for entry in self.facts.contractions:
            vanishing = frozenset[Atom]().union(*(zeros[node] for node in entry.operands))
            for atom in self.axes.atoms(entry.axis):
                if atom not in vanishing:
                    yield atom, entry.node

    @cached_property
    def _zeros(self) -> dict[fx.Node, frozenset[Atom]]:
        """Every node -> the atoms at whose units it vanishes when their weights are zeroed.

        A cache that comes in is one that went out before: it vanishes where that does. So all of it
        is taken to vanish at first, and what goes out then says what does.
        """
        held = self.held
        outputs = {value.name: node for value, node in self.program.output_nodes()}
        caches = {
            node: outputs[PRESENT + value.name.removeprefix(PAST)]
            for value, node in self.program.input_nodes()
            if value.name.startswith(PAST)
        }
        given = {node: held[node] for node in caches}
        while True:
            zeros = self._spread_zeros(given)
            found = {node: given[node] & zeros[output] for node, output in caches.items()}
            if found == given:
                return zeros
            given = found

    def _spread_zeros(
        self, given: Mapping[fx.Node, frozenset[Atom]]
    ) -> dict[fx.Node, frozenset[Atom]]:
        """`_zeros`, when inputs vanish as `given` says (and nowhere, where it says nothing)."""
        held = self.held
        weights = {node for _, node in self.program.weight_nodes()}
        zeros: dict[fx.Node, frozenset[Atom]] = {}
        nothing: frozenset[Atom] = frozenset()
        for node in self.program.graph.nodes:
            if self.of.get(node) is None:
                continue
            if node.op == "placeholder":
                zeros[node] = held[node] if node in weights else given.get(node, nothing)
                continue
            law = self.laws.get(node, Zero.NEVER)
            zeros[node] = _vanishing(law, node, self._cover(node, zeros), held)
            for cleared in (self._weighed, self._cleared):
                if node in cleared:
                    zeros[node] |= (held[node] & cleared[node]) - self._repeated[node]
            if node in self.written:
                for other in zeros:
                    if self._base(other) is self._base(node):
                        zeros[other] = zeros[other] & zeros[node]
        return zeros

    @cached_property
    def _weighed(self) -> dict[fx.Node, frozenset[Atom]]:
        """Weights of what is chosen -> the atoms at whose units they are zero, never chosen."""
        return {
            entry.node: self.chosen.intersection(self.axes.atoms(entry.axis))
            for entry in self.facts.weighings
        }

    @cached_property
    def _cleared(self) -> dict[fx.Node, frozenset[Atom]]:
        """What is centred or scaled by statistics of what stays -> the atoms that these run over.

        It is zero at their units that do not stay, whatever comes in there.
        """
        found: dict[fx.Node, frozenset[Atom]] = {}
        for entry in self.facts.statistics:
            if entry.clears:
                before = found.get(entry.node, frozenset())
                found[entry.node] = before.union(self.axes.atoms(entry.axis))
        return found

    def _cover(
        self, node: fx.Node, zeros: dict[fx.Node, frozenset[Atom]]
    ) -> dict[fx.Node, frozenset[Atom]]:
        """What `zeros` of its operands says about the places of `node`.

        Where ``x[:, None] * y[None]`` holds an atom in both dimensions, it does not vanish wherever
        `x` does: at a unit of the second dimension it is `y` that counts. Nor does ``x @ y`` where
        `x` holds an atom that is summed over, if `y` brings it into the result.
        """
        nothing: frozenset[Atom] = frozenset()
        several = self._repeated
        return {
            other: zeros[other]
            - (
                (several[node] | self._summed.get((node, other), nothing))
                - several.get(other, nothing)
            )
            for other in node.all_input_nodes
            if other in zeros
        }

    @cached_property
    def _summed(self) -> dict[tuple[fx.Node, fx.Node], frozenset[Atom]]:
        """(contraction of several, operand) -> the atoms of the operand that are summed over."""
        found: dict[tuple[fx.Node, fx.Node], frozenset[Atom]] = {}
        for entry in self.facts.contractions:
            for other in entry.operands if len(entry.node.all_input_nodes) > 1 else ():
                before = found.get((entry.node, other), frozenset())
                found[entry.node, other] = before | self._inside(entry.axis)
        return found

    @cached_property
    def _repeated(self) -> dict[fx.Node, frozenset[Atom]]:
        """Every tensor node -> the atoms that several coordinates of one place run over."""
        found = {}
        for node, type_ in self.of.items():
            if type_ is not None:
                several = type_ if isinstance(type_, list) else [type_]
                found[node] = frozenset[Atom]().union(*(self._twice(t) for t in several if t))
        return found

    def _twice(self, axes: Iterable[Axis]) -> frozenset[Atom]:
        """Atoms that stand in several of `axes`, or several times in the factors of one."""
        seen: set[Atom] = set()
        again: set[Atom] = set()
        for axis in axes:
            inside = self._inside(axis)
            again |= seen & inside
            seen |= inside
            axis = self.axes.head(axis)
            if isinstance(axis, Product):
                again |= self._twice(axis.factors)
            elif isinstance(axis, Sum):
                again |= frozenset[Atom]().union(*(self._twice((term,)) for term in axis.terms))
        return frozenset(again)

    def _inside(self, axis: Axis) -> frozenset[Atom]:
        if axis not in self._atoms:
            self._atoms[axis] = frozenset(self.axes.atoms(axis))
        return self._atoms[axis]

    @cached_property
    def _atoms(self) -> dict[Axis, frozenset[Atom]]:
        return {}

    def _base(self, node: fx.Node) -> fx.Node:
        """The tensor whose memory `node` may share: views are followed to what they look at."""
        while _may_share(node) and node.args[0] in self.held:
            node = node.args[0]  # type: ignore[assignment]
        return node

    @cached_property
    def held(self) -> dict[fx.Node, frozenset[Atom]]:
        """Every tensor node -> the atoms in its axes."""
        nothing: frozenset[Atom] = frozenset()
        found = {}
        for node, type_ in self.of.items():
            if type_ is None:
                continue
            flat = (
                itertools.chain.from_iterable(t or () for t in type_)
                if isinstance(type_, list)
                else type_
            )
            found[node] = nothing.union(*map(self._inside, flat))
        return found


def _may_share(node: fx.Node) -> bool:
    """Whether the result may share the memory of an operand."""
    return node.target is operator.getitem or is_view(node)


def _vanishing(
    law: Law,
    node: fx.Node,
    zeros: dict[fx.Node, frozenset[Atom]],
    held: dict[fx.Node, frozenset[Atom]],
) -> frozenset[Atom]:
    here = held[node]
    if isinstance(law, tuple):
        terms = (frozenset[Atom]().union(*(zeros[factor] for factor in term)) for term in law)
        return frozenset.intersection(here, *terms)
    operands = [other for other in node.all_input_nodes if other in zeros]
    if law is Zero.ALWAYS:
        return here
    if law is Zero.NEVER or not operands:
        return frozenset()
    if law is Zero.KEEP:
        return zeros[operands[0]] & here
    if law is Zero.ANY:
        return here.intersection(frozenset().union(*(zeros[other] for other in operands)))
    if law is Zero.ALL:
        return frozenset.intersection(here, *(zeros[other] for other in operands))
    return frozenset(
        atom for atom in here if all(atom in zeros[o] for o in operands if atom in held[o])
    )


def infer(program: Program, apart: Iterable[Attention] = ()) -> Types:
    """Infer the axis types of every node of `program`; linear in the number of nodes.

    Parameters
    ----------
    program
        A captured program; weights are not needed.
    apart
        Attentions that shall not make the heads of queries one with those of keys and values (but
        those of keys with those of values).
    """
    inference = _Inference(program, frozenset(node for site in apart for node in site.products))
    types = inference.run()
    for site in apart:
        _, key, value = (types.of[node] for node in site.operands)
        sides = [key[:-2], value[:-2]]
        if len(key) != len(value):  # one of them has its batch axes flattened into one
            sides = [(types.axes.product(*side),) for side in sides]
        for left, right in zip(*sides, strict=True):
            inference.unify(left, right, site.node)
    return types


class _Inference:
    def __init__(self, program: Program, apart: frozenset[fx.Node]) -> None:
        self.program = program
        self.apart = apart
        self.axes = Axes()
        self.facts = Facts()
        self.types: dict[fx.Node, Any] = {}
        self.contents: dict[Content, Axis] = {}
        self.laws: dict[fx.Node, Law] = {}
        self.written: set[fx.Node] = set()
        self._primes = _Primes()
        self._shapes: dict[fx.Node, Any] = {}
        self._names: dict[Any, str] = {}

    def run(self) -> Types:
        weights = {node for _, node in self.program.weight_nodes()}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                shape = self.shapes(node)
                self.types[node] = tuple(self.axes.atom(size) for size in shape)
                if node in weights and not node.users:
                    self._freeze_all(self.types[node], "the graph does not use it", node)
            elif node.op == "call_function":
                self.types[node] = self._call(node)
            elif node.op == "get_attr":
                self.types[node] = None
        self._interface()
        written, dynamic = frozenset(self.written), self._primes.expressions()
        return Types(self.program, self.axes, self.types, self.facts, self.laws, written, dynamic)

    def _interface(self) -> None:
        """Inputs and outputs are promises to the caller, but for the sizes of a KV cache."""
        for kind, prefix, pairs in (
            ("input", PAST, self.program.input_nodes()),
            ("output", PRESENT, self.program.output_nodes()),
        ):
            for value, node in pairs:
                for dim, axis in enumerate(self.types.get(node) or ()):
                    if value.name.startswith(prefix) and dim in (1, 3):
                        continue
                    op = self._op(node, Zero.NEVER)
                    op.freeze(axis, f"it is dimension {dim} of the {kind} {value.name!r}")
                self._read((node,), node)

    def _op(self, node: fx.Node, zero: Zero) -> Op:
        shapes, contents = self.shapes, self.contents
        return Op(node, self.axes, self.facts, self.types, shapes, zero, contents, self.apart)

    def unify(self, left: Axis, right: Axis, node: fx.Node) -> None:
        """Make two axes one, for a reason that lies at `node`."""
        self._op(node, Zero.NEVER).unify(left, right)

    def shapes(self, node: fx.Node) -> Any:
        """Generic sizes of a node (a list of them for several results; None for no tensor)."""
        if node not in self._shapes:
            self._shapes[node] = self._shape(node.meta.get("val"))
        return self._shapes[node]

    def _shape(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(s if type(s) is int else self._primes.size(s) for s in value.shape)
        if isinstance(value, tuple | list):
            return [self._shape(part) for part in value]
        return None

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            types = self.types[node.args[0]]  # type: ignore[index]
            if types is None:
                return None
            self.laws[node] = Zero.KEEP
            self._carry((node.args[0], node.args[1]), node)  # type: ignore[arg-type]
            return types[node.args[1]]
        shape = self.shapes(node)
        if shape is None:
            if not name_of(node).startswith("sym_"):
                self._read(node.all_input_nodes, node)
            return None
        if is_mutating(node) and node.args:
            self.written.add(node)
        name = rule_name(node.target)
        rule = RULES.get(name)
        if rule is None:
            return self._unruled(node, shape)
        op = self._op(node, rule.zero)
        type_ = rule.apply(op)
        self.laws[node] = op.zero if op.terms is None else op.terms
        inputs = node.all_input_nodes
        if plain_name(node) in MOVES and node.meta["val"].dtype is not torch.bool:
            self._carry((inputs[0], 0), node)
            inputs = inputs[1:]
        self._read((other for other in inputs if other not in op.picked), node)
        if node in self.written and type_ is not None and not isinstance(type_, list):
            target = self.types[node.args[0]]  # type: ignore[index]
            for ours, theirs in zip(type_, target, strict=True):
                op.unify(ours, theirs)
        return type_

    def _carry(self, source: Content, node: fx.Node) -> None:
        """Places stay places where an operator only moves them."""
        if source in self.contents:
            self.contents[node, 0] = self.contents[source]

    def _read(self, operands: Iterable[fx.Node], node: fx.Node) -> None:
        """Places of an axis are numbers to whatever does not pick by them."""
        for other in operands:
            if (other, 0) in self.contents:
                why = "its places are used as numbers"
                self._op(node, Zero.NEVER).freeze(self.contents[other, 0], why)

    def _unruled(self, node: fx.Node, shape: Any) -> Any:
        why = f"operator {node.target} has no rule"
        self.facts.unruled.append(node)
        self._read(node.all_input_nodes, node)
        for operand in node.all_input_nodes:
            types = self.types.get(operand)
            for type_ in types if isinstance(types, list) else [types]:
                self._freeze_all(type_ or (), why, node)
        parts = shape if isinstance(shape, list) else [shape]
        result: list[Any] = []
        for part in parts:
            type_ = tuple(self.axes.atom(size) for size in part) if part is not None else None
            self._freeze_all(type_ or (), why, node)
            result.append(type_)
        return result if isinstance(shape, list) else result[0]

    def _freeze_all(self, type_: Iterable[Axis], why: str, node: fx.Node) -> None:
        for axis in type_:
            if axis is not UNIT:
                self.facts.frozen.append(Frozen(axis, why, node))


class _Primes:
    """Dynamic sizes as integers: each symbol is a large prime of its own.

    Two products of sizes are then equal as integers only where they are equal as expressions.
    """

    def __init__(self) -> None:
        self._next = _FIRST_PRIME
        self._symbols: dict[Any, int] = {}
        self._sizes: dict[Any, int] = {}

    def size(self, size: Any) -> int:
        expression = sympy.sympify(size.node.expr)
        if expression not in self._sizes:
            places = {symbol: self._prime(symbol) for symbol in expression.free_symbols}
            value = sympy.sympify(expression.xreplace(places))
            known = value.is_Integer and value > 0
            self._sizes[expression] = int(value) if known else self._prime(expression)
        return self._sizes[expression]

    def expressions(self) -> dict[int, sympy.Expr]:
        """Each integer that was given -> what it stands for; symbols come first."""
        symbols = {size: symbol for symbol, size in self._symbols.items()}
        return symbols | {size: expression for expression, size in self._sizes.items()}

    def _prime(self, key: Any) -> int:
        if key not in self._symbols:
            while not _is_prime(self._next):
                self._next += 2
            self._symbols[key] = self._next
            self._next += 2
        return self._symbols[key]


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))
