"""The analysis: every dimension of every node gets an axis, by the rules of its operator."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from graphprune.analysis.attention.attentions import Attention
from graphprune.analysis.axes import UNIT, Axes, Axis
from graphprune.analysis.operators import RULES
from graphprune.analysis.operators.facts import (
    Facts,
    Frozen,
    UnitNumbers,
    ZeroPropagation,
    ZeroRule,
)
from graphprune.analysis.operators.rule import RuleContext
from graphprune.analysis.types import Types
from graphprune.ir.aten import MOVES, is_mutating, name_of, plain_name, rule_name
from graphprune.ir.program import PAST, PRESENT, Program

_FIRST_PRIME = 1_000_003


def infer(program: Program, untied: Iterable[Attention] = ()) -> Types:
    """Infer the axis types of every node of `program`; linear in the number of nodes.

    Parameters
    ----------
    program
        A captured program; weights are not needed.
    untied
        Attentions that shall not make the heads of queries one with those of keys and values (but
        those of keys with those of values).
    """
    inference = _Inference(program, frozenset(node for each in untied for node in each.products))
    types = inference.run()
    for attention in untied:
        key, value = (types.axes_of[node] for node in attention.operands[1:])
        sides = [key[:-2], value[:-2]]
        if len(key) != len(value):  # one of them has its batch axes flattened into one
            sides = [(types.axes.product(*side),) for side in sides]
        for left, right in zip(*sides, strict=True):
            inference.unify(left, right, attention.node)
    _keep_norms(types)
    return types


def _keep_norms(types: Types) -> None:
    """Forget what runs over a weight alone to normalize it, where its old norm is kept."""
    inside = {n for each in types.normalized_weights if each.foldable for n in each.inside}
    facts = types.facts
    facts.contractions = [entry for entry in facts.contractions if entry.node not in inside]
    facts.means = [entry for entry in facts.means if entry.node not in inside]
    facts.statistics = [entry for entry in facts.statistics if entry.node not in inside]


class _Inference:
    def __init__(self, program: Program, untied: frozenset[fx.Node]) -> None:
        self.program = program
        self.untied = untied
        self.axes = Axes()
        self.facts = Facts()
        self.types: dict[fx.Node, Any] = {}
        self.unit_numbers: dict[UnitNumbers, Axis] = {}
        self.zero_rules: dict[fx.Node, ZeroPropagation] = {}
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
        return Types(
            self.program, self.axes, self.types, self.facts, self.zero_rules, written, dynamic
        )

    def _interface(self) -> None:
        """Freeze inputs and outputs, which callers count on, but for the sizes of a KV cache."""
        for kind, prefix, pairs in (
            ("input", PAST, self.program.input_nodes()),
            ("output", PRESENT, self.program.output_nodes()),
        ):
            for value, node in pairs:
                for dim, axis in enumerate(self.types.get(node) or ()):
                    if value.name.startswith(prefix) and dim in (1, 3):
                        continue
                    ctx = self._context(node, ZeroRule.NEVER)
                    ctx.freeze(axis, f"it is dimension {dim} of the {kind} {value.name!r}")
                self._read((node,), node)

    def _context(self, node: fx.Node, zero: ZeroRule) -> RuleContext:
        shapes, unit_numbers = self.shapes, self.unit_numbers
        return RuleContext(
            node, self.axes, self.facts, self.types, shapes, zero, unit_numbers, self.untied
        )

    def unify(self, left: Axis, right: Axis, node: fx.Node) -> None:
        """Make two axes one, for a reason that lies at `node`."""
        self._context(node, ZeroRule.NEVER).unify(left, right)

    def shapes(self, node: fx.Node) -> Any:
        """Return generic sizes of a node: a list for several results, None for no tensor."""
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
            self.zero_rules[node] = ZeroRule.AS_FIRST
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
        ctx = self._context(node, rule.zero)
        type_ = rule.apply(ctx)
        self.zero_rules[node] = ctx.zero if ctx.terms is None else ctx.terms
        inputs = node.all_input_nodes
        if plain_name(node) in MOVES and node.meta["val"].dtype is not torch.bool:
            self._carry((inputs[0], 0), node)
            inputs = inputs[1:]
        self._read((other for other in inputs if other not in ctx.picked), node)
        if node in self.written and type_ is not None and not isinstance(type_, list):
            target = self.types[node.args[0]]  # type: ignore[index]
            for ours, theirs in zip(type_, target, strict=True):
                ctx.unify(ours, theirs)
        return type_

    def _carry(self, source: UnitNumbers, node: fx.Node) -> None:
        """Keep indices those of their axis where an operator only moves them."""
        if source in self.unit_numbers:
            self.unit_numbers[node, 0] = self.unit_numbers[source]

    def _read(self, operands: Iterable[fx.Node], node: fx.Node) -> None:
        """Places of an axis are numbers to whatever does not pick by them."""
        for other in operands:
            if (other, 0) in self.unit_numbers:
                why = "its positions are used as numbers"
                self._context(node, ZeroRule.NEVER).freeze(self.unit_numbers[other, 0], why)

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
            primes = {symbol: self._prime(symbol) for symbol in expression.free_symbols}
            value = sympy.sympify(expression.xreplace(primes))
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
