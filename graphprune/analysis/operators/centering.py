"""Recognize ``x - x.mean()`` and its variance, as norms that are spelled out compute them."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from graphprune.ir.aten import is_copy, uncopied

_ATEN = torch.ops.aten

_MEANS = {_ATEN.mean.dim, _ATEN.mean.default}
_PAIRS = {
    _ATEN.std_mean.correction,
    _ATEN.std_mean.dim,
    _ATEN.var_mean.correction,
    _ATEN.var_mean.dim,
}
"""Operators whose second result is the mean."""


def is_centering(node: fx.Node) -> bool:
    """Return whether `node` is ``x - mean(x)``, the mean of size 1 where it was taken."""
    if node.target is not _ATEN.sub.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    value, mean = (_plain(argument) for argument in node.args)
    if not isinstance(value, fx.Node) or not isinstance(mean, fx.Node):
        return False
    if mean.target is operator.getitem and mean.args[1] == 1:
        (mean, *_), kinds = mean.args, _PAIRS
    else:
        kinds = _MEANS
    if not isinstance(mean, fx.Node) or mean.target not in kinds:
        return False
    ranks = {argument.meta["val"].ndim for argument in node.args}  # type: ignore[union-attr]
    return _plain(mean.args[0]) is value and len(ranks) == 1


def is_of_centered(node: fx.Node) -> bool:
    """Return whether the mean `node` is of powers of what was centered: a variance."""
    value = _plain(node.args[0])
    while isinstance(value, fx.Node) and value.target in (
        _ATEN.pow.Tensor_Scalar,
        _ATEN.square.default,
        _ATEN.abs.default,
        _ATEN.mul.Tensor,
    ):
        if value.target is _ATEN.mul.Tensor and _plain(value.args[0]) is not _plain(value.args[1]):
            return False
        value = _plain(value.args[0])
    return isinstance(value, fx.Node) and is_centering(value)


def is_center(node: fx.Node) -> bool:
    """Return whether the mean `node` is subtracted from what it is the mean of."""
    return any(is_centering(user) for user in _users(node))


def _users(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield from _users(user) if is_copy(user) else (user,)


def _plain(value: object) -> object:
    return uncopied(value) if isinstance(value, fx.Node) else value
