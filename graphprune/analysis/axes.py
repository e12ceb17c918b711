"""Axis types: atoms, products and sums, made equal by unification.

Every dimension of every tensor has an *axis*. An axis is an **atom** of some size, a **product**
``(a b)`` (what ``view`` splits and merges, row-major) or a **sum** ``[a + b]`` (what ``cat`` and
``slice`` join and cut). Operators say which axes are the same; making two axes the same is
*unification*, as in type inference: atoms are bound, products are factored further, sums are cut
further. The atoms that are left unbound are the coupled groups of a model.

This module knows no tensor library. Sizes are plain integers: a dynamic size is given as a large
prime, so that equality of products of sizes is equality of the expressions behind them.

Examples
--------
>>> axes = Axes()
>>> hidden, out = axes.atom(8), axes.atom(8)
>>> heads, dim = axes.atom(2), axes.atom(4)
>>> axes.unify(out, axes.product(heads, dim))     # view(..., 2, 4)
>>> first, second = axes.split(dim, (2, 2))       # rotate_half
>>> axes.unify(axes.sum(second, first), dim)      # cat((-second, first)) + x
>>> axes.show(out, {first: "r", heads: "kv"})
'(kv [r + r])'
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


class Axis:
    """An atom, a product or a sum; compare resolved axes with ``is`` (atoms) or ``==``."""

    __slots__ = ("size",)
    size: int


class Atom(Axis):
    """An axis with no known structure; unification may bind it to another axis."""

    __slots__ = ("bound", "serial")

    def __init__(self, size: int, serial: int) -> None:
        self.size = size
        self.serial = serial
        self.bound: Axis | None = None

    def __repr__(self) -> str:
        return f"a{self.serial}:{self.size}"


class Product(Axis):
    """Axes flattened row-major into one: the last factor varies fastest."""

    __slots__ = ("factors",)

    def __init__(self, factors: tuple[Axis, ...]) -> None:
        self.factors = factors
        self.size = math.prod(factor.size for factor in factors)

    def __repr__(self) -> str:
        return "(" + " ".join(map(repr, self.factors)) + ")" if self.factors else "1"


class Sum(Axis):
    """Axes laid one after the other."""

    __slots__ = ("terms",)

    def __init__(self, terms: tuple[Axis, ...]) -> None:
        self.terms = terms
        self.size = sum(term.size for term in terms)

    def __repr__(self) -> str:
        return "[" + " + ".join(map(repr, self.terms)) + "]"


UNIT = Product(())
"""The axis of size 1: a product of nothing, with no unit that could be removed."""


_MOST_CUTS = 100
"""Cuts to make two sums one; an axis against itself shifted by one takes one for each index."""


class Conflict(Exception):
    """Two axes that no assignment of atoms makes the same; the caller freezes both."""


@dataclass(frozen=True)
class Occurrence:
    """One appearance of an atom inside a dimension, as an affine index map.

    Unit ``u`` holds the indices ``offset + sum(o_k * stride_k) + u * inner + i`` for every
    outer coordinate ``o_k`` and every ``0 <= i < inner``.
    """

    atom: Atom
    offset: int
    inner: int
    outer: tuple[tuple[Axis, int], ...]
    """(axis, stride) of every loop outside of this atom, outermost first; an axis that is not an
    atom stands for a plain loop over its size."""


class Axes:
    """A store of axes and what unification has learnt of them.

    All sizes are positive; axes of size 1 carry no atom. Unification never changes a size.
    """

    def __init__(self) -> None:
        self._count = 0

    # -- building -------------------------------------------------------------------------------

    def atom(self, size: int) -> Axis:
        """Return a new axis of `size` with no structure yet (`UNIT` when the size is 1)."""
        if size == 1:
            return UNIT
        self._count += 1
        return Atom(size, self._count)

    def product(self, *axes: Axis) -> Axis:
        """Return the row-major product of `axes`."""
        factors: list[Axis] = []
        for axis in axes:
            axis = self.head(axis)
            if isinstance(axis, Product):
                factors.extend(axis.factors)
            else:
                factors.append(axis)
        if len(factors) == 1:
            return factors[0]
        return Product(tuple(factors)) if factors else UNIT

    def sum(self, *axes: Axis) -> Axis:
        """`axes` one after the other."""
        terms: list[Axis] = []
        pending = list(reversed(axes))
        while pending:  # without recursion: an axis cut at each index is a sum in a sum in a sum
            axis = self._followed(pending.pop())
            axis = self.head(axis) if isinstance(axis, Product) else axis
            if isinstance(axis, Sum):
                pending.extend(reversed(axis.terms))
            elif axis.size > 0:
                terms.append(axis)
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    # -- looking --------------------------------------------------------------------------------

    def head(self, axis: Axis) -> Axis:
        """`axis` with the bindings of its outermost layer followed."""
        axis = self._followed(axis)
        if isinstance(axis, Product):
            if any(_loose(factor, Product) for factor in axis.factors):
                return self.product(*axis.factors)
        elif isinstance(axis, Sum) and any(_loose(term, Sum) for term in axis.terms):
            return self.sum(*axis.terms)
        return axis

    def _followed(self, axis: Axis) -> Axis:
        """Return what an atom is bound to, in the end."""
        seen = []
        while isinstance(axis, Atom) and axis.bound is not None:
            seen.append(axis)
            axis = axis.bound
        for atom in seen:
            atom.bound = axis
        return axis

    def resolve(self, axis: Axis) -> Axis:
        """`axis` with every binding followed: only unbound atoms are left in it."""
        axis = self.head(axis)
        if isinstance(axis, Product):
            return self.product(*map(self.resolve, axis.factors))
        if isinstance(axis, Sum):
            return self.sum(*map(self.resolve, axis.terms))
        return axis

    def atoms(self, axis: Axis) -> Iterator[Atom]:
        """Return the unbound atoms inside `axis`, in order, with repetitions."""
        axis = self.head(axis)
        if isinstance(axis, Atom):
            yield axis
            return
        for part in _inside(axis):
            yield from self.atoms(part)

    def same(self, left: Axis, right: Axis) -> bool:
        """Return whether unification already knows `left` and `right` to be one axis."""
        left, right = self.head(left), self.head(right)
        if left is right:
            return True
        if isinstance(left, Product) and isinstance(right, Product):
            return self._all_same(left.factors, right.factors)
        if isinstance(left, Sum) and isinstance(right, Sum):
            return self._all_same(left.terms, right.terms)
        return False

    def _all_same(self, left: Sequence[Axis], right: Sequence[Axis]) -> bool:
        return len(left) == len(right) and all(map(self.same, left, right))

    def show(self, axis: Axis, names: Mapping[Axis, str]) -> str:
        """`axis` as text, with atoms called by `names` (resolved) or else by their size."""
        axis = self.head(axis)
        if isinstance(axis, Product):
            if not axis.factors:
                return "1"
            return "(" + " ".join(self.show(factor, names) for factor in axis.factors) + ")"
        if isinstance(axis, Sum):
            return "[" + " + ".join(self.show(term, names) for term in axis.terms) + "]"
        return names.get(axis, str(axis.size))

    def occurrences(self, axis: Axis) -> list[Occurrence]:
        """Return every appearance of every atom inside `axis`, as affine index maps."""
        found: list[Occurrence] = []
        self._occurrences(self.head(axis), 0, 1, (), found)
        return found

    def _occurrences(
        self,
        axis: Axis,
        offset: int,
        inner: int,
        outer: tuple[tuple[Axis, int], ...],
        found: list[Occurrence],
    ) -> None:
        if isinstance(axis, Atom):
            found.append(Occurrence(axis, offset, inner, outer))
        elif isinstance(axis, Product):
            inner *= axis.size
            for factor in axis.factors:
                inner //= factor.size
                self._occurrences(self.head(factor), offset, inner, outer, found)
                outer = (*outer, (self.head(factor), inner))
        elif isinstance(axis, Sum):
            for term in axis.terms:
                self._occurrences(self.head(term), offset, inner, outer, found)
                offset += term.size * inner

    # -- unification ----------------------------------------------------------------------------

    def unify(self, left: Axis, right: Axis) -> None:
        """Make `left` and `right` one axis.

        Raises
        ------
        Conflict
            When no assignment of atoms makes them the same. What was bound on the way stays
            bound (it follows from the equations all the same).
        """
        left, right = self.head(left), self.head(right)
        if left is right:
            return
        if left.size != right.size:
            raise Conflict(f"sizes {left.size} and {right.size} differ")
        if isinstance(left, Atom):
            self._bind(left, right)
        elif isinstance(right, Atom):
            self._bind(right, left)
        elif isinstance(left, Product) and isinstance(right, Product):
            self._unify_products(left, right)
        elif isinstance(left, Sum) and isinstance(right, Sum):
            self._unify_sums(left, right)
        elif isinstance(left, Product) and isinstance(right, Sum):
            self._distribute(left, right)
        elif isinstance(left, Sum) and isinstance(right, Product):
            self._distribute(right, left)

    def _bind(self, atom: Atom, axis: Axis) -> None:
        if not isinstance(axis, Atom) and any(inner is atom for inner in self.atoms(axis)):
            raise Conflict("an axis would have to contain itself")
        atom.bound = axis

    def _unify_products(self, left: Product, right: Product) -> None:
        """Peel both products from the left, factoring the larger of the two leading axes."""
        ours, theirs = list(left.factors), list(right.factors)
        while self._open(ours, Product) and self._open(theirs, Product):
            big, small = (ours, theirs) if ours[0].size >= theirs[0].size else (theirs, ours)
            if big[0].size == small[0].size:
                self.unify(ours.pop(0), theirs.pop(0))
                continue
            run = _run(small, big[0].size)
            if run and not isinstance(big[0], Atom):
                self.unify(big.pop(0), self.product(*small[:run]))
                del small[:run]
                continue
            common = math.gcd(big[0].size, small[0].size)
            if common == 1:
                raise Conflict(f"{big[0].size} and {small[0].size} have no common factor")
            for side in (big, small):
                side[:1] = self.factor(side[0], (common, side[0].size // common))

    def _open(self, parts: list[Axis], kind: type[Axis]) -> bool:
        """Bring the leading part of a product or sum up to date; whether there is one.

        Unifying what stood before it may have given it more structure.
        """
        while parts:
            lead = self.head(parts[0])
            inside = _inside(lead) if isinstance(lead, kind) else (lead,)
            parts[:1] = inside
            if inside:
                return True
        return False

    def factor(self, axis: Axis, sizes: tuple[int, ...]) -> list[Axis]:
        """`axis` as a product of axes of the given `sizes`.

        Raises
        ------
        Conflict
            When its known structure does not allow it.
        """
        parts = [self.atom(size) for size in sizes]
        self.unify(axis, self.product(*parts))
        return [self.head(part) for part in parts]

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """`axis` cut into consecutive pieces of the given positive `sizes`.

        Raises
        ------
        Conflict
            When a boundary falls inside an inner factor of a product.
        """
        axis = self.head(axis)
        if len(sizes) == 1:
            return [axis]
        if isinstance(axis, Atom):
            parts = [self.atom(size) for size in sizes]
            axis.bound = Sum(tuple(parts))
            return parts
        if isinstance(axis, Product):
            lead, *rest = axis.factors
            inner = self.product(*rest)
            if any(size % inner.size for size in sizes):
                raise Conflict(f"a cut at {sizes} falls inside a factor of {axis!r}")
            pieces = self.split(lead, [size // inner.size for size in sizes])
            return [self.product(piece, inner) for piece in pieces]
        assert isinstance(axis, Sum)
        return self._split_sum(axis, sizes)

    def _split_sum(self, axis: Sum, sizes: Sequence[int]) -> list[Axis]:
        pending = list(axis.terms)
        pieces: list[Axis] = []
        for size in sizes:
            piece: list[Axis] = []
            while size > 0:
                term = pending.pop(0)
                if term.size > size:
                    term, tail = self.split(term, (size, term.size - size))
                    pending.insert(0, tail)
                piece.append(term)
                size -= term.size
            pieces.append(self.sum(*piece))
        return pieces

    def _unify_sums(self, left: Sum, right: Sum) -> None:
        """Cut the longer leading term at the boundary of the other."""
        ours, theirs = list(left.terms), list(right.terms)
        cuts = 0
        while self._open(ours, Sum) and self._open(theirs, Sum):
            if ours[0].size != theirs[0].size:
                cuts += 1
                if cuts > _MOST_CUTS:
                    raise Conflict("it would fall into too many pieces")
                long, short = (ours, theirs) if ours[0].size > theirs[0].size else (theirs, ours)
                size = short[0].size
                long[:1] = self.split(long[0], (size, long[0].size - size))
                continue
            self.unify(ours.pop(0), theirs.pop(0))

    def _distribute(self, product: Product, total: Sum) -> None:
        """``(p rest)`` against ``[a + b]``: cut `p`, or gather the sum into `p` equal runs."""
        lead, *rest = product.factors
        inner = self.product(*rest)
        sizes = [term.size for term in total.terms]
        if all(size % inner.size == 0 for size in sizes):
            pieces = self.split(lead, [size // inner.size for size in sizes])
            for piece, term in zip(pieces, total.terms, strict=True):
                self.unify(self.product(piece, inner), term)
            return
        # The runs are each the same axis, but an index of `lead` now picks a run: removing one
        # would shift the rest, so `lead` must be taken apart into single fixed indices.
        runs = self.split(total, [inner.size] * lead.size)
        self.split(lead, [1] * lead.size)
        for run in runs:
            self.unify(run, inner)


def _inside(axis: Axis) -> tuple[Axis, ...]:
    if isinstance(axis, Product):
        return axis.factors
    return axis.terms if isinstance(axis, Sum) else ()


def _loose(part: Axis, kind: type[Axis]) -> bool:
    """Return whether `part` must be followed or flattened to normalize a `kind` around it."""
    return isinstance(part, kind) or (isinstance(part, Atom) and part.bound is not None)


def _run(axes: Sequence[Axis], size: int) -> int:
    """Return how many leading `axes` have a product of exactly `size` (0 when none do)."""
    total = 1
    for count, axis in enumerate(axes, start=1):
        total *= axis.size
        if total >= size:
            return count if total == size else 0
    return 0
