"""The same random draws in two programs, of which one has lost units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ir.aten import is_random, name_of
from graphprune.ir.interpreter import call

_FACTORS = frozenset({"dropout", "feature_dropout"})
"""What multiplies values by what it draws."""

_VALUES = frozenset({
    "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm",
})  # fmt: skip
"""What gives what it draws, whatever the values of its operands."""

_COINS = "bernoulli"
"""What compares chances, its operand, with numbers that are drawn alike for all."""


def is_repeatable(node: fx.Node) -> bool:
    """Return whether a random operator can draw the same where units of what it acts on went."""
    return name_of(node) in _FACTORS | _VALUES or _is_coins(node)


class Draws:
    """The numbers that the random operators of a graph draw in one run, in order.

    Each draws from a seed of its own, by its number, so that two graphs with the same operators
    draw the same where sizes are the same.

    Parameters
    ----------
    given
        Returns what to take instead of drawing, by number; None to draw.

    Attributes
    ----------
    made
        What was drawn: values or factors, or None where it cannot be told from what they act on.
    """

    def __init__(self, given: Callable[[int], Tensor | None] = lambda number: None) -> None:
        self.given = given
        self.made: list[Tensor | None] = []

    def again(self, number: int) -> Tensor | None:
        """Return what was drawn, for another run to take; None where nothing was yet."""
        return self.made[number] if number < len(self.made) else None

    def compute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of an operator, random or not."""
        if not is_random(node):
            return call(node, args, kwargs)
        number = len(self.made)
        drawn = self.given(number)
        factor, coins = name_of(node) in _FACTORS, _is_coins(node)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            if not is_repeatable(node):
                self.made.append(None)
                return call(node, args, kwargs)
            if drawn is None:
                on = (torch.ones_like(args[0]), *args[1:]) if factor else args
                drawn = torch.rand_like(args[0]) if coins else call(node, on, kwargs)
        self.made.append(drawn)
        if coins:
            return (drawn < args[0]).to(args[0].dtype)
        return args[0] * drawn if factor else drawn


def _is_coins(node: fx.Node) -> bool:
    return name_of(node) == _COINS and len(node.args) == 1
