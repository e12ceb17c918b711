"""Where a weight is multiplied with activations and summed: its matrices, whatever their layout.

A weight reaches a contraction through views (a transpose, a slice of a packed projection, an
expert's slice picked by the router). The views are run on a tensor without data, so that a
matrix knows which element of the weight each of its own is; nothing is said of any module class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphprune.ir.aten import (
    PARTS,
    PERMUTES,
    PRODUCTS,
    RESHAPES,
    SPLITS,
    is_copy,
    name_of,
    plain_name,
)
from graphprune.ir.nodes import arguments_of
from graphprune.ir.program import Program

_ATEN = torch.ops.aten

Values = Mapping[fx.Node, Any]
"""What the nodes of a graph have computed."""


@dataclass(frozen=True, eq=False)
class Use:
    """One contraction of a matrix with activations.

    Parameters
    ----------
    node
        The operator.
    source
        The node of the activations.
    rows
        Gives the activations as (part, ``[n, in]``), from the values computed so far.
    picks
        What else that looks at: the node whose values say which parts were picked, if any were.
    right
        Whether the matrix stands to the right of the activations, whose last dimension it sums
        over; else that is the last but one.
    """

    node: fx.Node
    source: fx.Node
    rows: Callable[[Values], Iterator[tuple[int, Tensor]]]
    picks: tuple[fx.Node, ...] = ()
    right: bool = True


@dataclass(frozen=True, eq=False)
class Matrix:
    """The elements of a weight that are contracted together.

    Parameters
    ----------
    weight
        Name of the weight.
    view
        A tensor without data whose strides and offset say where in the weight the elements are:
        ``[*parts, out, *in]``. Parts are experts or the groups of a convolution, whose ``in`` runs
        over the taps of the kernel, then over channels.
    outer
        How many axes are parts.
    uses
        The contractions.
    """

    weight: str
    view: Tensor
    outer: int = 0
    uses: list[Use] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The weight's name, with the first element where it is not the weight's first."""
        first = self.view.storage_offset()
        return f"{self.weight}+{first}" if first else self.weight

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(parts, out, in)``."""
        sizes = self.view.shape
        after = sizes[self.outer + 1 :]
        return math.prod(sizes[: self.outer]), sizes[self.outer], math.prod(after)

    @property
    def channels(self) -> int:
        """The number of neighbors along ``in`` that are channels of one tap of a kernel."""
        return self.view.shape[-1]

    def read(self, weight: Tensor) -> Tensor:
        """Return the matrix as ``[parts, out, in]``, a copy."""
        return self._of(weight.detach().contiguous()).clone().reshape(self.shape)

    def write(self, weight: Tensor, matrix: Tensor) -> Tensor:
        """Return a copy of `weight` that holds `matrix`, ``[parts, out, in]``."""
        copy = weight.detach().clone(memory_format=torch.contiguous_format)
        self._of(copy).copy_(matrix.reshape(self.view.shape))
        return copy

    def _of(self, weight: Tensor) -> Tensor:
        return weight.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())


@dataclass(frozen=True, eq=False)
class Contractions:
    """Every matrix of a program, and why the other weights have none.

    Parameters
    ----------
    matrices
        In the order in which the graph first uses them.
    others
        Name of a weight of two or more dimensions -> how it is used otherwise.
    """

    matrices: tuple[Matrix, ...]
    others: Mapping[str, str]


def contractions(program: Program) -> Contractions:
    """Find every matrix of the parameters of `program`.

    Parameters
    ----------
    program
        A captured program; its values are not looked at.

    Returns
    -------
    Contractions
        A weight whose use is not understood, or is something else beside a contraction (an
        embedding that is looked up), has no matrix but a reason.
    """
    matrices: list[Matrix] = []
    others: dict[str, str] = {}
    for name, node in program.weight_nodes():
        weight = program.weights[name]
        if program.kinds[name] != "parameter" or weight.ndim < 2:
            continue
        try:
            found = _matrices_of(name, node, torch.empty(weight.shape, device="meta"))
        except _Unknown as why:
            others[name] = str(why)
            continue
        if found:
            matrices += found
        else:
            others[name] = "nothing uses it"
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    matrices.sort(key=lambda matrix: order[matrix.uses[0].node])
    return Contractions(tuple(matrices), others)


class _Unknown(Exception):
    """A use of a weight that is no contraction."""


def _matrices_of(name: str, node: fx.Node, view: Tensor) -> list[Matrix]:
    found: dict[Any, Matrix] = {}
    for matrix in _uses(name, node, view, None):
        at = matrix.view.shape, matrix.view.stride(), matrix.view.storage_offset()
        if at in found:
            found[at].uses.extend(matrix.uses)
        else:
            found[at] = matrix
    if len(found) > 1:
        count = torch.zeros(view.shape, dtype=torch.uint8)
        for matrix in found.values():
            count = matrix.write(count, matrix.read(count) + 1)
        if count.max() > 1:
            raise _Unknown("its matrices overlap")
    return list(found.values())


def _uses(name: str, node: fx.Node, view: Tensor, ids: fx.Node | None) -> Iterator[Matrix]:
    """Follow a weight, now the value of `node`, to its contractions.

    `ids` is the node whose values say which index of the first axis each index now stands for.
    """
    for user in node.users:
        moved = name_of(user)
        first = bool(user.args) and user.args[0] is node
        rest = (*user.args[1:], *user.kwargs.values())
        literal = not any(isinstance(arg, fx.Node) for arg in _flat(rest))
        if first and is_copy(user):
            yield from _uses(name, user, view, ids)
        elif moved in RESHAPES | PERMUTES | PARTS and first and literal:
            viewed = user.target(view, *user.args[1:], **user.kwargs)  # type: ignore[operator]
            if not torch._C._is_alias_of(viewed, view):  # type: ignore[attr-defined]
                raise _Unknown(f"it is rearranged by {user.target}")
            if ids is not None and not _same_first(viewed, view):
                raise _Unknown(f"what is picked of it is rearranged by {user.target}")
            yield from _uses(name, user, viewed, ids)
        elif moved in SPLITS and first and literal and ids is None:
            pieces = user.target(view, *user.args[1:], **user.kwargs)  # type: ignore[operator]
            for getter in user.users:
                yield from _uses(name, getter, pieces[getter.args[1]], ids)
        elif (picked := _picked(user, node)) is not None and ids is None:
            yield from _uses(name, user, view, picked)
        else:
            yield _contraction(name, user, node, view, ids)


def _flat(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, list | tuple):
            yield from _flat(arg)
        else:
            yield arg


def _same_first(viewed: Tensor, view: Tensor) -> bool:
    """Return whether the first axis is the same in both."""
    of = [(t.shape[:1], t.stride()[:1], t.storage_offset()) for t in (viewed, view)]
    return of[0] == of[1]


def _picked(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return the ids by which `user` picks along the first axis of `node`, if it does so."""
    if user.target is _ATEN.index.Tensor and user.args[0] is node:
        indices = user.args[1]
        if isinstance(indices, list | tuple) and len(indices) == 1:
            return indices[0] if isinstance(indices[0], fx.Node) else None
    if user.target is _ATEN.index_select.default and user.args[:2] == (node, 0):
        return user.args[2] if isinstance(user.args[2], fx.Node) else None
    return None


# -- the contractions ------------------------------------------------------------------------------


def _contraction(
    name: str, user: fx.Node, node: fx.Node, view: Tensor, ids: fx.Node | None
) -> Matrix:
    args = arguments_of(user)
    product = name_of(user)
    if product == "linear" and args["weight"] is node and view.ndim == 2 and ids is None:
        return _product(name, user, args["input"], view.mT, None, right=True)
    if product in PRODUCTS:
        left, right = (args[key] for key in list(args)[:2])
    elif product in ("addmm", "baddbmm"):
        left, right = (args[key] for key in list(args)[1:3])
    elif product in ("conv1d", "conv2d") and args["weight"] is node and ids is None:
        return _convolution(name, user, args, view)
    else:
        raise _Unknown(f"it is used by {user.target}")
    if left is right or view.ndim < 2:
        raise _Unknown(f"it is used by {user.target}")
    if right is node:
        return _product(name, user, left, view, ids, right=True)
    return _product(name, user, right, view, ids, right=False)


def _product(
    name: str, node: fx.Node, source: fx.Node, view: Tensor, ids: fx.Node | None, right: bool
) -> Matrix:
    """``x @ W`` with `right`, else ``W @ x``; leading axes of the weight are parts."""
    held = view.mT if right else view  # [..., out, in]
    batch = held.shape[:-2]

    def rows(values: Values) -> Iterator[tuple[int, Tensor]]:
        x = values[source]
        if x.ndim == 1:
            x = x[None]
        elif not right:
            x = x.mT
        if ids is not None:
            yield from _by_part(x, values[ids].reshape(-1))
        elif math.prod(batch) == 1:
            yield 0, x.reshape(-1, x.shape[-1])
        else:
            lead = max(x.ndim - held.ndim, 0)
            x = x.expand(*x.shape[:lead], *batch, *x.shape[-2:])
            x = x.movedim(tuple(range(lead)), tuple(range(len(batch), len(batch) + lead)))
            yield from enumerate(x.reshape(math.prod(batch), -1, x.shape[-1]))

    picks = () if ids is None else (ids,)
    return Matrix(name, held, len(batch), [Use(node, source, rows, picks, right)])


def _by_part(x: Tensor, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Return ``[picked, n, in]`` by the part that each was picked of."""
    for part in ids.unique().tolist():
        yield part, x[ids == part].reshape(-1, x.shape[-1])


def _convolution(name: str, node: fx.Node, args: Mapping[str, Any], view: Tensor) -> Matrix:
    """Rows are the windows under the kernel; columns are taps of the kernel, then channels."""
    groups, source = args["groups"], args["input"]
    if not isinstance(groups, int):
        raise _Unknown("it is convolved in a dynamic number of groups")
    kernel = view.shape[2:]
    taps, channels = math.prod(kernel), view.shape[1]
    stride, dilation = (_each(args[key], len(kernel)) for key in ("stride", "dilation"))
    pads = _pads(args["padding"], kernel, dilation)

    def rows(values: Values) -> Iterator[tuple[int, Tensor]]:
        x = values[source]
        x = x[None] if x.ndim == len(kernel) + 1 else x
        x = functional.pad(x, pads)
        flat = len(kernel) == 1
        x = x[:, :, None] if flat else x
        sizes = [(1, *kernel) if flat else kernel]
        sizes += [(1, *of) if flat else of for of in (dilation, stride)]
        windows = functional.unfold(x, sizes[0], dilation=sizes[1], stride=sizes[2])
        windows = windows.view(len(x), groups, channels, taps, -1).permute(1, 0, 4, 3, 2)
        yield from enumerate(windows.reshape(groups, -1, taps * channels))

    held = view.unflatten(0, (groups, -1)).movedim(2, -1)
    return Matrix(name, held, 1, [Use(node, source, rows)])


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * count if len(values) == 1 else values


def _pads(padding: Any, kernel: torch.Size, dilation: tuple[int, ...]) -> list[int]:
    """Return what `functional.pad` takes: before and after, the last axis first."""
    pairs = []
    each = () if isinstance(padding, str) else _each(padding, len(kernel))
    for at, (size, step) in enumerate(zip(kernel, dilation, strict=True)):
        if isinstance(padding, str):
            total = step * (size - 1) if padding == "same" else 0
            pairs.append((total // 2, total - total // 2))
        else:
            pairs.append((each[at], each[at]))
    return [side for pair in reversed(pairs) for side in pair]


def bias_of(program: Program, matrix: Matrix) -> str:
    """Return the parameter that is added to the output of `matrix` alone, or "".

    Its elements are the ``parts * out`` outputs in order.
    """
    if len(matrix.uses) != 1:
        return ""
    args = arguments_of(matrix.uses[0].node)
    bias = args.get("self") if name_of(matrix.uses[0].node) == "addmm" else args.get("bias")
    name = next((name for name, node in program.weight_nodes() if node is bias), "")
    parts, out, _ = matrix.shape
    fits = name and program.weights[name].shape == (parts * out,) and len(bias.users) == 1  # type: ignore[union-attr]
    return name if fits and program.kinds[name] == "parameter" else ""


def last_sum(node: fx.Node) -> fx.Node:
    """Return the last of the sums of whole rows that `node` goes into, each with no other use.

    It is `node` itself where there is none. Rows run along all dimensions but the last, and keep
    their order.
    """
    width, last = node.meta["val"].shape[-1], node
    while True:
        users = [user for user in node.users if name_of(user) != "sym_size"]
        if len(users) != 1 or not isinstance(value := users[0].meta.get("val"), Tensor):
            return last
        given, how = arguments_of(users[0]), plain_name(users[0])
        adds = how == "add" and given.get("alpha", 1) == 1
        adds = adds and value.shape == node.meta["val"].shape
        adds = adds or (how == "index_add" and given["self"] is node and given["dim"] == 0)
        sums_into = how == "index_put" and given["accumulate"] and given["self"] is node
        adds = adds or sums_into
        moves = is_copy(users[0]) or name_of(users[0]) in RESHAPES
        if not (adds or moves) or value.shape[-1:] != (width,):
            return last
        node = users[0]
        last = node if adds else last
