from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.analysis.axes import UNIT, Atom, Axes, Axis, Conflict, Product, Sum
from graphprune.analysis.axis_cuts import AxisCut, Growth, is_cut, kept_indices, kept_size

FAST = settings(max_examples=60, deadline=None, derandomize=True)

# A shape is an int (an atom), or ("product" | "sum", shapes): built in a store by `build`.
Shape = int | tuple[str, list["Shape"]]

_SHAPES = st.recursive(
    st.integers(1, 4),
    lambda inner: st.tuples(
        st.sampled_from(["product", "sum"]), st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=6,
)


def build(axes: Axes, shape: Shape) -> Axis:
    if isinstance(shape, int):
        return axes.atom(shape)
    kind, parts = shape
    built = [build(axes, part) for part in parts]
    return axes.product(*built) if kind == "product" else axes.sum(*built)


def enumerate_places(axes: Axes, axis: Axis) -> list[tuple[tuple[Atom, int], ...]]:
    """Every index of `axis` as the units of the atoms that it stands for, in order."""
    axis = axes.head(axis)
    if isinstance(axis, Atom):
        return [((axis, unit),) for unit in range(axis.size)]
    if isinstance(axis, Sum):
        return list(itertools.chain(*(enumerate_places(axes, term) for term in axis.terms)))
    assert isinstance(axis, Product)
    lists = [enumerate_places(axes, factor) for factor in axis.factors]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*lists)]


def try_unify(axes: Axes, left: Axis, right: Axis) -> bool:
    try:
        axes.unify(left, right)
    except Conflict:
        return False
    return True


# -- unification --------------------------------------------------------------------------------


@given(_SHAPES, _SHAPES)
@FAST
def test_unification_is_symmetric(first: Shape, second: Shape) -> None:
    texts = []
    for swap in (False, True):
        axes = Axes()
        left, right = build(axes, first), build(axes, second)
        made = try_unify(axes, right, left) if swap else try_unify(axes, left, right)
        texts.append((made, axes.show(left, {}), axes.show(right, {})) if made else made)
    assert texts[0] == texts[1]


@given(_SHAPES, _SHAPES)
@FAST
def test_unified_axes_are_the_same_and_keep_their_size(first: Shape, second: Shape) -> None:
    axes = Axes()
    left, right = build(axes, first), build(axes, second)
    sizes = left.size, right.size
    if try_unify(axes, left, right):
        assert enumerate_places(axes, left) == enumerate_places(axes, right)
        shown = axes.show(left, {})
        axes.unify(left, right)
        axes.unify(right, left)
        assert axes.show(left, {}) == shown
    assert (axes.resolve(left).size, axes.resolve(right).size) == sizes


@given(st.lists(_SHAPES, min_size=3, max_size=3))
@FAST
def test_the_order_of_equations_does_not_matter(shapes: list[Shape]) -> None:
    texts = set()
    for order in ([(0, 1), (1, 2)], [(1, 2), (0, 1)], [(2, 0), (0, 1)]):
        axes = Axes()
        built = [build(axes, shape) for shape in shapes]
        if all(try_unify(axes, built[i], built[j]) for i, j in order):
            texts.add(axes.show(built[0], {}))
    assert len(texts) <= 1


@given(_SHAPES, st.integers(1, 40))
@FAST
def test_other_sizes_conflict(shape: Shape, size: int) -> None:
    axes = Axes()
    axis = build(axes, shape)
    if axis.size != size:
        with pytest.raises(Conflict, match=r"sizes \d+ and \d+ differ"):
            axes.unify(axis, axes.atom(size))


def test_sizes_without_a_common_factor_conflict() -> None:
    axes = Axes()
    left = axes.product(axes.atom(3), axes.atom(4))
    with pytest.raises(Conflict, match="no common factor"):
        axes.unify(left, axes.product(axes.atom(4), axes.atom(3)))


def test_an_axis_cannot_contain_itself() -> None:
    axes = Axes()
    one = axes.atom(4)
    first, _ = axes.split(one, (2, 2))
    pair = axes.product(axes.atom(2), first)
    axes.unify(one, pair)  # [a + b] = (2 a): the sum is cut in runs, which is fine
    assert axes.head(one).size == 4


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        pytest.param(8, ("product", [2, 4]), "(2 4)", id="an atom is bound"),
        pytest.param(("product", [2, 6]), ("product", [6, 2]), "(2 3 2)", id="factored by gcd"),
        pytest.param(("product", [2, 4]), ("product", [4, 2]), "(2 2 2)", id="factored further"),
        pytest.param(("sum", [2, 3]), ("sum", [4, 1]), "[2 + 2 + 1]", id="cut at both boundaries"),
        pytest.param(("product", [4, 2]), ("sum", [2, 6]), "([1 + 3] 2)", id="distributed"),
    ],
)
def test_principal_types(left: Shape, right: Shape, expected: str) -> None:
    axes = Axes()
    ours, theirs = build(axes, left), build(axes, right)
    axes.unify(ours, theirs)
    assert axes.show(ours, {}) == expected
    assert enumerate_places(axes, ours) == enumerate_places(axes, theirs)


def test_a_sum_that_does_not_fit_a_product_is_gathered_in_equal_runs() -> None:
    axes = Axes()
    lead, inner = axes.atom(2), axes.atom(6)
    product = axes.product(lead, inner)
    total = axes.sum(axes.atom(4), axes.atom(8))
    axes.unify(product, total)
    # [4 + 8] against (2 6): both runs of six are the same axis, and the two runs keep their places.
    assert axes.resolve(lead).size == 2
    assert not list(axes.atoms(lead))
    assert enumerate_places(axes, product) == enumerate_places(axes, total)


# -- splitting and factoring --------------------------------------------------------------------


@given(_SHAPES, st.lists(st.integers(1, 6), min_size=1, max_size=4))
@FAST
def test_the_pieces_of_a_split_make_up_the_axis(shape: Shape, sizes: list[int]) -> None:
    axes = Axes()
    axis = build(axes, shape)
    if sum(sizes) > axis.size:
        return
    sizes = sizes if sum(sizes) == axis.size else [*sizes, axis.size - sum(sizes)]
    try:
        pieces = axes.split(axis, sizes)
    except Conflict:
        return
    assert [piece.size for piece in pieces] == sizes
    joined = [place for piece in pieces for place in enumerate_places(axes, piece)]
    assert joined == enumerate_places(axes, axis)


@given(_SHAPES, st.integers(1, 8))
@FAST
def test_the_factors_of_an_axis_make_up_the_axis(shape: Shape, size: int) -> None:
    axes = Axes()
    axis = build(axes, shape)
    if axis.size % size:
        return
    try:
        factors = axes.factor(axis, (size, axis.size // size))
    except Conflict:
        return
    assert [factor.size for factor in factors] == [size, axis.size // size]
    assert enumerate_places(axes, axes.product(*factors)) == enumerate_places(axes, axis)


def test_a_cut_inside_a_factor_conflicts() -> None:
    axes = Axes()
    axis = axes.product(axes.atom(3), axes.atom(4))
    with pytest.raises(Conflict, match="falls inside a factor"):
        axes.split(axis, (5, 7))


def test_axes_of_size_one_hold_no_unit() -> None:
    axes = Axes()
    assert axes.atom(1) is UNIT
    assert axes.product(UNIT, axes.atom(3), UNIT).size == 3
    assert isinstance(axes.head(axes.product(UNIT, axes.atom(3))), Atom)
    assert list(axes.atoms(UNIT)) == []


# -- what stays ---------------------------------------------------------------------------------


@st.composite
def cut_axes(draw: st.DrawFn) -> tuple[Axes, Axis, dict[Axis, AxisCut]]:
    """An axis in which unification made atoms occur in several places, and cuts of its atoms."""
    axes = Axes()
    shape = draw(_SHAPES)
    axis = build(axes, shape)
    found = list(dict.fromkeys(axes.atoms(axis)))
    if len(found) > 1 and draw(st.booleans()):
        left, right = draw(st.permutations(found))[:2]
        if left.size == right.size:
            axes.unify(left, right)
    cuts: dict[Axis, AxisCut] = {}
    for atom in dict.fromkeys(axes.atoms(axis)):
        gone = draw(st.sets(st.integers(0, atom.size - 1), max_size=atom.size - 1))
        if gone:
            cuts[atom] = AxisCut(removed=tuple(sorted(gone)))
    return axes, axis, cuts


@given(cut_axes())
@FAST
def test_positions_are_those_of_which_no_unit_goes(
    case: tuple[Axes, Axis, dict[Axis, AxisCut]],
) -> None:
    axes, axis, cuts = case
    places = enumerate_places(axes, axis)
    expected = [
        index
        for index, place in enumerate(places)
        if not any(atom in cuts and unit in cuts[atom].removed for atom, unit in place)
    ]
    kept = kept_indices(axes, axis, cuts)
    assert kept == expected
    assert len(kept) == kept_size(axes, axis, cuts)
    assert is_cut(axes, axis, cuts) == (len(kept) < axis.size)


@given(cut_axes())
@FAST
def test_what_goes_by_occurrences_and_what_stays_partition_the_dimension(
    case: tuple[Axes, Axis, dict[Axis, AxisCut]],
) -> None:
    axes, axis, cuts = case
    gone: set[int] = set()
    for place in axes.occurrences(axis):
        for unit in getattr(cuts.get(place.atom), "removed", ()):
            gone.update(indices_of(axes, place, unit))
    kept = kept_indices(axes, axis, cuts)
    assert gone.isdisjoint(kept)
    assert gone.union(kept) == set(range(axis.size))


def indices_of(axes: Axes, place, unit: int) -> set[int]:  # type: ignore[no-untyped-def]
    starts = [place.offset + unit * place.inner]
    for loop, stride in place.outer:
        starts = [start + step * stride for start in starts for step in range(loop.size)]
    return {start + i for start in starts for i in range(place.inner)}


@given(cut_axes())
@FAST
def test_occurrences_enumerate_the_places_of_each_atom(
    case: tuple[Axes, Axis, dict[Axis, AxisCut]],
) -> None:
    axes, axis, _ = case
    places = enumerate_places(axes, axis)
    for atom in dict.fromkeys(axes.atoms(axis)):
        for unit in range(atom.size):
            expected = {i for i, place in enumerate(places) if (atom, unit) in place}
            found = [indices_of(axes, o, unit) for o in axes.occurrences(axis) if o.atom is atom]
            assert set().union(*found) == expected


@pytest.mark.parametrize("seed", range(5))
def test_a_dependent_cut_stays_rectangular(seed: int) -> None:
    import random

    chosen = random.Random(seed)
    axes = Axes()
    heads, dims = axes.atom(3), axes.atom(4)
    assert isinstance(heads, Atom)
    axis = axes.product(heads, dims)
    units = {(head,): tuple(sorted(chosen.sample(range(4), 2))) for head in range(3)}
    cuts: dict[Axis, AxisCut] = {dims: AxisCut(parents=(heads,), per_parent=units)}
    kept = kept_indices(axes, axis, cuts)
    assert kept == [
        head * 4 + dim for head in range(3) for dim in range(4) if dim not in units[head,]
    ]
    assert len(kept) == kept_size(axes, axis, cuts) == 6
    assert cuts[dims].count == 2
    both = {**cuts, heads: AxisCut(removed=(1,))}
    assert kept_indices(axes, axis, both) == [index for index in kept if index // 4 != 1]


def test_growth_adds_units_to_sizes() -> None:
    axes = Axes()
    heads, copies = axes.atom(4), axes.atom(2)
    axis = axes.product(heads, copies)
    cuts: dict[Axis, AxisCut | Growth] = {copies: Growth(2), heads: AxisCut(removed=(1, 3))}
    assert kept_size(axes, copies, cuts) == 4
    assert kept_size(axes, axis, cuts) == 8
    assert Growth(2).count == -2
