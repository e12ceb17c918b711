"""ONNX Runtime on the CPU: models are run on sizes that were never traced, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.backends.onnx_names import output_names
from graphprune.errors import BackendError
from graphprune.nodes import size_of
from graphprune.program import PAST, PRESENT, Program

PROMPTS = ((3, 7), (1, 1))
"""Batch and length of the prompts a decoder is compared on."""

STEPS = 10
"""Tokens decoded after the first prompt, each side fed from its own caches."""

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error allowed, where it is not `DEFAULT_TOLERANCE`."""

DEFAULT_TOLERANCE = 1e-4

_LENGTHS = (7, 11, 13, 17, 19)
_SPARE = 4
"""Rows of a position table left unused: some models start counting at 2."""


@dataclass(frozen=True)
class Comparison:
    """What running a model beside its program showed.

    Parameters
    ----------
    max_relative_error
        The largest difference over the largest absolute value of the output concerned; None when
        the model was not run.
    version
        The version of ONNX Runtime, if it is installed.
    notes
        What was not compared, and why.
    """

    max_relative_error: float | None
    version: str | None
    notes: tuple[str, ...] = ()


def compare(
    program: Program, path: Path, names: Mapping[str, str], *, counts: bool = False
) -> Comparison:
    """Run the ONNX model at `path` and `program` on the same random inputs.

    A decoder answers two prompts and then ten single tokens; any other program gets a batch of
    three and a batch of one.

    Parameters
    ----------
    program
        The program that was exported.
    path
        The ONNX model.
    names
        The name of every dynamic size, by its symbol.
    counts
        Whether the model counts a mask's ones, in place of looking where they are. It is then run
        on prompts padded on the right, tokens after them and a chunk on a filled cache too.

    Raises
    ------
    BackendError
        When ONNX Runtime cannot load or run the model, or its outputs differ by more than the
        tolerance of their type (1e-4 for float32).
    """
    try:
        import onnxruntime
    except ImportError:
        note = "ONNX Runtime is not installed, so the model was checked but not run"
        return Comparison(None, None, (note,))
    version = str(onnxruntime.__version__)
    values = (*program.inputs, *program.outputs)
    if any(value.dtype == torch.bfloat16 for value in values):
        return Comparison(None, version, ("not run: bfloat16 has no kernels on the CPU",))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base but Exception
        raise BackendError(
            f"ONNX Runtime {version} refuses the model: {first_line(error)}"
        ) from error
    pair = _Pair(program, session)
    if program.is_decoder and {"sequence", "past_sequence"} <= set(names.values()):
        notes = _compare_decoder(pair, names)
        if counts:
            notes += _compare_padded(pair, names)
    else:
        for batch in (3, 1):
            pair.run(sample_inputs(program, sizes_for(program, names, batch)))
        notes = ()
    return Comparison(pair.worst, version, notes)


def check_opset(opset: int) -> None:
    """Refuse an `opset` that the ONNX Runtime that is installed, if any, does not read.

    Raises
    ------
    BackendError
        When it does not load a model of one operator.
    """
    import onnx

    try:
        import onnxruntime
    except ImportError:
        return
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "probe", [value], [other])
    imports = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base but Exception
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} reads no opset {opset}: a newer one does, "
            "or an older opset"
        ) from error


class _Pair:
    """A program and its ONNX model, compared on every run."""

    def __init__(self, program: Program, session: Any) -> None:
        self.program = program
        self.session = session
        self.wanted = output_names(program)
        self.worst = 0.0
        self.device = next((w.device for w in program.weights.values()), torch.device("cpu"))

    def run(
        self, inputs: Mapping[str, Tensor], theirs: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outputs of the program and of ONNX Runtime, the latter on `inputs` with `theirs`."""
        reference = self.ours(inputs)
        found = self.theirs({**inputs, **(theirs or {})})
        for name in reference:
            self.compare(name, reference[name], found[name])
        return reference, found

    def ours(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of the program."""
        ours = self.program(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return {name: tensor.cpu() for name, tensor in ours.items()}

    def theirs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of ONNX Runtime."""
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        try:
            arrays = self.session.run(self.wanted, feeds)
        except Exception as error:  # its exceptions share no base but Exception
            sizes = ", ".join(f"{name} {tuple(feed.shape)}" for name, feed in feeds.items())
            raise BackendError(f"ONNX Runtime fails on {sizes}: {first_line(error)}") from error
        names = [value.name for value in self.program.outputs]
        return {name: torch.from_numpy(a) for name, a in zip(names, arrays, strict=True)}

    def compare(self, name: str, reference: Tensor, found: Tensor) -> None:
        if reference.shape != found.shape or reference.dtype != found.dtype:
            raise BackendError(
                f"ONNX Runtime gives {name} as {found.dtype} {tuple(found.shape)}, "
                f"the program as {reference.dtype} {tuple(reference.shape)}"
            )
        error = relative_error(reference, found)
        self.worst = max(self.worst, error)
        tolerance = TOLERANCE.get(reference.dtype, DEFAULT_TOLERANCE)
        if not error <= tolerance:
            raise BackendError(
                f"ONNX Runtime differs from the program in {name}: relative error {error:.1e}, "
                f"and {tolerance:.0e} is allowed"
            )


def relative_error(reference: Tensor, found: Tensor) -> float:
    """Largest difference over the largest absolute value of `reference`.

    Entries that are the same infinity, or both NaN, are equal.
    """
    if not reference.numel():
        return 0.0
    a, b = reference.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).max().item()
    if difference == 0.0:
        return 0.0
    scale = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
    return difference / scale if scale and difference == difference else float("inf")


def _compare_decoder(pair: _Pair, names: Mapping[str, str]) -> tuple[str, ...]:
    program = pair.program
    room = _positions(program, names)
    notes = []
    for index, (batch, length) in enumerate(PROMPTS):
        length = min(length, room)
        sizes = {"batch": batch, "sequence": length, "past_sequence": 0, "total_sequence": length}
        inputs = sample_inputs(program, {symbol: sizes[name] for symbol, name in names.items()})
        ours, theirs = pair.run(inputs)
        steps = min(STEPS, room - length) if index == 0 else 0
        if index == 0 and steps < STEPS:
            notes.append(f"{steps} decode steps: the model has {room} positions to try")
        for step in range(steps):
            sizes = {"batch": batch, "sequence": 1, "past_sequence": length + step}
            sizes["total_sequence"] = length + step + 1
            inputs = sample_inputs(program, {s: sizes[name] for s, name in names.items()}, step + 1)
            ours, theirs = pair.run({**inputs, **_caches(ours)}, _caches(theirs))
    return tuple(notes)


def _compare_padded(pair: _Pair, names: Mapping[str, str]) -> tuple[str, ...]:
    """Rows of several lengths, padded on the right, must be what each row is alone."""
    program, room = pair.program, _positions(pair.program, names)
    length = min(PROMPTS[0][1], room - 3)
    own = [value.name for value in program.inputs if not value.name.startswith(PAST)]
    if length < 3 or own != ["input_ids", "attention_mask"]:
        return ("not run on padded prompts",)
    logits = program.outputs[0].name
    held = (length // 2, length, 1)

    def sample(batch: int, new: int, past: int) -> dict[str, Tensor]:
        sizes = {"batch": batch, "sequence": new, "past_sequence": past}
        sizes["total_sequence"] = past + new
        return sample_inputs(program, {symbol: sizes[name] for symbol, name in names.items()}, past)

    inputs = sample(len(held), length, 0)
    mask = torch.arange(length)[None] < torch.tensor(held)[:, None]
    inputs["attention_mask"] = mask.to(inputs["attention_mask"].dtype)
    theirs = pair.theirs(inputs)
    alone = []
    for row, size in enumerate(held):
        ids = inputs["input_ids"][row : row + 1, :size]
        alone.append(pair.ours({**sample(1, size, 0), "input_ids": ids}))
        pair.compare(logits, alone[row][logits], theirs[logits][row : row + 1, :size])
    for step in range(2):
        inputs = {**sample(len(held), 1, length + step), **_caches(theirs)}
        inputs["attention_mask"][:, :length] = mask
        theirs = pair.theirs(inputs)
        for row, size in enumerate(held):
            one = {**sample(1, 1, size + step), "input_ids": inputs["input_ids"][row : row + 1]}
            alone[row] = pair.ours({**one, **_caches(alone[row])})
            pair.compare(logits, alone[row][logits], theirs[logits][row : row + 1])
    ours, theirs = pair.run(sample(1, length, 0))
    pair.run({**sample(1, 3, length), **_caches(ours)}, _caches(theirs))
    return ()


def _caches(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The caches among `outputs`, by the names of the inputs that take them."""
    present = {name for name in outputs if name.startswith(PRESENT)}
    return {PAST + name.removeprefix(PRESENT): outputs[name] for name in present}


def _positions(program: Program, names: Mapping[str, str]) -> int:
    """How many positions may be tried, by the sizes' ranges and the model's position table."""
    room = PROMPTS[0][1] + STEPS
    for symbol, limits in program.ranges.items():
        if names.get(str(symbol)) not in (None, "batch") and limits.upper.is_Integer:
            room = min(room, int(limits.upper))
    for value, node in program.input_nodes():
        rows = _rows(node) if value.name.endswith("attention_mask") else None
        room = room if rows is None else min(room, rows - _SPARE)
    return max(room, 1)


def sizes_for(program: Program, names: Mapping[str, str], batch: int) -> dict[str, int]:
    """A size for every symbol: `batch`, and lengths of which no two are equal."""
    lengths = iter(_LENGTHS * len(names))
    chosen: dict[str, int] = {}
    for name in dict.fromkeys(names.values()):
        chosen[name] = batch if name == "batch" or name.endswith("_batch") else next(lengths)
    for symbol, name in names.items():
        chosen[name] = program.within(symbol, chosen[name])
    return {symbol: chosen[name] for symbol, name in names.items()}


def sample_inputs(program: Program, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random inputs on the CPU: token ids within the vocabulary, masks of ones, normal floats.

    Parameters
    ----------
    program
        The program to make inputs for.
    sizes
        The size of every symbol.
    seed
        Seed of what is random.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for value, node in program.input_nodes():
        shape = [size_of(size, sizes) for size in node.meta["val"].shape]
        if value.name.endswith("attention_mask") or value.dtype == torch.bool:
            inputs[value.name] = torch.ones(shape, dtype=value.dtype)
        elif value.dtype.is_floating_point or value.dtype.is_complex:
            inputs[value.name] = torch.randn(shape, generator=generator).to(value.dtype)
        else:
            bound = _rows(node, shifted=False) or 2
            drawn = torch.randint(0, bound, shape, generator=generator)
            inputs[value.name] = drawn.to(value.dtype)
    return inputs


_SHIFTS = ("aten.add.", "aten.sub.", "aten.mul.")
"""Operators after which an index is another than what went in, by an offset say."""


def _rows(node: fx.Node, *, shifted: bool = True) -> int | None:
    """Rows of the smallest table that the integers of `node` look into; None for no table.

    Where `shifted` is false, tables looked into by what arithmetic made of the integers, which
    their rows do not bound, do not count.
    """
    rows: dict[fx.Node, int] = {}
    moved: set[fx.Node] = set()
    start = (node, False)
    seen, queue = {start}, [start]
    while queue:
        node, changed = queue.pop()
        for user in node.users:
            value = user.meta.get("val")
            after = (user, changed or str(user.target).startswith(_SHIFTS))
            if _looks_up(user, node):
                rows[user] = int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
                moved |= {user} if changed else set()
            elif isinstance(value, Tensor) and not value.is_floating_point() and after not in seen:
                seen.add(after)
                queue.append(after)
    return min((n for user, n in rows.items() if shifted or user not in moved), default=None)


def _looks_up(user: fx.Node, index: fx.Node) -> bool:
    """Whether `user` picks rows of a weight by the values of `index`."""
    table: Any = user.args[0] if user.args else None
    if not isinstance(table, fx.Node) or table is index or table.op != "placeholder":
        return False
    return str(user.target).startswith(("aten.embedding.", "aten.index.", "aten.index_select."))


def first_line(error: BaseException) -> str:
    """The first line of `error` that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
