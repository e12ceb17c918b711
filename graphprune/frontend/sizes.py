"""The sizes for which a graph holds, found from what capture assumed and by running the model.

Code may take another path for another size, and `torch.export` keeps the one that its example took:
a loop over chunks of 64 tokens, traced with 8 tokens, is one pass through the loop, and wrong for
65. Each such decision is a condition on the sizes. A size that meets them all is right; for one
that does not, the program is compared with the model. Where they differ, the conditions that the
size breaks limit the program.
"""

from __future__ import annotations

import bisect
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils._sympy.value_ranges import ValueRanges

from graphprune.errors import CaptureError, first_line
from graphprune.frontend.patches.torch_code import plain_branches
from graphprune.frontend.torch_export import Exported
from graphprune.ir.nodes import size_environment
from graphprune.ir.program import Note, Program

ROWS = (1, 3)
LENGTHS = (1, 3, 17, 65, 130, 257, 513, 1025, 2049, 4097)
"""Sizes to try: few rows, and lengths on either side of what code likes to cut a length into."""

_SHORT = 17
"""Up to this length every size that breaks a condition is run."""

_EACH = 300
"""So many sizes past the one that was seen are looked at one by one, then ever fewer."""

_WORK = 3e11
"""Multiplications that one comparison may take: some seconds on a processor."""

Sizes = Mapping[str, int]
Broken = frozenset[sympy.Basic]


@dataclass(frozen=True)
class Conditions:
    """The assumptions of capture about dynamic sizes, and the sizes that it saw.

    Parameters
    ----------
    assumed
        Conditions on symbols, in the order in which the code decided on them.
    seen
        The size of the example for each symbol.
    """

    assumed: tuple[sympy.Basic, ...]
    seen: Sizes

    def broken(self, sizes: Sizes) -> Broken:
        """Return the conditions that `sizes` do not meet."""
        return frozenset(each for each in self.assumed if not _holds(each, sizes))

    def equal(self) -> dict[str, str]:
        """Return symbols that must be as large as another one, which they are mapped to.

        A view says so of the number of its elements alone, and each keeps its symbol.
        """
        found: dict[str, str] = {}
        for each in self.assumed:
            if isinstance(each, sympy.Eq):
                above, below = (each.lhs / each.rhs).as_numer_denom()
                if above.is_Symbol and below.is_Symbol:
                    first, other = (found.get(s.name, s.name) for s in (above, below))
                    found |= {s: first for s in (other, *found) if found.get(s, s) == other}
        return {symbol: first for symbol, first in found.items() if symbol != first}


def conditions_of(exported: Exported, program: Program) -> Conditions:
    """Collect the conditions under which `exported` is what the code computes."""
    env = size_environment(program.graph)
    if env is None:
        return Conditions((), {})
    names = {
        symbol.name
        for _, node in program.input_nodes()
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    decided = [guard.expr for guard in env.guards]
    decided += [each.expr for asserts in env.deferred_runtime_asserts.values() for each in asserts]
    found: dict[sympy.Basic, None] = {}
    for expression in decided:
        condition = _replaced(expression, env.replacements)
        free = {symbol.name for symbol in condition.free_symbols}
        if free and free <= names:
            found[condition] = None
    for symbol, limits in exported.program.range_constraints.items():
        # Sizes of 0 and 1 are never traced as dynamic ones.
        if str(symbol) in names and limits.lower.is_Integer and limits.lower > 1:
            found[sympy.Ge(symbol, limits.lower)] = None
    hints = {
        symbol.name: int(hint)
        for symbol, hint in env.backed_var_to_val.items()
        if symbol.name in names
    }
    return Conditions(tuple(found), hints)


def _replaced(expression: sympy.Basic, replacements: Mapping[Any, Any]) -> sympy.Basic:
    for _ in range(8):  # a replacement may hold symbols that are replaced
        after = expression.xreplace(replacements)
        if after == expression:
            break
        expression = after
    return expression


def _holds(condition: sympy.Basic, sizes: Sizes) -> bool:
    values = {s: sympy.Integer(sizes[s.name]) for s in condition.free_symbols if s.name in sizes}
    try:
        return condition.xreplace(values) == sympy.true
    except (ZeroDivisionError, AssertionError, ValueError):  # a remainder by a size of nothing
        return False


# -- comparing with the model -------------------------------------------------------------------


def limited(
    program: Program,
    conditions: Conditions,
    model: Callable[..., Sequence[Tensor]],
    inputs: Callable[[Sizes], Sequence[Tensor]],
    candidates: Sequence[Sizes],
    checked: int = 0,
) -> Program:
    """Limit `program` to the sizes for which it computes what `model` does.

    Where the model takes few sizes but the example's, so does the program.

    Parameters
    ----------
    program
        A program with dynamic sizes and with weights.
    conditions
        What capture assumed of them.
    model
        Gives the outputs, in the order of the program's, for inputs in the order of the program's.
    inputs
        Makes inputs of the sizes that it is given.
    candidates
        Sizes to try: those that break a condition are run, the cheapest first.
    checked
        Up to this length, and within what is quick, those that break none are run as well.

    Raises
    ------
    CaptureError
        When outputs differ at a size that breaks no condition.
    """
    harmless: set[sympy.Basic] = set()
    unneeded: set[sympy.Basic] = set()
    refused: set[sympy.Basic] = set()
    harmful: list[Broken] = []
    tried: set[Broken] = set()
    trials = [(conditions.broken(sizes), sizes) for sizes in candidates]
    # Fewest conditions first: what is wrong then says which of them matter.
    for broken, sizes in sorted(trials, key=lambda trial: (len(trial[0]), _work(trial[1]))):
        if not broken:
            short = max(sizes.values(), default=0) <= checked and is_quick(program, sizes)
            if short and same(program, model, inputs, sizes) is False:
                said = ", ".join(f"{name} = {size}" for name, size in sizes.items())
                raise CaptureError(f"its graph computes something else than the model for {said}")
            continue
        if any(each <= broken for each in harmful):
            continue
        # Short ones are cheap, and where one is right by chance another may not be.
        costly = max(sizes.values()) > _SHORT or program.parameter_count() * _work(sizes) > _WORK
        if costly and (broken <= harmless or broken in tried):
            continue
        tried.add(broken)
        equal = same(program, model, inputs, sizes)
        if equal:
            harmless |= broken
            # A size of 1 broadcasts where no other does.
            unneeded |= {each for each in broken if 1 not in _sizes_in(each, sizes)}
        elif equal is False:
            harmful.append(broken)
        else:
            refused |= broken
    decisive = {each for broken in harmful for each in (broken - harmless or broken)}
    limits = {
        symbol: _range(symbol, decisive, conditions.seen)
        for symbol in sorted({s.name for each in decisive for s in each.free_symbols})
    }
    few = _few(refused - unneeded, conditions.seen)
    return with_limits(program, limits | few, few) if limits or few else program


def _sizes_in(condition: sympy.Basic, sizes: Sizes) -> set[int]:
    return {sizes[s.name] for s in condition.free_symbols if s.name in sizes}


def _few(conditions: Collection[sympy.Basic], seen: Sizes) -> dict[str, tuple[int, int | None]]:
    """Return ranges of symbols for which `conditions` hold at few sizes, around the one seen.

    Many are those that go on past twice the size that was seen, as multiples of a number do.
    """
    found: dict[str, tuple[int, int | None]] = {}
    for symbol in sorted({s.name for each in conditions for s in each.free_symbols}):
        own = [each for each in conditions if {s.name for s in each.free_symbols} == {symbol}]
        further = range(2 * seen[symbol], 2 * seen[symbol] + _EACH)
        if not any(all(_holds(each, {symbol: size}) for each in own) for size in further):
            least, most = _range(symbol, own, seen)
            if most is not None and most < 2 * least:
                found[symbol] = (least, most)
        elif _is_alone(symbol, conditions, seen):
            found[symbol] = (seen[symbol], seen[symbol])
    return found


def _is_alone(symbol: str, conditions: Collection[sympy.Basic], seen: Sizes) -> bool:
    """Tell whether equations seem to leave `symbol` the size that was seen.

    That is where they hold for no other of a few sizes, tried with those of up to two more symbols
    that equations are likely to hold at; it may be that they hold for one which is not tried.
    """
    about = [each for each in conditions if symbol in {s.name for s in each.free_symbols}]
    equations = [each for each in about if isinstance(each, sympy.Eq)]
    others = sorted({s.name for each in equations for s in each.free_symbols} - {symbol})
    if not equations or len(others) > 2:
        return False
    own = seen[symbol]
    for size in {1, 3, own + 1, 2 * own, 2 * own + 1, 3 * own} - {own}:
        likely = {*range(1, _SHORT), size, 2 * size, size // 2, 3 * size}
        sizes = [
            sorted(likely | {seen[each], 2 * seen[each], 3 * seen[each], seen[each] + size - own})
            for each in others
        ]
        for tried in itertools.product(*sizes):
            at = {symbol: size, **dict(zip(others, tried, strict=True))}
            if all(_holds(each, at) for each in equations):
                return False
    return True


def _work(sizes: Sizes) -> int:
    return math.prod(max(size, 1) for size in sizes.values())


def with_limits(
    program: Program, limits: Mapping[str, tuple[int, int | None]], few: Collection[str] = ()
) -> Program:
    """Limit the dynamic sizes of `program`, and say so in its notes.

    For the symbols `few` it is the model itself that refuses most other sizes.
    """
    ranges = {
        symbol: known & _values(*limits[str(symbol)]) if str(symbol) in limits else known
        for symbol, known in program.ranges.items()
    }
    first: dict[str, str] = {}
    for value in program.inputs:
        for dim, size in enumerate(value.shape):
            if isinstance(size, str):
                first.setdefault(size, f"dimension {dim} of {value.name}")
    notes = [
        Note("limited-size", f"{first[symbol]} is {_said(*of)}: {_NO if symbol in few else _WHY}")
        for symbol, of in limits.items()
    ]
    return replace(program, ranges=ranges, limits=limits, notes=(*program.notes, *notes))


_WHY = (
    "the model's code takes another path for other sizes; example_inputs of another size give "
    "other limits"
)


_NO = "the model refuses most other sizes"


def _said(least: int, most: int | None) -> str:
    if least == most:
        return f"{least} alone"
    return f"{least} or more" if most is None else f"{least} to {most}"


def with_fixed(
    program: Program,
    wanted: Sequence[Mapping[int, Any] | None],
    model: Callable[..., Any],
    example: Sequence[Tensor],
    why: str = "",
) -> Program:
    """Say in the notes which dimensions became fixed though the model takes other sizes.

    A first dimension is always said, since it is a batch to whoever calls the program.

    Parameters
    ----------
    program
        What was captured.
    wanted
        The dimensions of each input that were to be dynamic.
    model, example
        The call and its inputs: it is run with one more, and with twice as many, along all fixed
        dimensions of one size.
    why
        The reason, and what to do, where it is not that the code takes another path.
    """
    fixed = [
        (place, dim, value.shape[dim])
        for place, (value, dims) in enumerate(zip(program.inputs, wanted, strict=True))
        for dim, how in (dims or {}).items()
        if isinstance(value.shape[dim], int) and how not in (None, Dim.STATIC) and value.shape[dim]
    ]
    notes = []
    for size in dict.fromkeys(size for *_, size in fixed):
        dims = [(place, dim) for place, dim, of in fixed if of == size]
        known = any(dim == 0 for _, dim in dims) or example[0].is_meta
        # Code that halves an image takes no odd sizes.
        others = (_longer(example, dims, twice) for twice in (False, True))
        if known or not all(refusal(model, other) for other in others):
            where = " and ".join(
                f"dimension {dim} of {program.inputs[at].name}" for at, dim in dims
            )
            verb = "is" if len(dims) == 1 else "are"
            notes.append(Note("fixed-size", f"{where} {verb} {size} alone: {why or _WHY}"))
    return replace(program, notes=(*program.notes, *notes))


def _longer(
    example: Sequence[Tensor], dims: Sequence[tuple[int, int]], twice: bool
) -> list[Tensor]:
    """Return `example` with one more, or twice as many, along dimensions (input, dimension)."""
    tensors = list(example)
    for place, dim in dims:
        more = tensors[place].shape[dim] if twice else 1
        tensors[place] = torch.cat([tensors[place], tensors[place].narrow(dim, 0, more)], dim)
    return tensors


def refusal(model: Callable[..., Any], inputs: Sequence[Tensor]) -> str:
    """Return why `model` does not run on `inputs`; "" where it does."""
    try:
        _result(model, *inputs)
    except Exception as error:  # noqa: BLE001 - model code refuses sizes in any way
        return first_line(error, typed=True)
    return ""


def _values(least: int, most: int | None) -> ValueRanges[Any]:
    return ValueRanges(least, sympy.oo if most is None else most)


def _range(symbol: str, conditions: Collection[sympy.Basic], seen: Sizes) -> tuple[int, int | None]:
    """Return the range around the size that was seen in which all `conditions` hold."""

    def hold(size: int) -> bool:
        return all(_holds(each, {**seen, symbol: size}) for each in conditions)

    least = most = seen[symbol]
    while least > 0 and hold(least - 1):
        least -= 1
    while most < seen[symbol] + _EACH and hold(most + 1):
        most += 1
    if most < seen[symbol] + _EACH:
        return least, most
    for step in (1 << power for power in range(14)):
        if not hold(most + step):
            first = bisect.bisect_left(range(step), True, key=lambda up: not hold(most + up))
            return least, most + first - 1
    return least, None


def same(
    program: Program,
    model: Callable[..., Sequence[Tensor]],
    inputs: Callable[[Sizes], Sequence[Tensor]],
    sizes: Sizes,
) -> bool | None:
    """Tell whether program and model compute the same; None where the model takes no such size."""
    if not is_quick(program, sizes):
        return False
    given = inputs(sizes)
    try:
        expected = _result(model, *(tensor.clone() for tensor in given))
    except Exception:  # noqa: BLE001 - model code refuses sizes in any way
        return None
    try:
        run = program.graph_module.forward  # as a module it prints what fails
        found = _result(run, *program.operands.values(), *given)
        return all(map(_close, expected, found))
    except Exception:  # noqa: BLE001 - so do operators
        return False


def _result(model: Callable[..., Any], *inputs: Tensor) -> Any:
    """Return what `model` gives, with the same random draws each time."""
    quiet, same_draws = warnings.catch_warnings(), torch.random.fork_rng()
    with torch.no_grad(), quiet, same_draws, plain_branches():  # without a compiler
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return model(*inputs)


def is_quick(program: Program, sizes: Sizes) -> bool:
    """Tell whether a comparison at `sizes` takes some seconds at most."""
    return program.parameter_count() * _work(sizes) <= _WORK


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if not expected.is_floating_point():
        return bool(torch.equal(expected, found))
    wanted, got = expected.double().nan_to_num(), found.double().nan_to_num()
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * wanted.abs().max() if wanted.numel() else 0
    return not wanted.numel() or bool((wanted - got).abs().max() <= allowed)
