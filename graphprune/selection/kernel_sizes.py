"""Sizes that the kernels of each runtime prefer, and where a program or plan leaves the fast path.

The facts, for half precision on `cuda` and `tensorrt` and for float32 on `cpu`:

- Tensor cores run at their best on matrices whose dimensions are multiples of 128 bytes (64 numbers
  in half precision), and well on multiples of 16 bytes (8 numbers): NVIDIA, Matrix Multiplication
  Background User's Guide, "Tensor Core Requirements". Convolutions are such products too.
- ONNX Runtime packs matrices for its CPU kernels in panels of 16 columns, filled up with zeros
  (MLAS, `MlasSgemmCopyPackB`), and convolutions run on blocks of 8 or 16 channels
  (`MlasNchwcGetBlockSize`).
- Quantized matrices (MatMulNBits) share a scale among 32 numbers of a row, or as many as one says,
  which divide the row: docs/ContribOperators.md, and graphprune.backends.onnx.weights.quantizers.
- GroupQueryAttention takes keys and values of one size, a multiple of 8, and of 16 where the rotary
  embedding is inside: ONNX Runtime, docs/ContribOperators.md and the checks of the operator.
- On CUDA its flash attention ends at a head size of 256, and its fastest kernel for decoding (XQA)
  takes head sizes of 64, 128 and 256, and query groups that divide 64, up to 32: ONNX Runtime,
  contrib_ops/cuda/bert/group_query_attention.cc.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from graphprune.analysis.attention.attentions import Attention, attentions
from graphprune.analysis.axes import Atom, Axis, Product, Sum
from graphprune.analysis.coupling import Coupling
from graphprune.analysis.groups import Group
from graphprune.analysis.roles import Role
from graphprune.ir.devices import RUNTIMES, Runtime
from graphprune.ir.program import Program


@dataclass(frozen=True)
class Width:
    """Numbers that the size of an axis is best a multiple of, and at the least."""

    best: int
    minimum: int


MATRICES: dict[Runtime, Width] = {
    "cpu": Width(16, 8),
    "cuda": Width(64, 8),
    "tensorrt": Width(64, 8),
}
"""Runtime -> what FFN widths, hidden sizes, channels and expert widths are best multiples of."""

BLOCK = 32
"""Numbers of a row that share a scale once weights are quantized: widths are rounded to it too."""

HEADS = Width(16, 8)
"""What head sizes are best multiples of: of 8 attention is fused, of 16 rotation with it."""

QUERY_GROUPS: dict[Runtime, tuple[int, ...]] = {"cuda": (1, 2, 4, 8, 16, 32)}
"""Runtime -> numbers of query heads on a KV head that its fastest attention takes."""

DECODED_HEAD_SIZES: dict[Runtime, tuple[int, ...]] = {"cuda": (64, 128, 256)}
"""Runtime -> head sizes that its fastest attention takes when it decodes."""

MOST_HEAD_SIZE: dict[Runtime, int] = {"cuda": 256}
"""Runtime -> the largest head size of its flash attention."""

CHOICES = 4
"""A group is rounded to a multiple that leaves it so many sizes, so that rounding stays small."""

_NOUNS: dict[Role, str] = {
    "ffn": "FFN width",
    "expert-unit": "expert width",
    "residual": "hidden size",
    "channel": "number of channels",
}


# -- what to round to -----------------------------------------------------------------------------


def preferred_sizes(groups: Iterable[Group], runtime: Runtime) -> dict[str, Sequence[int]]:
    """Return the numbers of units that groups are best left with.

    Widths are multiples of the best number where a group is large enough to have `CHOICES` of them,
    else of the largest half, quarter and so on of it for which it is, down to the least; of that
    two suffice. Query slots are left with a query group that the fastest attention takes. Groups of
    KV heads, of experts, and those that are too small may have any size.

    Parameters
    ----------
    groups
        Those that may lose units.
    runtime
        What the program is to run on.

    Returns
    -------
    dict
        Group name -> numbers of units, ascending; groups that may have any size are not in it.
    """
    found: dict[str, Sequence[int]] = {}
    for group in groups:
        if group.role == "query-slot":
            taken = [QUERY_GROUPS[each] for each in _meant(runtime) if each in QUERY_GROUPS]
            if taken:
                common = set(taken[0]).intersection(*taken)
                found[group.name] = tuple(sorted(n for n in common if n <= group.size))
        elif (step := _step(group, runtime)) > 1:
            found[group.name] = range(step, group.size + 1, step)
    return found


def _step(group: Group, runtime: Runtime) -> int:
    """Return what units are best left in multiples of; 1 where that does not matter."""
    if group.role in _NOUNS:
        wanted = [MATRICES[each] for each in _meant(runtime)]
    elif group.role in ("head-dim", "rope-pair"):
        wanted = [HEADS]
    else:
        return 1
    per_unit = 2 if group.role == "rope-pair" else 1
    step = max(width.best for width in wanted) // per_unit
    if group.role in _NOUNS:
        step = max(step, BLOCK)
    least = max(width.minimum for width in wanted) // per_unit
    while step > least and group.size < CHOICES * step:
        step //= 2
    return step if group.size >= 2 * step else 1


def _meant(runtime: Runtime | None) -> tuple[Runtime, ...]:
    return RUNTIMES if runtime in (None, "portable") else (runtime,)


# -- what is off the fast path --------------------------------------------------------------------


@dataclass(frozen=True)
class Hint:
    """A size that is off the fast path.

    Parameters
    ----------
    where
        The module, or the group where no module holds all of it.
    what
        What has the size, with ``{}`` for it, such as "FFN width {}".
    size
        The size, as text.
    reasons
        Why it is off the fast path -> the runtimes whose path that is.
    """

    where: str
    what: str
    size: str
    reasons: tuple[tuple[str, tuple[Runtime, ...]], ...]

    @property
    def why(self) -> str:
        """The reasons as one text, such as "is no multiple of 64 (cuda)"."""
        return " and ".join(f"{why} ({', '.join(runtimes)})" for why, runtimes in self.reasons)


def speed_hints(
    coupling: Coupling, runtime: Runtime | None = None, removed: Mapping[str, int] | None = None
) -> list[Hint]:
    """Say where a program, or what a plan leaves of it, is off the fast path.

    Parameters
    ----------
    coupling
        The analysis of the program.
    runtime
        What it is to run on; None and "portable": every runtime, and hints name whose they are.
    removed
        Group name -> how many of its units a plan removes (under each parent).

    Returns
    -------
    list
        One hint for every group and every attention with such a size, in the order of the program.
    """
    sizes, runtimes = _Sizes(coupling, removed or {}), _meant(runtime)
    groups = [(each.module, sizes.query_group(each)) for each in sizes.attentions]
    return [
        *_width_hints(sizes, runtimes),
        *(hint for each in sizes.attentions for hint in _head_hints(sizes, each, runtimes)),
        *query_group_hints(coupling.program, groups, runtime),
    ]


def query_group_hints(
    program: Program, groups: Iterable[tuple[str, int]], runtime: Runtime | None = None
) -> list[Hint]:
    """Hints for attentions whose query groups are off the fast path.

    Parameters
    ----------
    program
        The program: where it has no KV cache, it does not decode, and there are none.
    groups
        (module that attends, number of query heads on each of its KV heads).
    runtime
        As in `speed_hints`.
    """
    if not program.kv_bytes_per_token():
        return []
    hints = []
    for where, size in groups:
        reasons = {
            each: f"leave the fastest attention kernel, which takes {_listed(QUERY_GROUPS[each])}"
            for each in _meant(runtime)
            if size not in QUERY_GROUPS.get(each, (size,))
        }
        if reasons:
            what = "{} query heads on a KV head"
            hints.append(Hint(where, what, str(size), _collected(reasons)))
    return hints


class _Sizes:
    """The sizes of axes once a plan has removed its units."""

    def __init__(self, coupling: Coupling, removed: Mapping[str, int]) -> None:
        self.coupling, self.removed = coupling, removed
        self.axes = coupling.types.axes

    def __call__(self, axis: Axis) -> int:
        axis = self.axes.head(axis)
        if isinstance(axis, Product):
            return math.prod(map(self, axis.factors))
        if isinstance(axis, Sum):
            return sum(map(self, axis.terms))
        group = self.coupling.group_of(axis) if isinstance(axis, Atom) else None
        return axis.size if group is None else self.left(group)

    def left(self, group: Group) -> int:
        """Return how many units of a group are left."""
        return group.size - self.removed.get(group.name, 0)

    @cached_property
    def attentions(self) -> list[Attention]:
        """Those whose head sizes are fixed."""
        types = self.coupling.types
        return [
            each
            for each in attentions(types)
            if not types.is_dynamic(each.key_axis(types))
            and not types.is_dynamic(each.value_axis(types))
        ]

    @cached_property
    def _rotary(self) -> set[Atom]:
        marks = self.coupling.types.facts.uses
        return {a for mark in marks if mark.kind == "rotary" for a in self.axes.atoms(mark.axis)}

    def rotated(self, axis: Axis) -> int:
        """Return how much of a head a rotary embedding turns."""
        axis = self.axes.head(axis)
        if isinstance(axis, Sum):
            return sum(map(self.rotated, axis.terms))
        return self(axis) if self._rotary.intersection(self.axes.atoms(axis)) else 0

    def query_group(self, attention: Attention) -> int:
        """Return how many query heads share a KV head; 1 where neither can lose any."""
        heads = kv_heads = 1
        for axis in attention.head_axes(self.coupling.types):
            groups = [self.coupling.group_of(atom) for atom in self.axes.atoms(axis)]
            known = [group for group in groups if group is not None]
            heads *= self(axis) if known else 1
            for group in known:
                if group.role == "kv-head":
                    kv_heads *= self.left(group)
        return heads // kv_heads


def _width_hints(sizes: _Sizes, runtimes: Sequence[Runtime]) -> Iterator[Hint]:
    for group in sizes.coupling.groups:
        if group.role not in _NOUNS:
            continue
        size = sizes.left(group)
        reasons: dict[Runtime, str] = {
            each: f"is no multiple of {MATRICES[each].best}"
            for each in runtimes
            if size % MATRICES[each].best
        }
        if reasons:
            where = group.name.rpartition(":")[0] or group.name
            yield Hint(where, f"{_NOUNS[group.role]} {{}}", str(size), _collected(reasons))


def _head_hints(sizes: _Sizes, attention: Attention, runtimes: Sequence[Runtime]) -> Iterator[Hint]:
    types = sizes.coupling.types
    axis = attention.key_axis(types)
    key, value, rotated = sizes(axis), sizes(attention.value_axis(types)), sizes.rotated(axis)
    decodes = sizes.coupling.program.kv_bytes_per_token() > 0
    reasons = {each: _head_reason(each, key, value, rotated, decodes) for each in runtimes}
    if found := _collected({each: reason for each, reason in reasons.items() if reason}):
        size = str(key) if key == value else f"{key} of keys and {value} of values"
        yield Hint(attention.module, "head size {}", size, found)


def _head_reason(runtime: Runtime, key: int, value: int, rotated: int, decodes: bool) -> str:
    """Return what a head size costs, the most first; "" for nothing."""
    least = HEADS.minimum
    fused = decodes and runtime != "tensorrt"  # GroupQueryAttention is of ONNX Runtime, and cached
    most, decoded = MOST_HEAD_SIZE.get(runtime), DECODED_HEAD_SIZES.get(runtime)
    outside = f"no multiple of {HEADS.best}, so rotation stays outside of GroupQueryAttention"
    if key % least or value % least:
        return f"is no multiple of {least}" + (", which GroupQueryAttention takes" if fused else "")
    if fused and key != value:
        return "is not one size, which GroupQueryAttention takes"
    if fused and rotated and key % HEADS.best:
        return f"is {outside}"
    if fused and rotated % HEADS.best:
        return f"has {rotated} rotated, {outside}"
    if most is not None and max(key, value) > most:
        return f"is more than the {most} of flash attention"
    if decodes and decoded is not None and key not in decoded:
        return f"leaves the fastest attention kernel, which takes {_listed(decoded)}"
    return ""


def _collected(
    reasons: Mapping[Runtime, str],
) -> tuple[tuple[str, tuple[Runtime, ...]], ...]:
    """Reasons with all the runtimes that have them."""
    found: dict[str, tuple[Runtime, ...]] = {}
    for runtime, reason in reasons.items():
        found[reason] = (*found.get(reason, ()), runtime)
    return tuple(found.items())


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
