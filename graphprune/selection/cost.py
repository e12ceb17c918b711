"""The cost of a program before and after cuts: parameters, multiply-accumulates, KV cache."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from torch import fx

from graphprune.analysis.axes import Atom, Axis, Product, Sum
from graphprune.analysis.axis_cuts import AxisCut
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.operators.facts import Type
from graphprune.ir.aten import name_of
from graphprune.ir.nodes import arguments_of, dynamic_sizes, symbols_of
from graphprune.ir.program import PAST

Cost = Literal["params", "macs", "kv_bytes"]
"""Parameters; multiply-accumulates of a prompt; bytes of KV cache for each token."""

TOKENS = 512
"""Length of the prompt whose multiply-accumulates are counted, where a length is dynamic."""

KernelKind = Literal["product", "attention"]


class Kernel(NamedTuple):
    """A piece of work that a runtime has a kernel for, and its sizes.

    Of a product: matrices at once, rows, what is summed over, columns. Of an attention: heads,
    rows, keys, and the widths of keys and of values.
    """

    kind: KernelKind
    sizes: tuple[int, ...]


Owners = tuple[tuple[Atom, int], ...]
"""Units (axis, index) without any one of which a product is not there."""

Terms = list[tuple[int, tuple[Axis, ...], Owners]]
"""A sum of products: a factor, the axes whose sizes it is multiplied by, and who owns it."""


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of a program in closed form over the sizes of its axes.

    They are exact for what the rewriter leaves, so that a budget is met before anything is built.
    Multiply-accumulates are those of matrix products, attention and convolutions for a batch of one
    and `tokens` tokens on an empty cache; the mask of causal attention saves none. Where experts
    run only on the tokens that chose them, each has an equal share, and the others take over that
    of one that goes.

    Parameters
    ----------
    coupling
        The analysis of the program.
    tokens
        Stands for every dynamic size but that of the batch and of the cache.

    Examples
    --------
    >>> import torch, graphprune as gp
    >>> layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    >>> program = gp.capture(torch.nn.Sequential(*layers), (torch.zeros(2, 8),))
    >>> costs = Costs(gp.analyze(program))
    >>> costs.after("macs", {})
    192
    >>> costs.after("macs", {costs.coupling.groups[0].name: 8})
    96
    """

    coupling: Coupling
    tokens: int = TOKENS

    def after(self, cost: Cost, lost: Mapping[str, int | Sequence[int]]) -> int:
        """Return the cost when groups (by name) have lost units under each parent.

        How many is all that matters, but for units that own whole weights, which may be of
        different sizes: there a sequence says which ones, and a number means the first.
        """
        return self._total(self._terms(cost), self._cuts(lost))

    def kernels(self, lost: Mapping[str, int]) -> Counter[Kernel]:
        """Return the matrix products and attentions of a prompt, with how often each is run.

        As they are once groups (by name) have lost units under each parent. Convolutions count as
        the products that they amount to.
        """
        cuts, found = self._cuts(lost), Counter[Kernel]()
        for node, kind, dims in self._work:
            if not _gone(self._owners.get(node, ()), cuts):
                sizes = (math.prod(self._size(axis, cuts) for axis in each) for each in dims)
                found[Kernel(kind, tuple(sizes))] += 1
        return found

    def _cuts(self, lost: Mapping[str, int | Sequence[int]]) -> dict[Axis, AxisCut]:
        cuts: dict[Axis, AxisCut] = {}
        for name, units in lost.items():
            removed = tuple(range(units)) if isinstance(units, int) else tuple(units)
            if removed:
                cuts[self.coupling.atom(name)] = AxisCut(removed=removed)
        return cuts

    def unit(self, cost: Cost, name: str) -> int:
        """Return what the first unit of a group saves when it goes (0 for the only unit)."""
        atom = self.coupling.atom(name)
        terms = self._by_atom[cost].get(atom, [])
        if atom.size < 2:
            return 0
        cuts: dict[Axis, AxisCut] = {atom: AxisCut(removed=(0,))}
        return self._total(terms, {}) - self._total(terms, cuts)

    def _total(self, terms: Terms, cuts: Mapping[Axis, AxisCut]) -> int:
        return sum(
            factor * math.prod(self._size(axis, cuts) for axis in axes)
            for factor, axes, owners in terms
            if not _gone(owners, cuts)
        )

    def _terms(self, cost: Cost) -> Terms:
        return {"params": self._params, "macs": self._macs, "kv_bytes": self._kv_bytes}[cost]

    @cached_property
    def _by_atom(self) -> dict[Cost, dict[Atom, Terms]]:
        """The terms that each atom has a part in."""
        found: dict[Cost, dict[Atom, Terms]] = {}
        axes, costs = self.coupling.types.axes, get_args(Cost)
        for cost in costs:
            found[cost] = {}
            for term in self._terms(cost):
                atoms = {atom for axis in term[1] for atom in axes.atoms(axis)}
                for atom in atoms.union(atom for atom, _ in term[2]):
                    found[cost].setdefault(atom, []).append(term)
        return found

    def _size(self, axis: Axis, cuts: Mapping[Axis, AxisCut]) -> int:
        axis = self.coupling.types.axes.head(axis)
        if isinstance(axis, Product):
            return math.prod(self._size(factor, cuts) for factor in axis.factors)
        if isinstance(axis, Sum):
            return sum(self._size(term, cuts) for term in axis.terms)
        if axis in cuts:
            return axis.size - cuts[axis].count
        return self._dynamic(axis.size)

    def _dynamic(self, size: int) -> int:
        """Return the size of an atom; for a dynamic one, what its symbols are taken for."""
        expressions, result = self.coupling.types.dynamic, 1
        if size in self._fixed:
            return self._fixed[size]
        if size in expressions:
            return int(expressions[size].xreplace(self._symbols))
        for number, expression in expressions.items():  # a part of a flattened axis
            while size % number == 0:
                size //= number
                result *= int(expression.xreplace(self._symbols))
        return size * result

    @cached_property
    def _fixed(self) -> dict[int, int]:
        """Return what the stand-ins of a program without weights, and their products, mean."""
        meant = {"batch": 1, "new": self.tokens, "past": 0, "total": self.tokens}
        sizes = {size: meant[name] for size, name in self.coupling.program.stand_ins.items()}
        rows = [size for size, name in self.coupling.program.stand_ins.items() if name == "batch"]
        return sizes | {row * size: sizes[size] for row in rows for size in sizes if size != row}

    @cached_property
    def _symbols(self) -> dict[object, int]:
        program, sizes = self.coupling.program, dict[str, int]()
        for value in program.inputs:
            for dim, symbol in enumerate(value.shape):
                past = value.name.startswith(PAST) and dim == 2
                wanted = 0 if past else 1 if dim == 0 else self.tokens
                if isinstance(symbol, str):
                    sizes.setdefault(symbol, program.within(symbol, wanted))
        expressions = self.coupling.types.dynamic.values()
        symbols = {symbol for expression in expressions for symbol in expression.free_symbols}
        given = {symbol: sizes.get(str(symbol), self.tokens) for symbol in symbols}
        for chosen, (mask, atom) in self._chosen.items():
            shape, least = mask.meta["val"].shape, self.coupling.types.min_units.get(atom, 1)
            mask_sizes = [self._fixed.get(size, size) for size in shape if isinstance(size, int)]
            slots = 1 if len(shape) > 1 and least in mask_sizes else least
            mask_sizes += [int(expression.xreplace(given)) for expression in dynamic_sizes(mask)]
            given[chosen] = max(1, math.prod(mask_sizes) * slots // atom.size)
        return given

    @cached_property
    def _chosen(self) -> dict[object, tuple[fx.Node, Atom]]:
        """Return the number of tokens that chose a unit (a dynamic size) -> its mask and axis.

        The size arises where the true elements of a mask are listed, the last operand.
        """
        found: dict[object, tuple[fx.Node, Atom]] = {}
        for atom, owner in self.coupling.types.owners.items():
            for node in itertools.chain(*owner.nodes):
                known = symbols_of(*node.all_input_nodes)
                for symbol in symbols_of(node) - known if node.all_input_nodes else ():
                    found[symbol] = (node.all_input_nodes[-1], atom)
        return found

    @cached_property
    def _weights(self) -> frozenset[fx.Node]:
        return frozenset(node for _, node in self.coupling.program.weight_nodes())

    @cached_property
    def _params(self) -> Terms:
        program, of = self.coupling.program, self.coupling.types.axes_of
        return [
            (1, of[node], self._owners.get(node, ()))
            for name, node in program.weight_nodes()
            if program.kinds[name] == "parameter"
        ]

    @cached_property
    def _owners(self) -> dict[fx.Node, Owners]:
        """Every node that goes with units -> these."""
        found: dict[fx.Node, Owners] = {}
        for atom, owner in self.coupling.types.owners.items():
            for unit, nodes in enumerate(owner.nodes):
                for node in nodes:
                    found[node] = (*found.get(node, ()), (atom, unit))
        return found

    @cached_property
    def _kv_bytes(self) -> Terms:
        types = self.coupling.types.axes_of
        return [
            (value.dtype.itemsize, (types[node][1], types[node][3]), ())
            for value, node in self.coupling.program.input_nodes()
            if value.name.startswith(PAST)
        ]

    @cached_property
    def _macs(self) -> Terms:
        found: Terms = []
        for node, kind, dims in self._work:
            if kind == "attention":
                heads, rows, keys, *widths = dims
                terms = [(*heads, *rows, *keys, *width) for width in widths]
            else:
                terms = [tuple(itertools.chain(*dims))]
            taken_over = not self._chosen.keys().isdisjoint(symbols_of(node))
            owners = () if taken_over else self._owners.get(node, ())
            found += [(1, term, owners) for term in terms]
        return found

    @cached_property
    def _work(self) -> list[tuple[fx.Node, KernelKind, Sequence[Sequence[Axis]]]]:
        """Every matrix product and attention: its node, its kind, the axes of each of its sizes."""
        types = self.coupling.types.axes_of
        found: list[tuple[fx.Node, KernelKind, Sequence[Sequence[Axis]]]] = []
        contracted: dict[fx.Node, list[Axis]] = {}
        for entry in self.coupling.types.facts.contractions:
            if len(entry.operands) > 1:
                contracted.setdefault(entry.node, []).append(entry.axis)
        for node, inner in contracted.items():
            name, result = name_of(node), types[node]
            held = [types[each] for each in node.all_input_nodes if each in self._weights]
            kind: KernelKind = "product"
            dims: Sequence[Sequence[Sequence[Axis]]]
            if name == "scaled_dot_product_attention":
                (*heads, rows, width), key, value = self._operands(node, "query", "key", "value")
                kind, dims = "attention", [[heads, [rows], [key[-2]], [width], [value[-1]]]]
            elif name.startswith("conv_transpose"):
                source, weight = self._operands(node, "input", "weight")
                dims = [[[], [source[0], *source[2:]], [source[1]], weight[1:]]]
            elif name.startswith("conv"):
                (weight,) = self._operands(node, "weight")
                dims = [[[], [result[0], *result[2:]], weight[1:], [result[1]]]]
            elif name.partition("_")[0] in ("lstm", "gru", "rnn"):
                source = types[node.all_input_nodes[0]]  # every matrix meets each of its rows
                dims = [[[], source[:-1], each[1:], each[:1]] for each in held if len(each) == 2]
            elif any(len(each) == 2 for each in held):
                dims = [[[], result[:-1], inner, result[-1:]]]
            else:
                dims = [[result[:-2], result[-2:-1], inner, result[-1:]]]
            found += [(node, kind, each) for each in dims]
        return found

    def _operands(self, node: fx.Node, *names: str) -> list[Type]:
        """Return the axes of what a call is given as `names`, though one node be given twice."""
        given = arguments_of(node)
        return [self.coupling.types.axes_of[given[name]] for name in names]


def _gone(owners: Owners, cuts: Mapping[Axis, AxisCut]) -> bool:
    return any(atom in cuts and unit in cuts[atom].removed for atom, unit in owners)
