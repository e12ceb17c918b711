"""Fewer tokens: the rows of embeddings and heads that belong to some of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import fx

from graphprune.analysis.axes import Atom, Axis
from graphprune.analysis.axis_cuts import AxisCut
from graphprune.analysis.inference import infer
from graphprune.analysis.types import Types
from graphprune.errors import RewriteError
from graphprune.ir.aten import MOVES, name_of, plain_name
from graphprune.ir.nodes import get_argument, set_argument
from graphprune.ir.program import PRESENT, Program
from graphprune.ir.provenance import whereabouts
from graphprune.transforms.resize import Resize

TOKENS = ("input_ids", "decoder_input_ids")
"""The inputs that hold tokens."""


def with_tokens(program: Program, kept: Sequence[int]) -> Program:
    """Return `program` for the tokens `kept` alone, numbered anew in their order.

    Its outputs are those of `program`, exactly, for the tokens that stay.

    Parameters
    ----------
    program
        A program that takes tokens and, if it predicts any, predicts tokens of the same vocabulary.
    kept
        Ids, ascending.

    Raises
    ------
    RewriteError
        When the program does anything else with a token than to pick a row by it, or with the
        logits of tokens than to give them, naming the operator.
    """
    types = infer(program)
    lookups = list(_lookups(program))
    if not lookups:
        raise RewriteError("the program picks no embedding by its input_ids")
    cuts = dict.fromkeys(_axes(types, lookups), AxisCut())
    sizes = {axis.size for axis in cuts}
    if len(sizes) > 1 or kept[-1] >= min(sizes):
        raise RewriteError(f"embeddings are of {sizes} tokens, and {kept[-1]} is to stay")
    (size,) = sizes
    cuts.update(dict.fromkeys(_predicted(types, size), AxisCut()))
    _refuse_other_uses(types, cuts, lookups)
    held = set(kept)
    removed = AxisCut(removed=tuple(token for token in range(size) if token not in held))
    resize = Resize(types, dict.fromkeys(cuts, removed))
    for node in lookups:
        padding = get_argument(node, "padding_idx")
        moved = kept.index(padding) if padding in held else -1
        if padding != moved:
            set_argument(resize.new[node], "padding_idx", None, moved)
    return resize.program(resize.gathered(program.weights))


def vocabulary_size(program: Program) -> int | None:
    """Return how many rows the embedding of the program's tokens has; None without one."""
    for node in _lookups(program):
        return int(node.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
    return None


def _lookups(program: Program) -> Iterator[fx.Node]:
    """Yield the embeddings that tokens pick rows of.

    Raises
    ------
    RewriteError
        When something else is done with tokens.
    """
    pending = [node for value, node in program.input_nodes() if value.name in TOKENS]
    while pending:
        node = pending.pop()
        for user in node.users:
            if name_of(user) == "sym_size":
                continue
            if plain_name(user) in MOVES:
                pending.append(user)
            elif name_of(user) == "embedding" and user.args[0] is not node:
                yield user
            else:
                raise RewriteError(f"tokens are used by number, at {whereabouts(user)}")


def _axes(types: Types, lookups: Collection[fx.Node]) -> Iterator[Atom]:
    """Yield the axes of rows that tokens pick."""
    for node in lookups:
        weight = node.args[0]
        axis = types.axes.head(types.axes_of[weight][0])  # type: ignore[index]
        if not isinstance(axis, Atom):
            raise RewriteError(f"tokens pick rows of parts, at {whereabouts(node)}")
        yield axis


def _predicted(types: Types, size: int) -> Iterator[Atom]:
    """Yield the axes of logits of tokens, where that is one of their own."""
    for value, node in types.program.output_nodes():
        type_ = types.axes_of.get(node)
        if value.name.startswith(PRESENT) or not isinstance(type_, tuple) or not type_:
            continue
        axis = types.axes.head(type_[-1])
        if isinstance(axis, Atom) and axis.size == size and value.name == "logits":
            yield axis


def _refuse_other_uses(types: Types, cuts: Collection[Axis], lookups: Collection[fx.Node]) -> None:
    """Refuse axes of tokens that something sums or takes statistics over, or reads by place."""
    facts = types.facts
    summed = [(entry.axis, entry.node) for entry in facts.contractions]
    summed += [(entry.axis, entry.node) for entry in facts.means]
    summed += [(entry.axis, entry.node) for entry in facts.statistics]
    summed += [(entry.axis, entry.node) for entry in facts.routings]
    ends = {node for _, node in types.program.output_nodes()}
    summed += [
        (entry.axis, entry.node)
        for entry in facts.frozen
        if entry.node not in lookups and entry.node not in ends
    ]
    for axis, node in summed:
        if any(atom in cuts for atom in types.axes.atoms(axis)):
            raise RewriteError(f"the vocabulary is used as a whole, at {whereabouts(node)}")
