"""Random inputs that fit a program: what verification and back ends run it on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod, PythonMod

from graphprune.ir.aten import CASTS, MOVES, name_of, plain_name
from graphprune.ir.input_sizes import table_rows
from graphprune.ir.nodes import arguments_of, size_of
from graphprune.ir.program import PAST, Program, Value

# -- sizes ----------------------------------------------------------------------------------------


def sample_sizes(program: Program, *, batch: int = 2, length: int = 7) -> dict[str, int]:
    """Return a size for every symbol of a program's inputs.

    First dimensions are `batch`, or a few more where the graph takes them in pairs and the like.
    Other dimensions of numbers, images and the like, are the size that is next to the example's,
    further by what the graph divides them by, so that strides come out even. All others, tokens
    and the like, are `length`.

    Parameters
    ----------
    program
        The program; the ranges of its sizes are kept to.
    batch, length
        As above.
    """
    near = sizes_near_example(program)
    found: dict[str, int] = {}
    for _, dim, _, symbol in _symbols(program):
        name = str(symbol)
        if name not in found:
            wanted = whole_batch(program, name, batch) if dim == 0 else near.get(name, length)
            found[name] = program.within(name, wanted)
    return found


def whole_batch(program: Program, name: str, batch: int) -> int:
    """Return the least size from `batch` on that the graph divides as evenly as the example's."""
    batch = program.within(name, batch)
    for _, _, size, symbol in _symbols(program):
        example = _example(size, symbol)
        if str(symbol) == name and example:
            step = _divisor(program, symbol)
            return batch if example % step else -(-batch // step) * step
    return batch


def sizes_near_example(program: Program) -> dict[str, int]:
    """Return sizes for the symbols of images and the like, each next to the example's.

    They are symbols of numbers behind the first dimension, where the example's size is known.
    """
    found: dict[str, int] = {}
    batches = {symbol for _, dim, _, symbol in _symbols(program) if dim == 0}
    for value, _, size, symbol in _symbols(program):
        numbers = value.dtype.is_floating_point and not value.name.startswith(PAST)
        if numbers and symbol not in batches and str(symbol) not in found:
            near = _next_size(program, size, symbol)
            found |= {} if near is None else {str(symbol): near}
    return found


def _symbols(program: Program) -> Iterator[tuple[Value, int, torch.SymInt, Any]]:
    """Yield every input, dimension, its size, and a symbol that stands in it."""
    for value, node in program.input_nodes():
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    yield value, dim, size, symbol


def _next_size(program: Program, size: Any, symbol: Any) -> int | None:
    """Return the size next to the example's that is divided as evenly; None for no example."""
    example = _example(size, symbol)
    if example is None:
        return None
    step = _divisor(program, symbol)
    further = example + step
    return further if program.within(str(symbol), further) == further else example - step


def _example(size: Any, symbol: Any) -> int | None:
    """Return the example's size of a symbol that stands in `size`, where it is known."""
    environment = size.node.shape_env
    known = getattr(environment, "backed_var_to_val", None)
    example = (environment.var_to_val if known is None else known).get(symbol)
    return None if example is None else int(example)


def _divisor(program: Program, symbol: Any) -> int:
    """Return what the sizes of the graph divide a symbol by, all together."""
    found = 1
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for part in value if isinstance(value, tuple | list) else (value,):
            for size in part.shape if isinstance(part, Tensor) else (part,):
                if isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols:
                    found = math.lcm(found, _divided(size.node.expr))
    return found


def _divided(expression: Any) -> int:
    """Return the product of the numbers by which what is inside is divided in turn."""
    found = math.lcm(1, *map(_divided, expression.args))
    if isinstance(expression, FloorDiv | CleanDiv | Mod | PythonMod):
        by = expression.args[1]
        found *= int(by) if by.is_Integer else 1
    return found


# -- values ---------------------------------------------------------------------------------------


def random_inputs(
    program: Program,
    sizes: Mapping[str, int] | None = None,
    *,
    seed: int = 0,
    batch: int = 2,
    length: int = 7,
    complete: bool = False,
    integers: Literal["random", "one", "zero"] = "random",
) -> dict[str, Tensor]:
    """Return random inputs on the CPU: ids within their tables, mixed masks, normal numbers.

    Parameters
    ----------
    program
        The program.
    sizes
        Sizes of symbols; all others are `sample_sizes` of `batch` and `length`.
    seed
        Same seed, same inputs.
    batch, length
        See `sample_sizes`.
    complete
        Whether to make caches and attention masks too, which otherwise fill themselves in.
    integers
        What integers are that look into no table, such as lengths and offsets.
    """
    sizes = {**sample_sizes(program, batch=batch, length=length), **(sizes or {})}
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for value, node in program.input_nodes():
        fills_in = value.name.startswith(PAST) or value.name.endswith("attention_mask")
        if fills_in and not complete:
            continue
        shape = [size_of(size, sizes) for size in node.meta["val"].shape]
        made = _random(value.name, node, shape, value.dtype, generator)
        counts = not (made.is_floating_point() or made.is_complex() or made.dtype is torch.bool)
        if integers != "random" and counts and table_rows(node, shifted=False) is None:
            made = torch.full_like(made, integers == "one")
        inputs[value.name] = made
    return inputs


def _random(
    name: str, node: fx.Node, shape: list[int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if dtype is torch.bool:
        return _mixed(shape, generator) ^ _hides(name, node)
    if name.endswith("mask") and not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    rows = _rows_of_whole(node) if dtype.is_floating_point else table_rows(node, shifted=False) or 2
    if dtype.is_complex or rows is None:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, rows, shape, generator=generator).to(dtype)


def _rows_of_whole(node: fx.Node) -> int | None:
    """Return the rows that numbers pick from where the graph makes ids of them; None elsewhere."""
    casts = (user for user in node.users if plain_name(user) in CASTS)
    whole = [user for user in casts if user.meta["val"].dtype in (torch.int32, torch.int64)]
    rows = (table_rows(user, shifted=False) for user in whole)
    return min((found for found in rows if found is not None), default=None)


def _mixed(shape: list[int], generator: torch.Generator) -> Tensor:
    """Return a mask that keeps half of the last dimension: the first position, and others by row.

    Every row keeps as many. The first position is kept by all, so that masks that meet, such as a
    causal one and one of padding, leave something.
    """
    if not shape or not math.prod(shape):
        return torch.ones(shape, dtype=torch.bool)
    order = torch.rand(shape, generator=generator)
    order[..., 0] = -1
    kept = order.argsort(-1)[..., : -(-shape[-1] // 2)]
    return torch.zeros(shape, dtype=torch.bool).scatter(-1, kept, True)


def _hides(name: str, node: fx.Node) -> bool:
    """Return whether a mask that is true hides what it stands for, as the graph uses it."""
    pending, seen = [(node, True)], {node}
    while pending:
        mask, hides = pending.pop()
        for user in mask.users:
            given, plain = arguments_of(user), plain_name(user)
            if plain == "masked_fill" and given["mask"] is mask:
                return hides
            if plain == "where" and given["condition"] is mask:
                return hides if _is_least(given["self"]) else not hides
            if plain == "scaled_dot_product_attention" and given["attn_mask"] is mask:
                return not hides
            flips = plain in ("logical_not", "bitwise_not")
            if (flips or name_of(user) in MOVES or plain.endswith("and")) and user not in seen:
                seen.add(user)
                pending.append((user, hides != flips))
    return "padding" in name


def _is_least(value: Any) -> bool:
    """Return whether `value` is a very low number, or is filled with one."""
    if isinstance(value, fx.Node):
        given = arguments_of(value)
        value = given.get("fill_value", given.get("s"))
    return isinstance(value, int | float) and value < -1e3


def continuation(
    program: Program, inputs: Mapping[str, Tensor], seed: int = 1
) -> dict[str, Tensor]:
    """Return one more token for every row of a decoder's `inputs`."""
    return random_inputs(program, seed=seed, batch=len(inputs["input_ids"]), length=1)
